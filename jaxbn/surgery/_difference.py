"""How far the outputs of two programs are apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def difference(wanted: Any, given: Any) -> float:
  """The largest of two trees, each leaf relative to its largest element; NaN if one is."""
  found = [0.0]
  for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(given), strict=True):
    if jnp.issubdtype(a.dtype, jnp.inexact) and a.size:
      a, b = (np.asarray(v, np.complex128) for v in (a, b))
      apart, size = float(np.max(abs(a - b))), float(np.max(abs(a)))
      found.append(apart / size if apart else 0.0)
  return max(found, key=lambda v: np.inf if np.isnan(v) else v)
