"""Optimizers that are short enough to be written from their papers, or that libraries have in parts only."""
