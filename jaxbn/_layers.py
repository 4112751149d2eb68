"""What the Flax layers of both kinds do alike: hand their fields to `batch_norm`.

An option added here is in both. Flax itself is not imported: the layers are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._batch_norm import batch_norm
from jaxbn._types import Array, RunningStats

# The fields that have the name and the meaning of an argument of batch_norm.
_OPTIONS = (
  "axis",
  "momentum",
  "epsilon",
  "use_fast_variance",
  "debias",
  "unbiased",
  "skip_nonfinite",
  "detach_stats",
  "activation",
  "choose",
)


def call(
  layer: Any,
  x: jax.Array,
  scale: Array | None,
  bias: Array | None,
  state: RunningStats,
  *,
  mask: Array | None = None,
  weights: Array | None = None,
  residual: Array | None = None,
  function: Callable[..., tuple[jax.Array, RunningStats | None]] = batch_norm,
  **arguments: Any,
) -> tuple[jax.Array, RunningStats | None]:
  """`batch_norm` with the layer's options and those arguments on which the two kinds differ.

  Or another function of the same arguments, for a layer that is derived.
  """
  options = {name: getattr(layer, name) for name in _OPTIONS}
  if mask is not None or weights is not None:
    options["masked_value"] = layer.masked_value
  if mask is not None:
    options["mask"] = jnp.asarray(mask, bool)  # any dtype will do in Flax
  options |= arguments
  return function(x, scale, bias, state, weights=weights, residual=residual, **options)
