"""Trained networks, as they are: find the layers, and work on them, for Flax Linen and NNX."""

from typing import TYPE_CHECKING

from jaxbn._names import on_first_use

if TYPE_CHECKING:
  from jaxbn.surgery import stats as stats
  from jaxbn.surgery._adapt import adapt
  from jaxbn.surgery._entropy import minimize_entropy
  from jaxbn.surgery._find import find
  from jaxbn.surgery._fold import fold
  from jaxbn.surgery._foreign import Foreign
  from jaxbn.surgery._freeze import freeze
  from jaxbn.surgery._insert import Inserted, insert
  from jaxbn.surgery._labels import decay_mask, param_labels
  from jaxbn.surgery._layer import Layer
  from jaxbn.surgery._recalibrate import recalibrate
  from jaxbn.surgery._replace import replace, replaced

__all__ = [
  "Foreign",
  "Inserted",
  "Layer",
  "adapt",
  "decay_mask",
  "find",
  "fold",
  "freeze",
  "insert",
  "minimize_entropy",
  "param_labels",
  "recalibrate",
  "replace",
  "replaced",
  "stats",
]
# Imported on first use: no verb needs another.
_HOMES = {
  "Foreign": "_foreign",
  "Inserted": "_insert",
  "Layer": "_layer",
  "adapt": "_adapt",
  "decay_mask": "_labels",
  "find": "_find",
  "fold": "_fold",
  "freeze": "_freeze",
  "insert": "_insert",
  "minimize_entropy": "_entropy",
  "param_labels": "_labels",
  "recalibrate": "_recalibrate",
  "replace": "_replace",
  "replaced": "_replace",
  "stats": "stats",
}

if not TYPE_CHECKING:
  __getattr__ = on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
  return __all__
