r"""The whole layer in the equations of the papers, for JAX to differentiate: no rule, no pivot.

      mean = sum_i s_i x_i,   var = sum_i s_i |x_i - mean|^2            s_i = w_i / sum w
      y    = activation((x - mean) / sqrt(var + epsilon) * scale + bias + residual)
      new  = old + gain (batch - old)

It is evaluated in float64 by tests/rounding.py. Given a pivot p it has instead, from d = x - p,

      mean = p + sum_i s_i d_i,   var = sum_i s_i |d_i|^2 - |mean - p|^2

which is the same but for its rounding: that bounds what rounding does to any p that is as near.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


class Setting(NamedTuple):
  """What is known of a layer beside its arrays."""

  axes: tuple[int, ...]  # of the channels
  examples: int | None  # the axis that is cut into groups; None: no axis is reduced
  groups: int = 1
  training: bool = True
  epsilon: float = 1e-5
  activation: str | None = None
  masked_value: float | None = None
  detach: bool = False
  choose: str | None = None


def channels(v, setting, ndim):
  """What is per channel, aligned with x."""
  return jnp.expand_dims(v, tuple(a for a in range(ndim) if a not in setting.axes))


def split(v, setting):
  """What is of x's shape, with an axis of groups before that of the examples."""
  e = setting.examples
  if e is None:
    return v
  return v.reshape(*v.shape[:e], setting.groups, v.shape[e] // setting.groups, *v.shape[e + 1 :])


def reduced(setting, ndim):
  """The axes of a split array that statistics are taken over."""
  e = setting.examples
  return tuple(a + (a >= e) for a in range(ndim) if e is not None and a not in setting.axes)


def abs_square(v):
  return v.real * v.real + v.imag * v.imag if jnp.iscomplexobj(v) else v * v


def activate(name, z, held):
  if name is None:
    return z
  if name == "held":
    return z + 0.25 * held * z * z
  return {
    "relu": lambda z: jnp.where(z > 0, z, 0 * z),  # NaN stays
    "tanh": jnp.tanh,
    "silu": lambda z: z * (1 + jnp.tanh(z / 2)) / 2,
  }[name](z)


def statistics(x, setting, known, over, pivot):
  """Mean and variance of each group, which broadcast against split x."""

  def total(v):
    return jnp.sum(known["share"] * jnp.where(known["valid"], v, 0), over, keepdims=True)

  if pivot is None:
    mean = total(x)
    return mean, total(abs_square(x - mean))
  from_pivot = total(x - pivot)
  mean = jnp.where(known["occupied"], pivot + from_pivot, 0)
  return mean, total(abs_square(x - pivot)) - abs_square(from_pivot)


def choose(how, mean, var, state_mean, state_var):
  """Mean, variance, and the correction of the result."""
  if how == "halfway":
    return (mean + state_mean) / 2, (var + state_var) / 2, 1, 0
  if how == "corrected":
    return mean, var, 1 + state_var / 8, state_mean / 8
  return mean, var, 1, 0


def layer(setting, params, known, pivot=None) -> dict[str, Any]:
  """y and the new mean and var, from

  Args:
    setting: all that is no array.
    params: x, and those there are of scale, bias, residual and held, in the shapes that jaxbn has.
    known: split and aligned with x: share and valid, kept (False: x counts as the mean in y, and
      residual_kept: it counts as 0), occupied, of_group (each group's share in what is tracked),
      factor (of the variance); per channel: usable (whether it is tracked), gain, and the state's
      mean and var.
    pivot: aligned with split x, or None.
  """
  ndim = params["x"].ndim
  shape, over = params["x"].shape, reduced(setting, ndim)
  aligned = {}
  for name, v in params.items():
    v = v if v.ndim == ndim else channels(v, setting, ndim)
    aligned[name] = split(jnp.broadcast_to(v, shape), setting)
  old = {k: channels(known[k], setting, ndim) for k in ("mean", "var")}
  state = {k: v if not over else jnp.expand_dims(v, setting.examples) for k, v in old.items()}
  x, mean, var = aligned["x"], state["mean"], state["var"]
  if setting.training:
    mean, var = batch = statistics(x, setting, known, over, pivot)
    if setting.detach:
      mean, var = lax.stop_gradient(batch)
    mean, var, r, shift = choose(setting.choose, mean, var, state["mean"], state["var"])
  else:
    r, shift = 1, 0
  z = jnp.where(known["kept"], x - mean, 0) / jnp.sqrt(var + setting.epsilon) * r + shift
  z = z * aligned.get("scale", 1) + aligned.get("bias", 0)
  if "residual" in aligned:
    z = z + jnp.where(known["residual_kept"], aligned["residual"], 0)
  y = activate(setting.activation, z, aligned.get("held"))
  if setting.masked_value is not None:
    y = jnp.where(known["valid"], y, setting.masked_value)
  results = {"y": y.reshape(shape), "mean": known["mean"], "var": known["var"]}
  if setting.training:
    of_batch = {"mean": batch[0], "var": batch[1] * known["factor"]}
    for name, v in of_batch.items():
      tracked = jnp.sum(v * known["of_group"], setting.examples if over else ())
      tracked = tracked.reshape(known[name].shape)
      new = known[name] + known["gain"] * (tracked - known[name])
      results[name] = jnp.where(known["usable"], new, known[name])
  return results | {"resolution": var + setting.epsilon}
