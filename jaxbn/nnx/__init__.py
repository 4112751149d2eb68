"""Flax NNX layers: they hold parameters and state, and call the functions."""

from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._conditional import ConditionalBatchNorm
from jaxbn.nnx._domain import DomainBatchNorm
from jaxbn.nnx._input_norm import InputNormRNN
from jaxbn.nnx._natural import WhitenedConv, WhitenedLinear, Whitening
from jaxbn.nnx._normalizer_free import SkipInit, WSConv, WSLinear
from jaxbn.nnx._prediction_time import prediction_time
from jaxbn.nnx._recurrent import GRUCell, LSTMCell
from jaxbn.nnx._reference import VirtualBatchNorm
from jaxbn.nnx._renorm import BatchRenorm
from jaxbn.nnx._weight_norm import MeanOnlyBatchNorm, WeightNorm
from jaxbn.nnx._whitening import WhiteningNorm

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
  "WSLinear",
  "WeightNorm",
  "WhitenedConv",
  "WhitenedLinear",
  "Whitening",
  "WhiteningNorm",
  "prediction_time",
]
