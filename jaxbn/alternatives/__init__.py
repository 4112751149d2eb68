"""What reaches the ends of batch normalization by another way: a module for each."""

from typing import TYPE_CHECKING

from jaxbn._names import on_first_use

__all__ = [
  "gdnp",
  "normalizer_free",
  "path_sgd",
  "rewhitening",
  "rewhitening_optimizer",
  "weight_norm",
]

if TYPE_CHECKING:
  from jaxbn.alternatives import (
    gdnp,
    normalizer_free,
    path_sgd,
    rewhitening,
    rewhitening_optimizer,
    weight_norm,
  )
else:
  __getattr__ = on_first_use(__name__, {name: name for name in __all__})


def __dir__() -> list[str]:
  return __all__
