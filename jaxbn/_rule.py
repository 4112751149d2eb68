r"""The derivative, written so that few bytes move.

Batch normalization is bound by memory, so its cost is how often tensors of x's size are read and
written. With r = rsqrt(var + epsilon), k = r scale and y = act((x - mean) k + bias + residual):

    d(before act) = k dx + x A + B + dresidual         per element
    A = r dscale - k r^2 dvar / 2                      per channel
    B = dbias - k dmean - mean A                       per channel
    dmean = E[dx],   dvar = 2 E[(x - mean) dx]         of a batch (see `_moments.py`)

(Ioffe & Szegedy 2015, section 3, with their six equations substituted into each other.) Rules for
tangents keep every transformation of JAX, and JAX's transpose of these is the shortest backward
pass: it reads x and the cotangent once for two sums per channel, and once for x's gradient. There
is no collective in a rule, so that sharing the moments in between is differentiated by JAX itself.

What decides the bytes beyond the formula, on CPUs, GPUs and TPUs alike: XLA computes an expression
that two places share once, and stores it. So the forward pass, the sums and the elementwise part
share nothing of x's size but x: each is written in terms of x in its own way, kept from being
merged by a barrier around a few numbers per channel. And checkpoint makes the linear part start
from x, rather than from whatever partial evaluation would have kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._checks import Axes

Elementwise = Callable[..., jax.Array]


class Form(NamedTuple):
  """What is known when tracing."""

  axes: Axes
  dtype: Any  # of y
  activation: Elementwise | None = None
  activated_dtype: Any = None  # of what the activation is given
  exact: bool = True
  traced_once: bool = True  # False: the activation is not one that caches may hold


class Given(NamedTuple):
  """What y depends on beside the statistics, or its tangents; None where there is none.

  `x` is for values and `wide`, the same in the accumulation dtype, for its first tangent: the parts
  of x's gradient cancel, and so are added before they are rounded; but x is what is kept.
  """

  x: Any
  wide: Any
  scale: Any = None
  bias: Any = None
  residual: Any = None
  epsilon: Any = None
  valid: Any = None  # aligned with x
  constants: tuple[Any, ...] = ()  # further arguments of the activation


P = ParamSpec("P")
T = TypeVar("T")


def promoting(function: Callable[P, T]) -> Callable[P, T]:
  """The same function, in which dtypes promote whatever JAX is told of it.

  In which dtype something is computed is ours to say; whether what a user mixes may promote has
  been asked before.
  """

  @functools.wraps(function)
  def call(*args: P.args, **kwargs: P.kwargs) -> T:
    with jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return call


def once(function: Callable[..., Any]) -> Callable[..., Any]:
  """The same function, traced once for all layers alike: where its first argument, which is known
  when tracing, and the shapes of the others are equal."""
  jitted = jax.jit(function, static_argnums=0)

  @functools.wraps(function)
  def call(known: Any, *args: Any) -> Any:
    if getattr(known, "traced_once", True):
      return jitted(known, *args)
    with _on_mesh_of(args):
      return function(known, *args)

  return call


def _on_mesh_of(args: Any) -> contextlib.AbstractContextManager[Any]:
  """Where arrays made anew are on the explicit mesh of these, as they are in a jit."""
  meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(args))
  explicit = next((m for m in meshes if m.explicit_axes), None)
  return contextlib.nullcontext() if explicit is None else jax.sharding.use_abstract_mesh(explicit)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def apply(form: Form, given: Given, mean: jax.Array, var: jax.Array) -> jax.Array:
  """y = act((x - mean) k + bias + residual), rounded once, at the end."""
  return _apply(form, given._replace(wide=None), mean, var)


@once
def _apply(form: Form, given: Given, mean: jax.Array, var: jax.Array) -> jax.Array:
  given = given._replace(x=unshared(given.x, 4))
  k, _ = slope(given, var)
  # The subtraction first: folded into the bias it would cancel where the mean is large.
  centered, residual, _ = _centered(form, given, mean, k)
  z = _scaled(form, given, centered, residual, k)
  return _activated(form, z, *given.constants).astype(form.dtype)


@functools.partial(apply.defjvp, symbolic_zeros=True)
@promoting
def _apply_jvp(form: Form, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  given, mean, var = primals
  kept = given._replace(wide=None)
  return apply(form, *primals), _apply_tangent(form, kept, mean, var, *nonzero(tangents))


@once
def _apply_tangent(form: Form, *args: Any) -> jax.Array:
  @recomputing
  def tangent(given: Given, *args: Any) -> jax.Array:
    return d_apply(form, given._replace(x=unshared(given.x, 3)), *args)

  return tangent(*args)


def recomputing(linear: Callable[..., Any]) -> Callable[..., Any]:
  """The same function, of which nothing but the arguments is kept for a transposition."""
  # Without prevent_cse, which would keep XLA from fusing, this costs a compiled program nothing.
  return jax.checkpoint(linear, prevent_cse=False)


def nonzero(tangents: Any) -> Any:
  """None for what is not differentiated, so that nothing is computed with it."""

  def is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)

  return jax.tree.map(lambda t: None if is_zero(t) else t, tangents, is_leaf=is_zero)


def unshared(x: jax.Array, copy: int) -> jax.Array:
  """x, of which XLA for CPUs does not see that it is the same as another copy.

  It would convert bfloat16 x to float32 once, and store that for all who need it. (What needs no
  conversion is as well shared.) On accelerators, which convert as they read, a barrier would only
  be in the way. The copies are: 0, x as it is, the sum's; 1 that of the squares; 2 of the moments'
  tangents; 3 of y's; 4 y's own.
  """
  return x if accumulation_dtype(x.dtype) == x.dtype else _behind_barriers(x, copy)


@functools.partial(jax.jit, static_argnums=1)
def _behind_barriers(x: jax.Array, copy: int) -> jax.Array:
  def on_cpu(x: jax.Array) -> jax.Array:
    for _ in range(copy):  # the same barrier twice would be merged
      x = lax.optimization_barrier(x)
    return x

  return lax.platform_dependent(x, cpu=on_cpu, default=lambda x: x)


def slope(given: Given, var: jax.Array) -> tuple[jax.Array, jax.Array]:
  """k = r scale and r = rsqrt(var + epsilon)."""
  # Half-precision running statistics too are added to epsilon in single precision.
  var = var.astype(jnp.promote_types(var.dtype, jnp.float32))
  r = lax.rsqrt(var + given.epsilon.astype(var.dtype))
  return (r if given.scale is None else r * given.scale), r


def _centered(
  form: Form, given: Given, mean: jax.Array, k: jax.Array
) -> tuple[jax.Array, Any, jax.Array | None]:
  """x - mean and the residual, 0 in masked positions that are not finite; which x are kept.

  The gradient of scale sums y's cotangent times (x - mean) over all positions, and 0 * NaN is NaN.
  """
  centered = wide(given.x) - form.axes.expand(mean)
  residual = _of_residual(given, given.residual)
  if given.valid is None:
    return centered, residual, None
  z = lax.stop_gradient(_scaled(form, given, centered, residual, k))
  y = lax.stop_gradient(_activated(form, z, *given.constants)).astype(form.dtype)
  kept = given.valid | (jnp.isfinite(z) & jnp.isfinite(y))
  return jnp.where(kept, centered, 0), residual, kept


def _of_residual(given: Given, value: Any) -> Any:
  """The residual or its tangent, wide, and 0 where that is masked and not finite."""
  if value is None or given.valid is None:
    return wide(value)
  return jnp.where(given.valid | jnp.isfinite(given.residual), wide(value), 0)


def _scaled(
  form: Form, given: Given, centered: jax.Array, residual: Any, k: jax.Array
) -> jax.Array:
  shift = None if given.bias is None else form.axes.expand(given.bias)
  return _sum(centered * form.axes.expand(k), shift, residual)


def _activated(form: Form, z: jax.Array, *constants: Any) -> jax.Array:
  if form.activation is None:
    return z
  return form.activation(z.astype(form.activated_dtype), *constants)


def accumulation_dtype(dtype: Any) -> Any:
  """The dtype in which sums over elements of `dtype` are taken: float32 at least."""
  return jnp.float32 if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def wide(x: Any) -> Any:
  """In the dtype of sums; None stays None."""
  return None if x is None else x.astype(accumulation_dtype(x.dtype))


def _sum(*terms: Any) -> Any:
  """The sum of those terms that exist, from left to right; None if none does."""
  there = [t for t in terms if t is not None]
  return functools.reduce(lambda a, b: a + b, there) if there else None


def d_apply(
  form: Form,
  given: Given,
  mean: jax.Array,
  var: jax.Array,
  d: Given,
  d_mean: Any,
  d_var: Any,
) -> jax.Array:
  """The tangent of y: k dx + x A + B + dresidual, through the activation."""
  expand = form.axes.expand
  k, r = slope(given, var)
  a = b = jnp.zeros_like(k)
  if d.scale is not None:
    a = a + r * d.scale
  for d_square in (d_var, d.epsilon):
    if d_square is not None:
      a = a - 0.5 * k * r * r * d_square
  if d.bias is not None:
    b = b + d.bias
  # Apart from the forward pass, whose x - mean, comparisons and sigmoids XLA would otherwise keep.
  apart = lax.optimization_barrier
  centered, residual, kept = _centered(form, given, apart(mean), k)
  x, d_x = wide(given.x), d.wide
  if kept is None:
    b = b if d_mean is None else b - k * d_mean
  else:
    d_x = _sum(jnp.zeros_like(x), d_x, None if d_mean is None else -expand(d_mean))
    d_x = jnp.where(kept, d_x, 0)
  if form.exact or kept is not None:
    sloped, shifted = centered * expand(a), expand(b)
  else:
    shifted, sloped = expand(b - mean * a), x * expand(a)
  from_moments = sloped + shifted
  direct = _sum(None if d_x is None else d_x * expand(k), _of_residual(given, d.residual))
  if form.activation is None:
    return _sum(direct, from_moments).astype(form.dtype)

  shift = _sum(-mean * k, given.bias)
  if kept is not None:
    z, d_z = _scaled(form, given, centered, residual, k), _sum(direct, from_moments)
    # Where the activation's slope is not finite, its product with a zero is NaN.
    unset = (None,) * len(given.constants)
    slopes = _through(form, given.constants, unset, [(z, jnp.ones_like(z))])
    smooth = given.valid | jnp.isfinite(lax.stop_gradient(slopes))
    parts = [(jnp.where(smooth, z, 0), jnp.where(smooth, d_z, 0))]
  elif residual is not None or direct is None:
    y = _sum(x * expand(k), expand(apart(shift)), residual)
    parts = [(y, _sum(direct, from_moments))]
  else:
    # Transposed, two parts are sums and one is elementwise. Were they to go through the activation
    # together, XLA would store what they need, such as ReLU's mask. So each has its y, behind
    # barriers that differ: it merges equal ones. (Beside a residual that would move more.)
    shared = apart((k, shift))
    own = _apart_on_gpus(k, shift, mean)
    shifted = shifted + _zeros_like(x)  # differs between the devices between which x does
    values = (shared, sloped), (own, shifted), ((k, apart(shift)), direct)
    parts = [(x * expand(k) + expand(shift), d_y) for (k, shift), d_y in values]
  return _through(form, given.constants, d.constants, parts).astype(form.dtype)


def _zeros_like(x: jax.Array) -> jax.Array:
  """On x's explicit mesh too, where a jit knows of it from its arguments alone."""
  zeros, sharding = jnp.zeros_like(x), jax.typeof(x).sharding
  return jax.sharding.reshard(zeros, sharding) if sharding.mesh.explicit_axes else zeros


