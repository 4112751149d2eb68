"""Batch normalization in JAX."""
