"""Tokens out."""
