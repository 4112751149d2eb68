"""Batch normalization in JAX: exact, synchronized, as pure functions and as Flax layers.

`batch_norm` is the whole layer as a function, and the other functions are its steps. `jaxbn.linen`
and `jaxbn.nnx` have the layers, `jaxbn.variants` and `jaxbn.alternatives` what grew out of batch
normalization. `jaxbn.surgery` works on networks that are there already; `diagnose`
says what is wrong with one.
"""

from typing import TYPE_CHECKING

from jaxbn._apply import normalize
from jaxbn._batch_norm import batch_norm
from jaxbn._measure import empty_moments, moments
from jaxbn._names import on_first_use
from jaxbn._share import merge, sync
from jaxbn._track import init, update
from jaxbn._types import Chosen, Moments, RunningStats

__all__ = [
  "Chosen",
  "Moments",
  "RunningStats",
  "batch_norm",
  "diagnose",
  "empty_moments",
  "init",
  "merge",
  "moments",
  "normalize",
  "sync",
  "update",
]
__version__ = "0.1.0"
_PACKAGES = ["alternatives", "diagnostics", "linen", "nnx", "surgery", "variants"]

if TYPE_CHECKING:
  from jaxbn import alternatives as alternatives
  from jaxbn import diagnostics as diagnostics
  from jaxbn import linen as linen
  from jaxbn import nnx as nnx
  from jaxbn import surgery as surgery
  from jaxbn import variants as variants
  from jaxbn.diagnostics import diagnose as diagnose
else:  # `import jaxbn` alone does not import Flax
  __getattr__ = on_first_use(
    __name__, {**{name: name for name in _PACKAGES}, "diagnose": "diagnostics"}
  )


def __dir__() -> list[str]:
  return [*__all__, *_PACKAGES, "__version__"]
