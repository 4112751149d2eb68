"""Apply: the formula that normalizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks
from jaxbn._moments import accumulation_dtype

if TYPE_CHECKING:
  import chex


def normalize(
  x: chex.Array,
  mean: chex.Array,
  var: chex.Array,
  scale: chex.Array | None = None,
  bias: chex.Array | None = None,
  *,
  epsilon: float = 1e-5,
  axis: int | Sequence[int] = -1,
  mask: chex.Array | None = None,
  masked_value: float | None = None,
  dtype: Any = None,
) -> jax.Array:
  r"""Subtract the mean, divide by the standard deviation, scale and shift.

      y = (x - mean) * (rsqrt(var + epsilon) * scale) + bias

  (Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4), computed in float32 at least, in this order,
  and rounded once at the end. The subtraction comes first: folded into the bias it would cancel
  where the mean is large.

  Args:
    x: real or complex array of any rank.
    mean: per channel, of the shape of x's channels.
    var: likewise, real and not negative.
    scale: likewise, or None for 1.
    bias: likewise, or None for 0.
    epsilon: finite and not negative.
    axis: the axis or axes of the channels.
    mask: boolean, broadcasts against x; where False, the element may be NaN or infinite and reaches
      no gradient.
    masked_value: what y holds where the mask is False. None: the formula's value there, as in Flax,
      or bias where that is not finite. A number: that number, and no gradient.
    dtype: of y; default, what x, scale and bias promote to, as in Flax.

  Returns:
    y, of x's shape.

  Raises:
    TypeError: integer x; a mask that is not boolean.
    ValueError: mean, var, scale or bias not of the channels' shape; an axis out of range or twice;
      a mask that does not broadcast; masked_value without a mask; epsilon out of range.

  >>> import jax.numpy as jnp, jaxbn
  >>> x = jnp.array([[1.0, 20.0], [3.0, 20.0]])
  >>> jaxbn.normalize(x, jnp.array([2.0, 20.0]), jnp.array([1.0, 0.0]), epsilon=0.0625).round(3)
  Array([[-0.97,  0.  ],
         [ 0.97,  0.  ]], dtype=float32)
  """
  x = _checks.inexact(x)
  axes = _checks.split_axes(x.ndim, axis)
  _checks.epsilon_in_range(epsilon)
  if masked_value is not None and mask is None:
    raise ValueError(
      f"masked_value={masked_value!r} is what masked positions hold, but there is no mask: "
      "pass mask too, or leave masked_value out."
    )
  if masked_value is not None:
    _checks.scalar("masked_value", masked_value)
  out_dtype = result_dtype(dtype, x, scale, bias)
  for name, value in {"x": x, "mean": mean, "scale": scale, "bias": bias}.items():
    if jnp.iscomplexobj(value) and not jnp.issubdtype(out_dtype, jnp.complexfloating):
      raise TypeError(
        f"{name} is {jnp.asarray(value).dtype}, but y has dtype={out_dtype}, which cannot hold "
        "complex numbers: pass dtype=jnp.complex64, or take the real part first."
      )

  def per_channel(name: str, value: chex.Array) -> jax.Array:
    return axes.expand(_checks.channels(name, value, x, axes))

  mean, var = per_channel("mean", mean), per_channel("var", var).real
  # Half-precision running statistics too are added to epsilon in single precision.
  var = var.astype(jnp.promote_types(var.dtype, jnp.float32))
  multiplier = lax.rsqrt(var + jnp.asarray(epsilon, var.dtype))
  if scale is not None:
    multiplier = multiplier * per_channel("scale", scale)
  shift = None if bias is None else per_channel("bias", bias)

  def formula(x: jax.Array) -> jax.Array:
    y = (x - mean) * multiplier
    return (y if shift is None else y + shift).astype(out_dtype)

  wide = x.astype(accumulation_dtype(x.dtype))
  if mask is None:
    return formula(wide)
  # In masked positions the mean stands in for what could carry a NaN into y or a gradient: that of
  # scale sums y's cotangent times (x - mean) over all positions, and 0 * NaN is NaN.
  valid = keep = _checks.boolean_mask(mask, x)
  if masked_value is None:
    keep = valid | jnp.isfinite(lax.stop_gradient(formula(wide)))
  y = formula(jnp.where(keep, wide, mean.astype(wide.dtype)))
  return y if masked_value is None else jnp.where(valid, y, jnp.asarray(masked_value, out_dtype))


def result_dtype(dtype: Any, *arrays: chex.Array | None) -> Any:
  """The dtype of y: as asked for, or what x, scale and bias promote to."""
  if dtype is None:
    return jnp.result_type(*(jnp.asarray(a) for a in arrays if a is not None))
  if not jnp.issubdtype(dtype, jnp.inexact):
    raise TypeError(f"dtype={dtype!r} is not a floating-point or complex dtype, as y needs.")
  return jnp.dtype(dtype)
