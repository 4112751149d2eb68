"""Flax Linen layers: they hold parameters and state, and call the functions."""

from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._conditional import ConditionalBatchNorm
from jaxbn.linen._domain import DomainBatchNorm
from jaxbn.linen._input_norm import InputNormRNN
from jaxbn.linen._natural import WhitenedConv, WhitenedDense
from jaxbn.linen._normalizer_free import SkipInit, WSConv, WSDense
from jaxbn.linen._prediction_time import prediction_time
from jaxbn.linen._recurrent import GRUCell, LSTMCell
from jaxbn.linen._reference import VirtualBatchNorm
from jaxbn.linen._renorm import BatchRenorm
from jaxbn.linen._weight_norm import MeanOnlyBatchNorm, WeightNorm
from jaxbn.linen._whitening import WhiteningNorm

__all__ = [
  "BatchNorm",
  "BatchRenorm",
  "ConditionalBatchNorm",
  "DomainBatchNorm",
  "GRUCell",
  "InputNormRNN",
  "LSTMCell",
  "MeanOnlyBatchNorm",
  "SkipInit",
  "VirtualBatchNorm",
  "WSConv",
  "WSDense",
  "WeightNorm",
  "WhitenedConv",
  "WhitenedDense",
  "WhiteningNorm",
  "prediction_time",
]
