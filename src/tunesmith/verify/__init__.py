"""Proofs that can be asked for: what is learned is what should be."""
