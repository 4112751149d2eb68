"""Flax Linen layers: they hold parameters and state, and call the functions."""

from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._conditional import ConditionalBatchNorm
from jaxbn.linen._domain import DomainBatchNorm
from jaxbn.linen._prediction_time import prediction_time
from jaxbn.linen._reference import VirtualBatchNorm
from jaxbn.linen._renorm import BatchRenorm

__all__ = [
  "BatchNorm",
  "BatchRenorm",
  "ConditionalBatchNorm",
  "DomainBatchNorm",
  "VirtualBatchNorm",
  "prediction_time",
]
