"""Flax Linen layers: they hold parameters and state, and call the functions."""

from jaxbn.linen._batch_norm import BatchNorm

__all__ = ["BatchNorm"]
