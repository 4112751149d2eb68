r"""Batch renormalization (Ioffe 2017): training normalizes by nearly what evaluation will.

      z = (x - mean_B) / sigma_B * r + d,     y = z * scale + bias

  r = clip(sigma_B / sigma, 1 / r_max, r_max)             sigma_B = sqrt(var_B + epsilon)
  d = clip((mean_B - mean) / sigma, -d_max, d_max)        sigma   = sqrt(var + epsilon)

with mean_B and var_B of the batch, and mean and var running, as they were before it. Without
clipping z = (x - mean) / sigma, which depends on no other example of the batch. r and d are
constants to the derivative, so that it goes through the batch's statistics as in batch
normalization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks
from jaxbn._batch_norm import batch_norm
from jaxbn._names import by_our_names, shown
from jaxbn._types import Array, Choose, Chosen, Moments, Numeric, RunningStats

__all__ = ["batch_renorm", "correction"]


def __dir__() -> list[str]:
  return __all__


# What a layer takes: a number, or a function of the step that gives one.
Limit: TypeAlias = "float | Callable[[Any], Numeric]"


@by_our_names
def batch_renorm(
  x: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  state: RunningStats | None = None,
  *,
  use_running_average: bool,
  r_max: Numeric = 3.0,
  d_max: Numeric = 5.0,
  epsilon: float = 1e-5,
  **options: Any,
) -> tuple[jax.Array, RunningStats | None]:
  r"""Batch renormalization (Ioffe 2017, Algorithm 1): `jaxbn.batch_norm`, corrected in training.

      z = (x - mean_B) / sigma_B * r + d,     y = z * scale + bias
      r = clip(sigma_B / sigma, 1 / r_max, r_max),    sigma = sqrt(var + epsilon), of each
      d = clip((mean_B - mean) / sigma, -d_max, d_max)

  with the batch's mean_B and sigma_B (of all devices, or of each virtual batch), and the state's
  mean and sigma before its update. r and d have no gradient, not even to r_max, d_max and state.
  For complex x, whose d is complex, it is |d| that is at most d_max.

  r_max = 1 and d_max = 0 is batch normalization. The paper starts so, for 5,000 steps in which the
  running statistics come near those of the data, and then lets r_max grow to 3 by step 40,000 and
  d_max to 5 by step 25,000 (section 4). Its running statistics move by 0.01 in each step (momentum
  0.99): they are used in training and have to follow the weights, so that they should move faster
  than evaluation alone would have it.

  A channel of two elements has the output it should have, but no gradient comes through to x: for a
  fixed r and d the output is d ± r, whatever x is. So batches of two examples need channels with
  several positions.

  One thing differs from the paper, and from Keras's renorm=True: the running variance is averaged
  as in `jaxbn.update`, not the running sigma, so that the state is batch normalization's. Where
  batches are small, sigma is larger that way (by Jensen's inequality), and r smaller.

  Args:
    x: real or complex array of any rank.
    scale: gamma, as in `jaxbn.batch_norm`, or None for 1.
    bias: beta, likewise, or None for 0.
    state: running statistics, from `jaxbn.init`; also needed in training.
    use_running_average: False in training, True in evaluation, which is batch normalization's.
    r_max: number from 1 on; it may be traced, such as the value of a schedule.
    d_max: number from 0 on, likewise.
    epsilon: added to both variances.
    options: of `jaxbn.batch_norm`, each with its meaning there: axis, momentum, mask, weights,
      masked_value, axis_name, axis_index_groups, virtual_batch_size, use_fast_variance, debias,
      unbiased, skip_nonfinite, detach_stats, activation, residual, dtype. Not choose, which is
      taken.

  Returns:
    (y, new_state), as `jaxbn.batch_norm`.

  Raises:
    TypeError: an unknown option; r_max or d_max not a real number.
    ValueError: r_max below 1, d_max below 0 (where they are known when tracing), or not a scalar;
      state missing; whatever `jaxbn.batch_norm` refuses.

  >>> import jax, jax.numpy as jnp, jaxbn
  >>> from jaxbn.variants.renorm import batch_renorm
  >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (4, 3))
  >>> state = jaxbn.RunningStats(mean=jnp.full(3, 5.0), var=jnp.full(3, 4.0))
  >>> y, _ = batch_renorm(x, state=state, use_running_average=False)
  >>> evaluated, _ = batch_renorm(x, state=state, use_running_average=True)
  >>> jnp.allclose(y, evaluated, atol=1e-5)  # nothing was clipped
  Array(True, dtype=bool)
  """
  choose = correction(r_max, d_max, epsilon)
  return batch_norm(
    x,
    scale,
    bias,
    state,
    use_running_average=use_running_average,
    epsilon=epsilon,
    choose=choose,
    **options,
  )


def correction(r_max: Numeric, d_max: Numeric, epsilon: float = 1e-5) -> Choose:
  """What makes `jaxbn.batch_norm` renormalize: its argument `choose`.

      r = clip(sigma_B / sigma, 1 / r_max, r_max)
      d = clip((mean_B - mean) / sigma, -d_max, d_max)

  Args:
    r_max: number from 1 on, may be traced.
    d_max: number from 0 on, likewise.
    epsilon: added to both variances; give `jaxbn.batch_norm` the same.

  Returns:
    A function of the batch's `Moments` and the state, which gives a `Chosen` of the batch's mean
    and variance with r and d as its scale and bias. Without a state it raises ValueError.

  Raises:
    TypeError, ValueError: as `batch_renorm`.

  >>> import jax.numpy as jnp, jaxbn
  >>> from jaxbn.variants.renorm import correction
  >>> batch = jaxbn.moments(jnp.array([[2.0], [6.0]]))  # mean 4, variance 4
  >>> chosen = correction(r_max=1.5, d_max=5.0)(batch, jaxbn.init(1))
  >>> chosen.scale.tolist(), chosen.bias.round(3).tolist()
  ([1.5], [4.0])
  """
  _bounded("r_max", r_max, 1, "r is clipped to 1 / r_max and r_max, and 1 means r = 1")
  _bounded("d_max", d_max, 0, "d is clipped to -d_max and d_max, and 0 means d = 0")
  _checks.epsilon_in_range(epsilon)

  def choose(batch: Moments, state: RunningStats | None) -> Chosen:
    if state is None:
      raise ValueError(
        "batch renormalization compares the batch with the running statistics, in training too: "
        "pass state, at first jaxbn.init(...)."
      )
    dtype = batch.var.dtype  # float32 at least, whatever the state's
    sigma_batch = jnp.sqrt(batch.var + epsilon)
    sigma = jnp.sqrt(jnp.asarray(state.var).astype(dtype) + epsilon)
    largest = jnp.asarray(r_max, dtype)
    r = jnp.clip(sigma_batch / sigma, 1 / largest, largest)
    d = _clip_length((batch.mean - state.mean) / sigma, jnp.asarray(d_max, dtype))
    return Chosen(batch.mean, batch.var, lax.stop_gradient(r), lax.stop_gradient(d))

  return choose


def is_scheduled(*limits: Limit) -> bool:
  """Whether a layer with these limits has to count its steps."""
  return any(map(callable, limits))


def choose_of(layer: Any, step: Any) -> Choose:
  """The `choose` of a layer in one of its steps."""
  if layer.choose is not None:
    raise ValueError(
      f"choose={layer.choose!r} in a {type(layer).__name__}, which chooses by itself: use "
      "BatchNorm with it, or leave it out."
    )

  def now(limit: Limit) -> Any:
    return limit(jnp.asarray(step, jnp.int32)) if callable(limit) else limit

  return correction(now(layer.r_max), now(layer.d_max), layer.epsilon)


def _clip_length(d: jax.Array, limit: jax.Array) -> jax.Array:
  """d, at most `limit` long."""
  if not jnp.iscomplexobj(d):
    return jnp.clip(d, -limit, limit)
  length = jnp.abs(d)
  return d * jnp.where(length > limit, limit / jnp.where(length > 0, length, 1), 1)


def _bounded(name: str, value: Any, least: int, meaning: str) -> None:
  """Refuses a limit that is no number, or too small where that can be seen."""
  if callable(value):
    raise TypeError(
      f"{name}={shown(value)} is a function; here it is a number: pass the schedule's value, "
      f"{name}(step), or give the schedule to a layer, jaxbn.linen.BatchRenorm or jaxbn.nnx's."
    )
  _checks.scalar(name, value)
  if _checks.concrete(value) and not float(value) >= least:
    raise ValueError(f"{name}={shown(value)} is out of range: {meaning}: pass {least} or more.")
