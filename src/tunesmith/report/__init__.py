"""Run folder -> pictures and text. Reads files only."""
