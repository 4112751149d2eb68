"""The whole layer as one pure function: measure, share, choose, apply, track."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax import lax

from jaxbn import _checks
from jaxbn._moments import accumulation_dtype, moments, sync, valid_elements
from jaxbn._normalize import normalize, result_dtype
from jaxbn._running import RunningStats, require_running_stats, update

if TYPE_CHECKING:
  import chex


def batch_norm(
  x: chex.Array,
  scale: chex.Array | None = None,
  bias: chex.Array | None = None,
  state: RunningStats | None = None,
  *,
  use_running_average: bool,
  axis: int | Sequence[int] = -1,
  momentum: chex.Numeric | None = 0.99,
  epsilon: float = 1e-5,
  mask: chex.Array | None = None,
  weights: chex.Array | None = None,
  masked_value: float | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  use_fast_variance: bool = True,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
  detach_stats: bool = False,
  dtype: Any = None,
) -> tuple[jax.Array, RunningStats | None]:
  r"""Batch normalization (Ioffe & Szegedy 2015, Algorithm 1 in training, 2 in evaluation).

      training     m = sync(moments(x))
                   y = normalize(x, m.mean, m.var)
                   new_state = update(state, m)
      evaluation   y = normalize(x, state.mean, state.var)

  each function as documented on its own. Pure: works under jit, vmap, scan, remat, pmap, shard_map
  and every derivative. Gradients flow through the batch's statistics, across devices as well.

  Accuracy: outputs are right to about u |mean|/std standard deviations (u = 6e-8 in float32) plus,
  for the variance, u ((mean - p)/std)^2 relative, where p is an element of the batch. With
  axis_name that holds for each device's own moments; they are then shared by one all-reduce around
  the running mean, so that p is the running mean in that step. In the first steps of training,
  while the running mean is still far from the batches', the variance may lose digits in data with
  |mean|/std above 100: debias=True ends that after one step, and use_fast_variance=False avoids it
  for a second small all-reduce.

  Args:
    x: real or complex array of any rank.
    scale: gamma, of the shape of x's channels, or None for 1.
    bias: beta, likewise, or None for 0.
    state: running statistics, from `init`. None in training: nothing is tracked, and sharing over
      axis_name takes two small all-reduces.
    use_running_average: False in training, True in evaluation; a Python bool.
    axis: the axis or axes of the channels.
    momentum, debias, unbiased, skip_nonfinite: as in `update`.
    epsilon: added to the variance.
    mask, weights: as in `moments`: which elements exist, and how often each counts.
    masked_value: what y holds in positions that do not exist (masked, or of weight 0), as in
      `normalize`.
    axis_name: name (or names) of the axis of pmap, shard_map or vmap whose members share
      statistics. Under jit with sharded arrays none is needed: the batch is the whole batch.
    axis_index_groups: as in `sync`.
    use_fast_variance: False takes a second pass over x, and a second small all-reduce.
    detach_stats: treat the statistics as constants in gradients. It exists to show what happens
      then (Ioffe & Szegedy 2015, section 2): training fails to converge as it should.
    dtype: of y; default, what x, scale and bias promote to.

  Returns:
    (y, new_state): y of x's shape; new_state with the leaves of state, in evaluation state itself.

  Raises:
    TypeError, ValueError: as the functions named above; state missing in evaluation;
      axis_index_groups without axis_name; use_running_average not a Python bool.

  >>> import jax, jax.numpy as jnp, jaxbn
  >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (64, 3))
  >>> state = jaxbn.init(3)
  >>> y, state = jaxbn.batch_norm(x, jnp.ones(3), jnp.zeros(3), state, use_running_average=False)
  >>> jnp.allclose(y.mean(0), 0, atol=1e-6) and jnp.allclose(y.std(0), 1, atol=1e-5)
  Array(True, dtype=bool)
  """
  x = _checks.inexact(x)
  _checks.momentum_in_range(momentum, debias)
  _check_options(x, state, axis, axis_name, axis_index_groups)
  dtype = result_dtype(dtype, x, scale, bias)
  # Once, here: cast by each step, the two parts of x's gradient would be rounded before they are
  # added, and they cancel.
  x = x.astype(accumulation_dtype(x.dtype))
  valid, _ = valid_elements(x, mask, weights)

  def apply(mean: chex.Array, var: chex.Array) -> jax.Array:
    return normalize(
      x,
      mean,
      var,
      scale,
      bias,
      epsilon=epsilon,
      axis=axis,
      mask=valid,
      masked_value=masked_value,
      dtype=dtype,
    )

  if _checks.static_bool("use_running_average", use_running_average):
    if state is None:
      raise ValueError("use_running_average=True needs the statistics: pass state.")
    return apply(state.mean, state.var), state

  batch = moments(x, axis, mask=mask, weights=weights, use_fast_variance=use_fast_variance)
  if axis_name is not None:
    pivot = state.mean if state is not None and use_fast_variance else None
    batch = sync(batch, axis_name, axis_index_groups, pivot=pivot)
  mean, var = batch.mean, batch.var
  if _checks.static_bool("detach_stats", detach_stats):
    mean, var = lax.stop_gradient((mean, var))
  y = apply(mean, var)
  if state is None:
    return y, None
  new_state = update(
    state,
    batch,
    momentum=momentum,
    debias=debias,
    unbiased=unbiased,
    skip_nonfinite=skip_nonfinite,
  )
  return y, new_state


def _check_options(
  x: jax.Array,
  state: RunningStats | None,
  axis: int | Sequence[int],
  axis_name: Any,
  axis_index_groups: Any,
) -> None:
  if axis_index_groups is not None and axis_name is None:
    raise ValueError(
      f"axis_index_groups={axis_index_groups!r} are groups of indices along axis_name, "
      "which is None: pass axis_name too."
    )
  if state is not None:
    require_running_stats(state)
    axes = _checks.split_axes(x.ndim, axis)
    _checks.channels("state.mean", state.mean, x, axes)
    _checks.channels("state.var", state.var, x, axes)
