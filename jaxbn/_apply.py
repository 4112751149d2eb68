r"""Apply: the formula that normalizes, and its derivative.

Batch normalization is bound by memory, so its cost is how often tensors of x's size are read and
written. With r = rsqrt(var + epsilon), k = r scale and y = act((x - mean) k + bias + residual):

    d(before act) = k dx + x A + B + dresidual         per element
    A = r dscale - k r^2 dvar / 2                      per channel
    B = dbias - k dmean - mean A                       per channel
    dmean = E[dx],   dvar = 2 E[(x - mean) dx]         of a batch (see `_measure.py`)

(Ioffe & Szegedy 2015, section 3, with their six equations substituted into each other.) Rules for
tangents keep every transformation of JAX, and JAX's transpose of these is the shortest backward
pass: it reads x and the cotangent once for two sums per channel, and once for x's gradient. There
is no collective in a rule, so that sharing the moments in between is differentiated by JAX itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks, _xla
from jaxbn._arguments import check
from jaxbn._dtypes import promoting, wide
from jaxbn._meshes import zeros_like
from jaxbn._names import by_our_names
from jaxbn._types import Array, Axes, Chosen, Inputs, Plan


@by_our_names
def normalize(
  x: Array,
  mean: Array,
  var: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  *,
  epsilon: float = 1e-5,
  axis: int | Sequence[int] = -1,
  mask: Array | None = None,
  masked_value: float | None = None,
  activation: Callable[[jax.Array], jax.Array] | None = None,
  residual: Array | None = None,
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
  plan, inputs = check(
    x,
    scale,
    bias,
    axis=axis,
    epsilon=epsilon,
    mask=mask,
    masked_value=masked_value,
    activation=activation,
    residual=residual,
    dtype=dtype,
    mean=mean,
  )
  mean = _checks.channels("mean", mean, inputs.x, plan.axes, or_per_example=True)
  var = _checks.channels("var", var, inputs.x, plan.axes, or_per_example=True).real
  return apply(plan, inputs, Chosen(mean, var))


def apply(plan: Plan, inputs: Inputs, chosen: Chosen) -> jax.Array:
  """`normalize` of arguments that have been checked, by statistics that have been chosen."""
  mean, var, r, d = chosen
  masked_value = inputs.masked_value
  inputs = inputs._replace(weight=None, masked_value=None)
  ndims = {v.ndim for v in (*chosen, inputs.scale, inputs.bias) if v is not None}
  with jax.numpy_dtype_promotion("standard"):
    if plan.axes.reduced and inputs.x.ndim in ndims:
      plan, inputs, mean, var, r, d = _element_by_element(plan, inputs, mean, var, r, d)
    if r is not None or d is not None:
      inputs = _folded(inputs, r, d)
    y = _y(plan, inputs, mean, var)
  return y if masked_value is None else jnp.where(inputs.valid, y, masked_value)


def _folded(inputs: Inputs, r: Any, d: Any) -> Inputs:
  """With the scale and the bias of (z r + d) scale + bias."""
  # Wide, so that the two parts of a half-precision scale's gradient are added before it is rounded.
  scale, bias = wide(inputs.scale), wide(inputs.bias)
  if d is not None:
    shift = d if scale is None else d * scale
    bias = shift if bias is None else bias + shift
  if r is not None:
    scale = r if scale is None else r * scale
  return inputs._replace(scale=scale, bias=bias)


def _element_by_element(plan: Plan, inputs: Inputs, *values: Any) -> tuple[Any, ...]:
  """As if each axis were a channels' axis, where some value differs within a channel."""

  def aligned(value: Any, otherwise: int) -> Any:
    if value is None:
      return None
    value = value if value.ndim == inputs.x.ndim else plan.axes.expand(value)
    return _harmless(inputs.valid, value, otherwise)

  scale, bias, *others = map(aligned, (inputs.scale, inputs.bias, *values), (1, 0, 0, 1, 1, 0))
  plan = plan._replace(axes=Axes(tuple(range(inputs.x.ndim)), ()))
  return plan, inputs._replace(scale=scale, bias=bias), *others


