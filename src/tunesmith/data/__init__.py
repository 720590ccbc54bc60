"""Rows -> conversations -> token examples -> batches. Knows no model; a tokenizer arrives as an argument."""
