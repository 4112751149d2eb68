"""Batch normalization in JAX: exact, synchronized, as pure functions and as Flax layers."""

import importlib
from types import ModuleType

from jaxbn._apply import normalize
from jaxbn._batch_norm import batch_norm
from jaxbn._measure import empty_moments, moments
from jaxbn._share import merge, sync
from jaxbn._track import init, update
from jaxbn._types import Chosen, Moments, RunningStats

__all__ = [
  "Chosen",
  "Moments",
  "RunningStats",
  "batch_norm",
  "empty_moments",
  "init",
  "merge",
  "moments",
  "normalize",
  "sync",
  "update",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
  # On first use: `import jaxbn` alone does not import Flax.
  if name in ("alternatives", "linen", "nnx", "surgery", "variants"):
    return importlib.import_module(f"jaxbn.{name}")
  raise AttributeError(f"module 'jaxbn' has no attribute {name!r}")
