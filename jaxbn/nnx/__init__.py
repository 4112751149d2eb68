"""Flax NNX layers: they hold parameters and state, and call the functions."""

from typing import TYPE_CHECKING

from jaxbn._names import on_first_use

if TYPE_CHECKING:
  from jaxbn.nnx._batch_norm import BatchNorm
  from jaxbn.nnx._conditional import ConditionalBatchNorm
  from jaxbn.nnx._domain import DomainBatchNorm
  from jaxbn.nnx._input_norm import InputNormRNN
  from jaxbn.nnx._normalizer_free import SkipInit, WSConv, WSLinear
  from jaxbn.nnx._prediction_time import prediction_time
  from jaxbn.nnx._recurrent import GRUCell, LSTMCell
  from jaxbn.nnx._reference import ReferenceBatchNorm
  from jaxbn.nnx._renorm import BatchRenorm
  from jaxbn.nnx._rewhitening import WhitenedConv, WhitenedLinear, Whitening
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
  "ReferenceBatchNorm",
  "SkipInit",
  "WSConv",
  "WSLinear",
  "WeightNorm",
  "WhitenedConv",
  "WhitenedLinear",
  "Whitening",
  "WhiteningNorm",
  "prediction_time",
]
# Imported on first use: to define a layer takes Flax a millisecond or more.
_HOMES = {
  "BatchNorm": "_batch_norm",
  "BatchRenorm": "_renorm",
  "ConditionalBatchNorm": "_conditional",
  "DomainBatchNorm": "_domain",
  "GRUCell": "_recurrent",
  "InputNormRNN": "_input_norm",
  "LSTMCell": "_recurrent",
  "MeanOnlyBatchNorm": "_weight_norm",
  "ReferenceBatchNorm": "_reference",
  "SkipInit": "_normalizer_free",
  "WSConv": "_normalizer_free",
  "WSLinear": "_normalizer_free",
  "WeightNorm": "_weight_norm",
  "WhitenedConv": "_rewhitening",
  "WhitenedLinear": "_rewhitening",
  "Whitening": "_rewhitening",
  "WhiteningNorm": "_whitening",
  "prediction_time": "_prediction_time",
}

if not TYPE_CHECKING:
  __getattr__ = on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
  return __all__
