"""Check: all that is refused and aligned before the first step, once, for every function.

What is refused and in which words is in `_checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _checks, _groups
from jaxbn._activation import hoist
from jaxbn._counts import are_reliabilities
from jaxbn._dtypes import accumulation_dtype, promoting, wide
from jaxbn._names import shown
from jaxbn._types import Array, Inputs, Numeric, Plan, RunningStats, Tracking


def check(
  x: Any,
  scale: Array | None = None,
  bias: Array | None = None,
  *,
  axis: int | Sequence[int] = -1,
  epsilon: float = 1e-5,
  mask: Array | None = None,
  weights: Array | None = None,
  masked_value: float | None = None,
  activation: Callable[[jax.Array], jax.Array] | None = None,
  residual: Array | None = None,
  dtype: Any = None,
  mean: Array | None = None,
) -> tuple[Plan, Inputs]:
  """The arguments of x, its elements and y, as the steps take them."""
  x = _checks.inexact(x)
  axes = _checks.split_axes(x.ndim, axis)
  _checks.epsilon_in_range(epsilon)
  dtype = _checks.result_dtype(dtype, mean, x=x, scale=scale, bias=bias, residual=residual)
  valid, weight = valid_elements(x, mask, weights)
  if masked_value is not None:
    _checks.masked_value(masked_value, valid)
  sum_dtype = accumulation_dtype(x.dtype)
  inputs = Inputs(
    x,
    x.astype(sum_dtype),
    valid,
    weight,
    None if scale is None else _checks.channels("scale", scale, x, axes, or_per_example=True),
    None if bias is None else _checks.channels("bias", bias, x, axes, or_per_example=True),
    None if residual is None else _checks.same_shape("residual", residual, x),
    jnp.asarray(epsilon, jnp.finfo(sum_dtype).dtype),
    masked_value=None if masked_value is None else jnp.asarray(masked_value, dtype),
  )
  plan = Plan(axes, sum_dtype, dtype)
  return (plan, inputs) if activation is None else _hoisted(plan, inputs, activation, mean)


def _hoisted(
  plan: Plan, inputs: Inputs, activation: Any, mean: Array | None
) -> tuple[Plan, Inputs]:
  """With an activation that is a function of arrays alone."""
  parts = inputs.wide_x, mean, inputs.scale, inputs.bias, wide(inputs.residual)
  dtype = promoting(jnp.result_type)(*(v for v in parts if v is not None))
  hoisted = hoist("activation", activation, inputs.wide_x.astype(dtype), plan.dtype)
  plan = plan._replace(
    activation=hoisted.function, activation_dtype=dtype, activation_lasts=hoisted.lasts
  )
  return plan, inputs._replace(constants=hoisted.constants)


def check_layer(
  x: Any,
  scale: Array | None,
  bias: Array | None,
  state: Any,
  *,
  use_running_average: bool,
  momentum: Numeric | None = 0.99,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
  use_fast_variance: bool = True,
  detach_stats: bool = False,
  weights: Array | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  virtual_batch_size: int | str | None = None,
  choose: Any = None,
  **of_x_and_y: Any,
) -> tuple[Plan, Inputs, Tracking]:
  """`check`, and what a layer has more: two modes, running statistics, devices that share."""
  if not (choose is None or callable(choose)):
    raise TypeError(
      f"choose={shown(choose)} is not a function: pass one of the batch's moments and the state, "
      "which gives a jaxbn.Chosen, or leave it out."
    )
  _checks.momentum_in_range(momentum, debias)
  if virtual_batch_size is not None:
    _groups.require_size(virtual_batch_size, axis_index_groups)
  evaluating = _checks.static_bool("use_running_average", use_running_average)
  if evaluating and state is None:
    raise ValueError("use_running_average=True needs the statistics: pass state.")
  mean = getattr(state, "mean", None) if evaluating else None
  plan, inputs = check(x, scale, bias, mean=mean, weights=weights, **of_x_and_y)
  if evaluating:
    return plan._replace(use_running_average=True), inputs, Tracking()

  _checks.nonempty(inputs.x, plan.axes)
  axis_name, members = _checks.sharing(axis_name, axis_index_groups)
  unbiased = _checks.static_bool("unbiased", unbiased)
  plan = plan._replace(
    use_fast_variance=_checks.static_bool("use_fast_variance", use_fast_variance),
    detach_stats=_checks.static_bool("detach_stats", detach_stats),
    axis_name=axis_name,
    axis_index_groups=members,
    count_by_worth=unbiased and are_reliabilities(weights),
  )
  if virtual_batch_size is not None:
    plan = plan._replace(groups=_groups.groups(virtual_batch_size, plan, inputs.x))
  skip_nonfinite = _checks.static_bool("skip_nonfinite", skip_nonfinite)
  return plan, inputs, Tracking(momentum, debias, unbiased, skip_nonfinite)


def check_state(state: Any, plan: Plan, x: jax.Array, tracking: Tracking) -> RunningStats | None:
  """The running statistics of x's channels; None where nothing is tracked."""
  if state is None:
    return None
  state = _checks.running_stats(state)
  _checks.channels("state.mean", state.mean, x, plan.axes)
  _checks.channels("state.var", state.var, x, plan.axes)
  _checks.has_count(state, tracking.momentum, tracking.debias)
  return state


def valid_elements(
  x: jax.Array, mask: Array | None, weights: Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
  """Which elements of x exist, and their weights, aligned with x; None where all do, or weigh 1.

  A weight of 0 is a mask, and what is masked weighs 0.
  """
  valid = None if mask is None else _checks.boolean_mask(mask, x)
  if weights is None:
    return valid, None
  weight = _checks.nonnegative_weights(weights, x)
  weight = weight.astype(accumulation_dtype(jnp.finfo(x.dtype).dtype))
  valid = weight > 0 if valid is None else valid & (weight > 0)
  return valid, jnp.where(valid, weight, 0)
