"""Zeros in weights: which go (criteria), how many and where (sparsify)."""
