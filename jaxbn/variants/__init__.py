"""Variations of one step of batch normalization: a module for each."""

from typing import TYPE_CHECKING

from jaxbn._names import on_first_use

__all__ = [
  "conditional",
  "domain",
  "input_norm",
  "prediction_time",
  "recurrent",
  "reference",
  "renorm",
  "whitening",
]

if TYPE_CHECKING:
  from jaxbn.variants import (
    conditional,
    domain,
    input_norm,
    prediction_time,
    recurrent,
    reference,
    renorm,
    whitening,
  )
else:
  __getattr__ = on_first_use(__name__, {name: name for name in __all__})


def __dir__() -> list[str]:
  return __all__
