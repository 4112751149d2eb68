"""Flax NNX layers: they hold parameters and state, and call the functions."""

from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._normalizer_free import SkipInit, WSConv, WSLinear
from jaxbn.nnx._renorm import BatchRenorm

__all__ = ["BatchNorm", "BatchRenorm", "SkipInit", "WSConv", "WSLinear"]
