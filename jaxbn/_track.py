"""Track: the running statistics of one layer, from those of its batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._counts import occupied, where
from jaxbn._dtypes import promoting
from jaxbn._names import by_our_names
from jaxbn._types import Moments, Numeric, RunningStats, Tracking


@by_our_names
def init(
  shape: int | Sequence[int],
  *,
  momentum: float | None = 0.99,
  debias: bool = False,
  dtype: Any = jnp.float32,
) -> RunningStats:
  """Running statistics before the first batch: mean 0, variance 1, as in Flax.

  Args:
    shape: the channels' shape; an integer n means (n,).
    momentum: as it will be given to `update`; None (cumulative) adds the leaf `count`.
    debias: as it will be given to `update`; True adds the leaf `count`.
    dtype: dtype of mean, real or complex; var has its real part's. Half precision is for the start
      only: `update` gives float32.

  Returns:
    RunningStats.

  Raises:
    ValueError: momentum out of range, or debias where it cannot be.

  >>> import jaxbn
  >>> jaxbn.init(2)
  RunningStats(mean=Array([0., 0.], dtype=float32), var=Array([1., 1.], dtype=float32), count=None)
  """
  _checks.momentum_in_range(momentum, debias)
  mean = jnp.zeros(_checks.channel_shape(shape), dtype)
  count = jnp.zeros_like(mean, jnp.float32) if debias or momentum is None else None
  return RunningStats(mean, jnp.ones_like(mean.real), count)


@by_our_names
def update(
  state: RunningStats,
  moments: Moments,
  *,
  momentum: Numeric | None = 0.99,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
) -> RunningStats:
  r"""The running statistics after one more batch.

  For each of mean and var, with g the gain of the t-th update of a channel:

      new = (1 - g) old + g batch

      exponential     g = 1 - momentum                        (Flax)
      debias=True     g = (1 - momentum) / (1 - momentum^t)   (Kingma & Ba 2015, section 3)
      momentum=None   g = 1 / t, the plain average over the batches (PyTorch's cumulative one)

  The debiased form keeps the corrected average itself, not the raw one: its first update replaces
  the initial values by the batch's, and any reader of `mean` and `var` has them right at any time.

  Args:
    state: from `init` with the same momentum and debias.
    moments: the batch's (of all devices). A channel whose count is zero stays as it was.
    momentum: the share of the old value that is kept, from 0 to 1; None for a cumulative average.
      PyTorch's momentum is the share of the batch, 1 minus this: its 0.1 is 0.9 here.
    debias: remove the weight of the initial values. A traced momentum must then be below 1.
    unbiased: multiply the batch's variance by n / (n - 1), n its count, as PyTorch does; a channel
      with n <= 1 keeps the factor 1. The sum of weights is such a count where these say how often
      an element is there. Where they say how far it can be relied on (a softmax), give moments
      whose count is what they are worth, n = (sum w)^2 / sum w^2, so that the factor is
      1 / (1 - sum w^2 / (sum w)^2): `batch_norm` does so for floating-point weights.
    skip_nonfinite: a channel whose batch mean or variance is not finite stays as it was.

  Returns:
    RunningStats with the same leaves, of float32 at least: half precision cannot hold an average
    whose steps are below its rounding. Dtypes promote as in Flax Linen (a real mean becomes complex
    with a complex batch); so the carry of a scan starts in what its batches have.

  Raises:
    TypeError: a state or moments of another type; a momentum or a flag that is not one.
    ValueError: different channels' shapes; momentum out of range; debias or momentum=None with a
      state that has no count.

  >>> import jax.numpy as jnp, jaxbn
  >>> batch = jaxbn.moments(jnp.array([[1.0], [3.0]]))
  >>> jaxbn.update(jaxbn.init(1), batch, momentum=0.75).mean.tolist()
  [0.5]
  """
  state = _checks.running_stats(state)
  _checks.is_moments(moments)
  _checks.momentum_in_range(momentum, debias)
  if jnp.shape(state.mean) != jnp.shape(moments.mean):
    raise ValueError(
      f"state has channels of shape {jnp.shape(state.mean)}, but the batch's moments "
      f"{jnp.shape(moments.mean)}: make the state with jaxbn.init{jnp.shape(moments.mean)}."
    )
  _checks.has_count(state, momentum, debias)
  unbiased = _checks.static_bool("unbiased", unbiased)
  skip_nonfinite = _checks.static_bool("skip_nonfinite", skip_nonfinite)
  return track(state, moments, Tracking(momentum, debias, unbiased, skip_nonfinite))


def track(state: RunningStats, moments: Moments, tracking: Tracking) -> RunningStats:
  """`update` of arguments that have been checked."""
  # In float32 it stops at 2^24, where one more batch is below the last place of any average.
  old_count = None if state.count is None else jax.lax.stop_gradient(jnp.asarray(state.count))
  count = None if old_count is None else old_count + 1
  keep, gain = shares(tracking, count, moments.var.dtype)
  mean, var = moments.mean, unbiased_variance(moments) if tracking.unbiased else moments.var
  usable = occupied(moments.count)
  if tracking.skip_nonfinite:
    usable = usable & jnp.isfinite(mean) & jnp.isfinite(var)

  new_count = None if count is None or old_count is None else where(usable, count, old_count)
  both = functools.partial(blend, keep, gain, usable)
  return RunningStats(both(state.mean, mean), both(state.var, var), new_count)


def blend(keep: Any, gain: Any, usable: Any, old: jax.Array, batch: jax.Array) -> jax.Array:
  """keep * old + gain * batch where that is usable, else old."""
  with jax.numpy_dtype_promotion("standard"):
    # In float32 at least: in bfloat16 0.99 is 0.988, and what is added is soon rounded away.
    wide = old.astype(jnp.promote_types(jnp.promote_types(old.dtype, jnp.float32), batch.dtype))
    if usable is True:
      return keep * wide + gain * batch
    # Selected twice: an unusable value must reach neither the result nor a gradient.
    return where(usable, keep * wide + gain * where(usable, batch, 0), wide)


def shares(tracking: Tracking, count: jax.Array | None, dtype: Any) -> tuple[Numeric, Numeric]:
  """How much of the old value is kept, and how much of the batch's is added: they sum to one."""
  momentum = tracking.momentum
  if momentum is not None and not isinstance(momentum, jax.Array):
    momentum = float(momentum)  # a NumPy number would impose its own precision
  if momentum is not None and not tracking.debias:
    return momentum, 1 - momentum
  assert count is not None
  t = count.astype(dtype)
  if momentum is None:
    return 1 - 1 / t, 1 / t
  # 1 - momentum^t without cancellation where momentum is near 1.
  log: Any = jnp.log(momentum) if isinstance(momentum, jax.Array) else _log(momentum)
  gain = (1 - momentum) / -jnp.expm1(t * log)
  return 1 - gain, gain


def without_initial_values(state: RunningStats, momentum: float, updates: int) -> RunningStats:
  """Exponential averages as `debias` keeps them: those of `init` weigh nothing any more."""
  gained = -math.expm1(updates * _log(momentum))
  return state._replace(mean=state.mean / gained, var=(state.var - (1 - gained)) / gained)


def _log(momentum: float) -> float:
  return math.log(momentum) if momentum > 0 else -math.inf


@promoting
def unbiased_variance(moments: Moments) -> jax.Array:
  """var n / (n - 1); with n <= 1 var itself, up to the rounding of what one weight is worth."""
  n = jnp.asarray(moments.count, moments.var.dtype)
  several = n > 1 + 4 * jnp.finfo(n.dtype).eps
  return moments.var * jnp.where(several, n / jnp.where(several, n - 1, 1), 1)
