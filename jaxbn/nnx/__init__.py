"""Flax NNX layers: they hold parameters and state, and call the functions."""

from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._conditional import ConditionalBatchNorm
from jaxbn.nnx._domain import DomainBatchNorm
from jaxbn.nnx._prediction_time import prediction_time
from jaxbn.nnx._reference import VirtualBatchNorm
from jaxbn.nnx._renorm import BatchRenorm

__all__ = [
  "BatchNorm",
  "BatchRenorm",
  "ConditionalBatchNorm",
  "DomainBatchNorm",
  "VirtualBatchNorm",
  "prediction_time",
]
