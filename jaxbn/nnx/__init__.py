"""Flax NNX layers: they hold parameters and state, and call the functions."""

from jaxbn.nnx._batch_norm import BatchNorm

__all__ = ["BatchNorm"]