def _harmless(valid: jax.Array | None, value: jax.Array, otherwise: int) -> jax.Array:
  """A value aligned with x, and something finite where it is not and nothing valid needs it."""
  if valid is None:
    return value
  shared = tuple(a for a in range(value.ndim) if value.shape[a] == 1)
  needed = jnp.any(valid, shared, keepdims=True)
  return jnp.where(needed | jnp.isfinite(value), value, otherwise)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@_xla.traced_once_if_lasting
def _y(plan: Plan, inputs: Inputs, mean: jax.Array, var: jax.Array) -> jax.Array:
  """y = act((x - mean) k + bias + residual), rounded once, at the end."""
  inputs = inputs._replace(x=_xla.own_copy(inputs.x, "y"))
  k, _ = _slope(inputs, var)
  # The subtraction first: folded into the bias it would cancel where the mean is large.
  centered, residual, _ = _centered(plan, inputs, mean, k)
  z = _scaled(plan, inputs, centered, residual, k)
  y = z if plan.activation is None else _activated(plan, z, *inputs.constants)
  return y.astype(plan.dtype)


@functools.partial(_y.defjvp, symbolic_zeros=True)
@promoting
def _y_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  inputs, mean, var = primals
  kept = inputs._replace(wide_x=None)
  return _y(plan, *primals), _y_tangent(plan, kept, mean, var, *_xla.nonzero(tangents))


@_xla.traced_once_if_lasting
def _y_tangent(plan: Plan, *args: Any) -> jax.Array:
  @_xla.recomputing
  def tangent(inputs: Inputs, *args: Any) -> jax.Array:
    own = inputs._replace(x=_xla.own_copy(inputs.x, "tangent of y"))
    return d_y(plan, own, *args)

  return tangent(*args)


def _slope(inputs: Inputs, var: jax.Array) -> tuple[jax.Array, jax.Array]:
  """k = r scale and r = rsqrt(var + epsilon)."""
  # Half-precision running statistics too are added to epsilon in single precision.
  var = var.astype(jnp.promote_types(var.dtype, jnp.float32))
  r = lax.rsqrt(var + inputs.epsilon.astype(var.dtype))
  return (r if inputs.scale is None else r * inputs.scale), r


def _centered(
  plan: Plan, inputs: Inputs, mean: jax.Array, k: jax.Array
) -> tuple[jax.Array, Any, jax.Array | None]:
  """x - mean and the residual, 0 in masked positions that are not finite; which x are kept.

  The gradient of scale sums y's cotangent times (x - mean) over all positions, and 0 * NaN is NaN.
  """
  centered = inputs.x.astype(plan.sum_dtype) - plan.axes.expand(mean)
  residual = None if inputs.residual is None else _of_residual(inputs, inputs.residual)
  if inputs.valid is None:
    return centered, residual, None
  z = lax.stop_gradient(_scaled(plan, inputs, centered, residual, k))
  y = lax.stop_gradient(_activated(plan, z, *inputs.constants)).astype(plan.dtype)
  kept = inputs.valid | (jnp.isfinite(z) & jnp.isfinite(y))
  return jnp.where(kept, centered, 0), residual, kept


def _of_residual(inputs: Inputs, value: Any) -> Any:
  """The residual or its tangent, wide, and 0 where that is masked and not finite."""
  if value is None or inputs.valid is None:
    return wide(value)
  return jnp.where(inputs.valid | jnp.isfinite(inputs.residual), wide(value), 0)


def _scaled(
  plan: Plan, inputs: Inputs, centered: jax.Array, residual: Any, k: jax.Array
) -> jax.Array:
  shift = None if inputs.bias is None else plan.axes.expand(inputs.bias)
  return _sum(centered * plan.axes.expand(k), shift, residual)


def _activated(plan: Plan, z: jax.Array, *constants: Any) -> jax.Array:
  if plan.activation is None:
    return z
  return plan.activation(z.astype(plan.activation_dtype), *constants)


def _sum(*terms: Any) -> Any:
  """The sum of those terms that exist, from left to right; None if none does."""
  there = [t for t in terms if t is not None]
  return functools.reduce(operator.add, there) if there else None


