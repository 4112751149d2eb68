"""Choose: which statistics normalize, where it is not simply the batch's or the running ones."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from jaxbn import _checks
from jaxbn._names import shown
from jaxbn._types import Choose, Chosen, Moments, Plan, RunningStats


def choose(
  plan: Plan, x: jax.Array, by: Choose | None, batch: Moments, state: RunningStats | None
) -> Chosen:
  """What a function `by` makes of the batch's moments and the state, or else the batch's own."""
  if plan.detach_stats:
    batch = batch._replace(mean=lax.stop_gradient(batch.mean), var=lax.stop_gradient(batch.var))
  if by is None:
    return Chosen(batch.mean, batch.var)
  chosen = by(batch, state)
  if not isinstance(chosen, Chosen):
    raise TypeError(
      f"choose={shown(by)} gave a {type(chosen).__name__}; it has to give a "
      "jaxbn.Chosen(mean, var)."
    )

  def checked(name: str) -> Any:
    value = getattr(chosen, name)
    if value is None and name in ("scale", "bias"):
      return None
    return _checks.channels(f"{name} of choose", value, x, plan.axes, or_per_example=True)

  mean, var, scale, bias = map(checked, Chosen._fields)
  return Chosen(mean, var.real, scale, bias)
