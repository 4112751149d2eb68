"""Apply: the formula that normalizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._activation import hoist
from jaxbn._rule import Form, Given, accumulation_dtype, apply, promoting, wide

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
  activation: Callable[[jax.Array], jax.Array] | None = None,
  residual: chex.Array | None = None,
  dtype: Any = None,
) -> jax.Array:
  r"""Subtract the mean, divide by the standard deviation, scale and shift.

      y = activation((x - mean) * (rsqrt(var + epsilon) * scale) + bias + residual)

  (Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4), computed in float32 at least, in this order,
  and rounded once at the end. The subtraction comes first: folded into the bias it would cancel
  where the mean is large. For derivatives only the arguments are kept: what is between them and y
  is computed again.

  Args:
    x: real or complex array of any rank.
    mean: per channel, of the shape of x's channels; or what differs between examples too, with as
      many axes as x, each of size 1 or x's, as (batch, 1, 1, channels).
    var: likewise, real and not negative.
    scale: likewise, or None for 1.
    bias: likewise, or None for 0.
    epsilon: finite and not negative.
    axis: the axis or axes of the channels.
    mask: boolean, broadcasts against x; where False, the element may be NaN or infinite, as may
      what goes with it of the residual and of a mean, var, scale or bias that differs between
      examples. It then reaches no gradient.
    masked_value: what y holds where the mask is False. None: the formula's value there, as in Flax,
      with mean for x and 0 for the residual where that is not finite. A number: that number, and no
      gradient.
    activation: elementwise function of JAX, such as jax.nn.relu, or None. It is called once, may
      hold arrays and draw random numbers, and costs no memory for its derivative here;
      half-precision y is rounded after it only. Its argument is computed again for the derivative,
      so that within rounding of a kink either side's is taken. One that a module holds under its
      name is traced once for all layers; others in each.
    residual: of x's shape, or None for 0.
    dtype: of y; default, what x, scale, bias and residual promote to, as in Flax.

  Returns:
    y, of x's shape.

  Raises:
    TypeError: integer x; a mask that is not boolean; an activation that is not a function, or whose
      result y cannot hold or has no derivative (booleans, integers).
    ValueError: mean, var, scale or bias neither of the channels' shape nor broadcasting against x;
      a residual not of x's shape; an axis out of range or twice; a mask that does not broadcast;
      masked_value without a mask; epsilon out of range; an activation that changes the shape.

  >>> import jax.numpy as jnp, jaxbn
  >>> x = jnp.array([[1.0, 20.0], [3.0, 20.0]])
  >>> jaxbn.normalize(x, jnp.array([2.0, 20.0]), jnp.array([1.0, 0.0]), epsilon=0.0625).round(3)
  Array([[-0.97,  0.  ],
         [ 0.97,  0.  ]], dtype=float32)
  """
  x = _checks.inexact(x)
  form, given = arrange(x, scale, bias, residual, epsilon, axis, activation, dtype, mean)
  mean = _checks.parameter("mean", mean, x, form.axes)
  var = _checks.parameter("var", var, x, form.axes).real
  valid = None if mask is None else _checks.boolean_mask(mask, x)
  require_mask(masked_value, valid)
  return fill(apply_aligned(form, given._replace(valid=valid), mean, var), valid, masked_value)


@promoting
def apply_aligned(form: Form, given: Given, mean: jax.Array, var: jax.Array) -> jax.Array:
  """`apply`, where statistics and parameters may also differ within a channel."""
  values = mean, var, given.scale, given.bias
  if not is_aligned(form.axes, given.x, *values):
    return apply(form, given, mean, var)
  mean, var, scale, bias = (
    _harmless(given.valid, v, otherwise)
    for v, otherwise in zip(align(form.axes, given.x, *values), (0, 1, 1, 0), strict=True)
  )
  # Nothing is left to expand: as if each axis were a channels' axis.
  form = form._replace(axes=_checks.Axes(tuple(range(given.x.ndim)), ()))
  return apply(form, given._replace(scale=scale, bias=bias), mean, var)


def _harmless(valid: jax.Array | None, value: Any, otherwise: int) -> Any:
  """A value aligned with x, and something finite where it is not and nothing valid needs it."""
  if valid is None or value is None:
    return value
  shared = tuple(a for a in range(value.ndim) if value.shape[a] == 1)
  needed = jnp.any(valid, shared, keepdims=True)
  return jnp.where(needed | jnp.isfinite(value), value, otherwise)


def align(axes: _checks.Axes, x: jax.Array, *values: Any) -> tuple[Any, ...]:
  """Values, each per channel or broadcasting against x: all as they are, or all as the latter."""
  if not is_aligned(axes, x, *values):
    return values
  return tuple(v if v is None or v.ndim == x.ndim else axes.expand(v) for v in values)


def is_aligned(axes: _checks.Axes, x: jax.Array, *values: Any) -> bool:
  """Whether one of these is not per channel, but broadcasts against x."""
  return bool(axes.reduced) and any(v is not None and v.ndim == x.ndim for v in values)


def arrange(
  x: jax.Array,
  scale: chex.Array | None,
  bias: chex.Array | None,
  residual: chex.Array | None,
  epsilon: float,
  axis: int | Sequence[int],
  activation: Any,
  dtype: Any,
  mean: chex.Array | None = None,
) -> tuple[Form, Given]:
  """The arguments that `normalize` and `batch_norm` share, checked, in the rule's terms."""
  axes = _checks.split_axes(x.ndim, axis)
  _checks.epsilon_in_range(epsilon)
  dtype = _result_dtype(dtype, x, scale, bias, residual)
  named = {"x": x, "mean": mean, "scale": scale, "bias": bias, "residual": residual}
  for name, value in named.items():
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
      raise TypeError(
        f"{name} is {jnp.asarray(value).dtype}, but y has dtype={dtype}, which cannot hold "
        "complex numbers: pass dtype=jnp.complex64, or take the real part first."
      )
  given = Given(
    x,
    x.astype(accumulation_dtype(x.dtype)),
    None if scale is None else _checks.parameter("scale", scale, x, axes),
    None if bias is None else _checks.parameter("bias", bias, x, axes),
    None if residual is None else _checks.same_shape("residual", residual, x),
    jnp.asarray(epsilon, accumulation_dtype(x.real.dtype)),
  )
  if activation is None:
    return Form(axes, dtype), given
  parts = given.wide, mean, given.scale, given.bias, wide(given.residual)
  z_dtype = promoting(jnp.result_type)(*(v for v in parts if v is not None))
  hoisted = hoist("activation", activation, given.wide.astype(z_dtype), dtype)
  form = Form(axes, dtype, hoisted.function, z_dtype, traced_once=hoisted.lasts)
  return form, given._replace(constants=hoisted.constants)


def require_mask(masked_value: float | None, valid: jax.Array | None) -> None:
  """Refuses a masked_value that is not a number, or that nothing would hold."""
  if masked_value is None:
    return
  if valid is None:
    raise ValueError(
      f"masked_value={masked_value!r} is what masked positions hold, but there is no mask: "
      "pass mask too, or leave masked_value out."
    )
  _checks.scalar("masked_value", masked_value)


def fill(y: jax.Array, valid: jax.Array | None, masked_value: float | None) -> jax.Array:
  """y, with masked_value, if there is one, where elements do not exist."""
  if valid is None or masked_value is None:
    return y
  return jnp.where(valid, y, jnp.asarray(masked_value, y.dtype))


def _result_dtype(dtype: Any, *arrays: chex.Array | None) -> Any:
  """The dtype of y: as asked for, or what x, scale, bias and residual promote to."""
  if dtype is None:
    return jnp.result_type(*(jnp.asarray(a) for a in arrays if a is not None))
  if not jnp.issubdtype(dtype, jnp.inexact):
    raise TypeError(f"dtype={dtype!r} is not a floating-point or complex dtype, as y needs.")
  return jnp.dtype(dtype)
