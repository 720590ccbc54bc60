"""Weights: fetching, loading, adapters, precision, attention. The only room that knows transformers' versions."""
