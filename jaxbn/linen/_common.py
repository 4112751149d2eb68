"""What the Linen layers with running statistics do alike."""

from __future__ import annotations

import flax.linen as nn

from jaxbn._running import needs_count


def has_count(layer: nn.Module, momentum: float | None, debias: bool, evaluating: bool) -> bool:
  """Whether the layer has the leaf `count` in `batch_stats`.

  Statistics without one, such as Flax's, will do for evaluation, which does not read it; training
  on would begin to count at 0, and forget them.
  """
  if not needs_count(momentum, debias):
    return False
  started = layer.has_variable("batch_stats", "mean")
  if not started or layer.has_variable("batch_stats", "count"):
    return True
  if not evaluating:
    raise ValueError(
      f"batch_stats of {'/'.join(layer.path) or 'the layer'} has a mean but no count, which "
      "debias=True and momentum=None need in training: it was saved without that option. Add the "
      "leaf, for instance count=jnp.full(mean.shape, updates_so_far, jnp.float32), or leave the "
      "option out."
    )
  return False
