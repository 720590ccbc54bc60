"""Using the result."""
