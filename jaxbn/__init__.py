"""Batch normalization in JAX: exact, synchronized, as pure functions and as Flax layers."""

import importlib
from types import ModuleType

from jaxbn._batch_norm import batch_norm
from jaxbn._choose import Chosen
from jaxbn._moments import Moments, empty_moments, moments
from jaxbn._normalize import normalize
from jaxbn._running import RunningStats, init, update
from jaxbn._share import merge, sync

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
  if name in ("alternatives", "linen", "nnx", "variants"):
    return importlib.import_module(f"jaxbn.{name}")
  raise AttributeError(f"module 'jaxbn' has no attribute {name!r}")
