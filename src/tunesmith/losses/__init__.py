"""Pure maths: tensors in, unreduced tensors out. Imports torch and ``types`` only.

Shape suffixes: ``T`` tokens of a flat batch, ``S`` supervised tokens, ``V`` vocabulary.
"""
