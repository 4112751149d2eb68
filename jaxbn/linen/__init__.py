"""Flax Linen layers: they hold parameters and state, and call the functions."""

from typing import TYPE_CHECKING

from jaxbn._names import on_first_use

if TYPE_CHECKING:
  from jaxbn.linen._batch_norm import BatchNorm
  from jaxbn.linen._conditional import ConditionalBatchNorm
  from jaxbn.linen._domain import DomainBatchNorm
  from jaxbn.linen._input_norm import InputNormRNN
  from jaxbn.linen._normalizer_free import SkipInit, WSConv, WSDense
  from jaxbn.linen._prediction_time import prediction_time
  from jaxbn.linen._recurrent import GRUCell, LSTMCell
  from jaxbn.linen._reference import ReferenceBatchNorm
  from jaxbn.linen._renorm import BatchRenorm
  from jaxbn.linen._rewhitening import WhitenedConv, WhitenedDense
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
  "ReferenceBatchNorm",
  "SkipInit",
  "WSConv",
  "WSDense",
  "WeightNorm",
  "WhitenedConv",
  "WhitenedDense",
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
  "WSDense": "_normalizer_free",
  "WeightNorm": "_weight_norm",
  "WhitenedConv": "_rewhitening",
  "WhitenedDense": "_rewhitening",
  "WhiteningNorm": "_whitening",
  "prediction_time": "_prediction_time",
}

if not TYPE_CHECKING:
  __getattr__ = on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
  return __all__