def d_y(
  plan: Plan, inputs: Inputs, mean: jax.Array, var: jax.Array, d: Inputs, d_mean: Any, d_var: Any
) -> jax.Array:
  """The tangent of y: k dx + x A + B + dresidual, through the activation."""
  expand = plan.axes.expand
  k, r = _slope(inputs, var)
  a, b = _per_channel(k, r, d, d_var)
  # Apart from the forward pass, whose x - mean, comparisons and sigmoids XLA would otherwise keep.
  centered, residual, kept = _centered(plan, inputs, _xla.apart(mean), k)
  x, d_x = wide(inputs.x), d.wide_x
  if kept is None:
    b = b if d_mean is None else b - k * d_mean
  else:
    d_x = _sum(jnp.zeros_like(x), d_x, None if d_mean is None else -expand(d_mean))
    d_x = jnp.where(kept, d_x, 0)
  if plan.sample_pivot or kept is not None:
    sloped, shifted = centered * expand(a), expand(b)
  else:
    shifted, sloped = expand(b - mean * a), x * expand(a)
  from_moments = sloped + shifted
  direct = _sum(None if d_x is None else d_x * expand(k), _of_residual(inputs, d.residual))
  if plan.activation is None:
    return _sum(direct, from_moments).astype(plan.dtype)

  shift = _sum(-mean * k, inputs.bias)
  if kept is not None:
    z, d_z = _scaled(plan, inputs, centered, residual, k), _sum(direct, from_moments)
    parts = [_smooth(plan, inputs, z, d_z)]
  elif residual is not None or direct is None:
    z = _sum(x * expand(k), expand(_xla.apart(shift)), residual)
    parts = [(z, _sum(direct, from_moments))]
  else:
    # Transposed, two parts are sums and one is elementwise. Were they to go through the activation
    # together, XLA would store what they need, such as ReLU's mask. So each has its z, behind
    # barriers that differ: it merges equal ones. (Beside a residual that would move more.)
    shared = _xla.apart((k, shift))
    own = _xla.apart_on_gpus((k, shift), mean)
    shifted = shifted + zeros_like(x)  # differs between the devices between which x does
    values = (shared, sloped), (own, shifted), ((k, _xla.apart(shift)), direct)
    parts = [(x * expand(k) + expand(shift), d_z) for (k, shift), d_z in values]
  return _through(plan, inputs.constants, d.constants, parts).astype(plan.dtype)


def _per_channel(k: jax.Array, r: jax.Array, d: Inputs, d_var: Any) -> tuple[jax.Array, jax.Array]:
  """A, and of B what scale and bias add."""
  a = b = jnp.zeros_like(k)
  if d.scale is not None:
    a = a + r * d.scale
  for d_square in (d_var, d.epsilon):
    if d_square is not None:
      a = a - 0.5 * k * r * r * d_square
  return a, b if d.bias is None else b + d.bias


def _smooth(plan: Plan, inputs: Inputs, z: jax.Array, d_z: jax.Array) -> tuple[Any, Any]:
  """z and its tangent, 0 where that is masked and the activation's slope is not finite.

  Its product with a zero would be NaN.
  """
  constants = inputs.constants
  slopes = _through(plan, constants, (None,) * len(constants), [(z, jnp.ones_like(z))])
  smooth = inputs.valid | jnp.isfinite(lax.stop_gradient(slopes))
  return jnp.where(smooth, z, 0), jnp.where(smooth, d_z, 0)


def _through(
  plan: Plan, constants: Any, d_constants: Any, parts: list[tuple[Any, Any]]
) -> jax.Array:
  """The tangent of act(z), from that of z in parts, each with the z at which it is taken."""
  moving = [i for i, d in enumerate(d_constants) if d is not None]
  tangents = []
  for z, d_z in parts:

    def activation(z: jax.Array, *moved: Any, moving: list[int] = moving) -> jax.Array:
      values = dict(enumerate(constants)) | dict(zip(moving, moved, strict=True))
      return _activated(plan, z, *values.values())

    z, d_z = (v.astype(plan.activation_dtype) for v in (z, jnp.broadcast_to(d_z, z.shape)))
    primals, changes = ([values[i] for i in moving] for values in (constants, d_constants))
    tangents.append(jax.jvp(activation, (z, *primals), (d_z, *changes))[1])
    moving = []  # they have their part in the first
  return _sum(*tangents)
