"""Looks before the leap."""
