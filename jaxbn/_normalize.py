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
  out_dtype = _result_dtype(dtype, x, scale, bias)

  def per_channel(name: str, value: chex.Array) -> jax.Array:
    return axes.expand(_checks.channels(name, value, axes.shape(x), x, axes))

  mean, var = per_channel("mean", mean), per_channel("var", var)
  multiplier = lax.rsqrt(var.real + jnp.asarray(epsilon, var.real.dtype))
  if scale is not None:
    multiplier = multiplier * per_channel("scale", scale)
  wide = x.astype(accumulation_dtype(x.dtype))
  if mask is not None:
    valid = _checks.boolean_mask(mask, x)
    wide = _harmless(wide, valid, mean, multiplier, masked_value)
  y = (wide - mean) * multiplier
  if bias is not None:
    y = y + per_channel("bias", bias)
  if masked_value is not None:
    y = jnp.where(valid, y, masked_value)
  return y.astype(out_dtype)


def _harmless(
  x: jax.Array,
  valid: jax.Array,
  mean: jax.Array,
  multiplier: jax.Array,
  masked_value: float | None,
) -> jax.Array:
  """x with the mean in masked positions from which a NaN could reach y or a gradient.

  The gradient of scale sums y's cotangent times (x - mean) over all positions, and 0 * NaN is NaN.
  """
  keep = valid
  if masked_value is None:
    keep = valid | jnp.isfinite(lax.stop_gradient((x - mean) * multiplier))
  return jnp.where(keep, x, mean.astype(x.dtype))


def _result_dtype(dtype: Any, *arrays: chex.Array | None) -> Any:
  if dtype is None:
    return jnp.result_type(*(a for a in arrays if a is not None))
  if not jnp.issubdtype(dtype, jnp.inexact):
    raise TypeError(f"dtype={dtype!r} is not a floating-point or complex dtype, as y needs.")
  return jnp.dtype(dtype)