@jax.jit
def _apart_on_gpus(k: jax.Array, shift: jax.Array, unlike: jax.Array) -> tuple[Any, Any]:
  """Behind a barrier of their own on GPUs; elsewhere behind that of the two alone.

  A GPU's column sums are kernels that read the data once however much they compute, but XLA gives
  one sum at a time what it needs. On CPUs and TPUs it fuses two that share their y, and only those.
  """
  apart = lax.optimization_barrier

  def shared(k: jax.Array, shift: jax.Array, unlike: jax.Array) -> tuple[Any, Any]:
    del unlike
    return apart((k, shift))

  def of_its_own(*values: jax.Array) -> tuple[Any, Any]:
    return apart(values)[:2]

  return lax.platform_dependent(k, shift, unlike, cpu=shared, tpu=shared, default=of_its_own)


def _through(
  form: Form, constants: Any, d_constants: Any, parts: list[tuple[Any, Any]]
) -> jax.Array:
  """The tangent of act(z), from that of z in parts, each with the z at which it is taken."""
  moving = [i for i, d in enumerate(d_constants) if d is not None]
  tangents = []
  for z, d_z in parts:

    def activation(z: jax.Array, *moved: Any, moving: list[int] = moving) -> jax.Array:
      values = dict(enumerate(constants)) | dict(zip(moving, moved, strict=True))
      return _activated(form, z, *values.values())

    z, d_z = (v.astype(form.activated_dtype) for v in (z, jnp.broadcast_to(d_z, z.shape)))
    primals, changes = ([values[i] for i in moving] for values in (constants, d_constants))
    tangents.append(jax.jvp(activation, (z, *primals), (d_z, *changes))[1])
    moving = []  # they have their part in the first
  return _sum(*tangents)
