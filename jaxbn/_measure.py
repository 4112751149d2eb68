r"""Measure: the count, the mean and the variance of an array.

The one delicate computation is the variance. Writing s for the standard deviation, u for the unit
roundoff of the accumulator (6e-8 in float32) and p for a pivot, one pass over the data gives

    d = x - p,   mean = p + E[d],   var = E[|d|^2] - |E[d]|^2

and the subtraction in var loses digits only as far as p is from the mean: the relative error of
var is about u * (1 + ((mean - p) / s)^2) times a constant of order one (Chan, Golub & LeVeque 1983,
"Algorithms for computing the sample variance", section 3). With p = 0, which is what most libraries
compute, that is 6 at |mean|/s = 1e4. Here p is the average of a few elements: its distance is of
order s / sqrt(8), and by Samuelson's inequality never above s * sqrt(n - 1) for n elements. x - p
is itself exact where x and p are within a factor of two of each other (Sterbenz), that is, where
the mean is large against s. On accelerators that costs next to nothing. On a CPU it would cost half
of the sum that it is subtracted in, so there p is 0 in channels whose mean turns out to be within
2 s of 0, a factor of 5 in the bound, and only otherwise is the data read once more, around that p.

What no choice of p can mend is the rounding of the result: a mean of m is stored with an error of
u * |m|, so that outputs are off by up to u * |m| / s standard deviations (6e-4 at 1e4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import _checks, _xla
from jaxbn._arguments import valid_elements
from jaxbn._counts import count_of, divisor
from jaxbn._dtypes import promoting, wide
from jaxbn._meshes import by_partitioner
from jaxbn._names import by_our_names
from jaxbn._types import Array, Inputs, Moments, Numeric, Plan

_NEAR = 4  # squared distance of the mean from 0, in variances, up to which 0 is a good pivot
_SAMPLED = 8  # elements that make a pivot


def empty_moments(shape: int | Sequence[int], dtype: Any = jnp.float32) -> Moments:
  """The moments of no elements: the identity of `merge`.

  Args:
    shape: the channels' shape; an integer n means (n,).
    dtype: dtype of the mean, real or complex.

  Returns:
    Moments with count 0 (int32, shape ()), mean 0 and var 0. As the carry of a scan, its count must
    have the shape and dtype of the batches': with weights or a mask per channel, replace it, for
    instance `empty_moments(3)._replace(count=jnp.zeros(3))`.

  >>> import jaxbn
  >>> jaxbn.empty_moments(3).mean.tolist()
  [0.0, 0.0, 0.0]
  """
  mean = jnp.zeros(_checks.channel_shape(shape), dtype)
  return Moments(np.int32(0), mean, jnp.zeros_like(mean.real))


@by_our_names
def moments(
  x: Array,
  *,
  axis: int | Sequence[int] = -1,
  mask: Array | None = None,
  weights: Array | None = None,
  use_fast_variance: bool = True,
  pivot: Array | None = None,
) -> Moments:
  r"""Count, mean and variance of x per channel.

  For the valid elements x_i of a channel with weights w_i (1 unless given):

      count = sum_i w_i
      mean  = sum_i w_i x_i / count
      var   = sum_i w_i |x_i - mean|^2 / count

  (Ioffe & Szegedy 2015, Algorithm 1, lines 1 and 2). They are accumulated in float32 at least.
  The accuracy is derived at the head of this file: var is right to a few units in the last place
  times the squared distance, in standard deviations, of the mean from the pivot.

  Args:
    x: real or complex array of any rank.
    axis: the axis or axes of the channels; all others are summed over.
    mask: boolean, broadcasts against x; where False, the element does not exist: it may be NaN or
      infinite and reaches no statistic and no gradient. As in NumPy the last axes are aligned: a
      mask (N, T) of sequences x (N, T, C) is passed as mask[..., None]. Where N = T = C it is
      taken as one of (T, C) without a word.
    weights: real, not negative, broadcasts against x: how much each element counts. One with
      weight 0 is left out as by a mask, and its weight then gets no gradient from it.
    use_fast_variance: one pass over x. If False, two: the variance is then taken around the mean
      found, which matters only where the pivot happens to be an extreme outlier.
    pivot: value per channel near which the elements are expected; default, the average of some.
      It changes rounding only, and takes no part in gradients; where not finite, 0 is used.

  Returns:
    Moments. A channel without a valid element has count 0, mean 0 and var 0. Finite elements whose
    squared deviations overflow (beyond about 1e19 in float32; no float16 does) give var = inf.

  Raises:
    TypeError: integer x; a mask that is not boolean; complex weights; a complex pivot for real x.
    ValueError: an axis out of range or twice; an empty batch; a mask or weights that do not
      broadcast; negative weights, where their values can be seen; a pivot of another shape.

  >>> import jax.numpy as jnp, jaxbn
  >>> m = jaxbn.moments(jnp.array([[1.0, 10.0], [3.0, 10.0]]))
  >>> int(m.count), m.mean.tolist(), m.var.tolist()
  (2, [2.0, 10.0], [1.0, 0.0])
  """
  x = _checks.inexact(x)
  axes = _checks.split_axes(x.ndim, axis)
  _checks.nonempty(x, axes)
  inputs = Inputs(x, wide(x), *valid_elements(x, mask, weights))
  if pivot is not None:
    pivot = _constant_pivot(_checks.channels("pivot", pivot, x, axes), x.dtype)
  fast = _checks.static_bool("use_fast_variance", use_fast_variance)
  return measure(Plan(axes, use_fast_variance=fast), inputs, pivot)


def _constant_pivot(pivot: jax.Array, dtype: Any) -> jax.Array:
  """A pivot as given: no path for gradients, and 0 where it is not finite."""
  if jnp.iscomplexobj(pivot) and not jnp.issubdtype(dtype, jnp.complexfloating):
    raise TypeError(f"pivot is complex, but x is not: {dtype}. Pass the real part.")
  pivot = lax.stop_gradient(jnp.asarray(pivot, dtype))
  return jnp.where(jnp.isfinite(pivot), pivot, 0)


def measure(plan: Plan, inputs: Inputs, pivot: jax.Array | None = None) -> Moments:
  """`moments` of arguments that have been checked."""
  # No more than it takes, for layers that differ in the rest measure alike.
  x, wide_x, valid, weight, *_ = inputs
  plan = Plan(
    plan.axes,
    wide_x.dtype,
    use_fast_variance=plan.use_fast_variance,
    sample_pivot=plan.sample_pivot,
  )
  with jax.numpy_dtype_promotion("standard"):
    count = count_of(plan.axes, x, valid if weight is None else weight)
    n = divisor(count, jnp.finfo(plan.sum_dtype).dtype)
    pivot, mean, var = _pivot_mean_var(plan, Inputs(x, wide_x, valid, weight), n, pivot)
    return Moments(count, pivot + mean, var)


# Of d = x - pivot: the pivot, E[d] and the variance.
PivotMeanVar: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@_xla.traced_once
def _pivot_mean_var(
  plan: Plan, inputs: Inputs, n: Numeric, pivot: jax.Array | None
) -> PivotMeanVar:
  """Around the pivot given, or else one that costs little where this runs."""
  if pivot is not None:
    return _from_sums(plan, n, _sums(plan, inputs, n, pivot), pivot)
  # On CPUs a branch costs nothing, and subtracting in a sum half as much as the sum.
  by_branch = functools.partial(_around_0_where_near, plan)
  default = functools.partial(_around_default, plan)
  return _xla.by_platform(inputs, n, cpu=by_branch, default=default)


def _around_default(plan: Plan, inputs: Inputs, n: Numeric) -> PivotMeanVar:
  pivot = _sample(plan, inputs.x, inputs.valid) if plan.sample_pivot else None
  return _from_sums(plan, n, _sums(plan, inputs, n, pivot), pivot)


def _around_0_where_near(plan: Plan, inputs: Inputs, n: Numeric) -> PivotMeanVar:
  """Around 0, and in channels whose mean is far from it, if there are any, around the sample."""
  sums = _sums(plan, inputs, n, None)
  _, mean, var = _from_sums(plan, n, sums)
  near = (abs_square(mean) < _NEAR * var) & jnp.isfinite(var) | (mean == 0)

  # All in one array: for the CPU, each costs as much as all.
  def around_0(near: jax.Array, sums: Any, inputs: Inputs, n: Numeric) -> jax.Array:
    # Zeros that vary as the rest does: under vmap on an explicit mesh, JAX stacks no others.
    return jnp.stack([0 * near.astype(plan.sum_dtype), *sums])

  def elsewhere(near: jax.Array, sums: Any, inputs: Inputs, n: Numeric) -> jax.Array:
    pivot = _sample(plan, inputs.x, inputs.valid)
    around_pivot = jnp.stack([pivot, *_sums(plan, inputs, n, pivot)])
    return jnp.where(near, around_0(near, sums, inputs, n), around_pivot)

  branches = _xla.all_hold(near), around_0, elsewhere
  pivot, *sums = lax.cond(*branches, near, sums, inputs, n)
  return _from_sums(plan, n, sums, pivot)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for all platforms
def _sums(plan: Plan, inputs: Inputs, n: Numeric, pivot: jax.Array | None) -> Any:
  """The sums of d = x - pivot and of |d|^2, or in a second pass of |d - E[d]|^2."""
  p = None if pivot is None else plan.axes.expand(pivot)
  first = _total(plan, inputs, _from_pivot(plan, inputs, p))
  # The same once more, not shared: XLA would store it, to read it twice.
  again = inputs._replace(x=_xla.own_copy(inputs.x, "squares"))
  d = _from_pivot(plan, again, None if p is None else _xla.apart(p))
  if not plan.use_fast_variance:
    # Around the mean of d, not of x: d holds all of x's digits, the mean of x is rounded.
    d = d - plan.axes.expand(first / n)
  return first, _total(plan, inputs, abs_square(d))


def _from_sums(plan: Plan, n: Numeric, sums: Any, pivot: jax.Array | None = None) -> PivotMeanVar:
  """E[d] and the variance."""
  mean, second = sums[0] / n, sums[1].real / n
  var = variance(second, mean) if plan.use_fast_variance else second
  return jnp.zeros_like(mean) if pivot is None else pivot, mean, var


def variance(mean_square: jax.Array, mean: jax.Array) -> jax.Array:
  """E[|d|^2] - |E[d]|^2, and where rounding leaves nothing of it, the size of that rounding.

  A variance below u |E[d]|^2 is lost. Zero in its place would multiply the output by up to
  1/sqrt(epsilon); its upper bound makes the output too small instead, by a few standard deviations.
  """
  square = abs_square(mean)
  # Where the squares overflow the variance does; the difference of two infinities would be NaN.
  var = jnp.where(jnp.isinf(mean_square), mean_square, mean_square - square)
  unresolved = lax.stop_gradient(jnp.finfo(square.dtype).eps * square)
  # Not jnp.maximum: its gradient at a tie, as in constant channels, is halved.
  return jnp.where(var < unresolved, unresolved, var)


@functools.partial(_pivot_mean_var.defjvp, symbolic_zeros=True)
@promoting
def _pivot_mean_var_jvp(
  plan: Plan, primals: Any, tangents: Any
) -> tuple[PivotMeanVar, PivotMeanVar]:
  inputs, n, _ = primals
  d_inputs, d_n, _ = _xla.nonzero(tangents)
  values = _pivot_mean_var(plan, *primals)
  kept = inputs._replace(wide_x=None)
  d_mean, d_var = _tangent(plan, kept, n, values, d_inputs, d_n)
  return values, (jnp.zeros_like(values[0]), d_mean, d_var)


@_xla.traced_once
def _tangent(plan: Plan, *args: Any) -> tuple[jax.Array, jax.Array]:
  @_xla.recomputing
  def tangent(inputs: Inputs, *args: Any) -> Any:
    own = inputs._replace(x=_xla.own_copy(inputs.x, "tangent of moments"))
    return d_mean_and_var(plan, own, *args)

  return tangent(*args)


def d_mean_and_var(
  plan: Plan, inputs: Inputs, n: Numeric, values: PivotMeanVar, d: Inputs, d_n: Any
) -> tuple[jax.Array, jax.Array]:
  """The tangents: dmean = E[dx], dvar = 2 E[(x - mean) dx], and what weights add."""
  pivot, mean, var = values
  p = plan.axes.expand(pivot)
  # Apart from the forward pass's; where no pivot is taken, XLA shall see that it is 0.
  around = _from_pivot(plan, inputs, _xla.apart(p) if plan.sample_pivot else p)
  centered = around - plan.axes.expand(mean)
  d_mean, d_var = jnp.zeros_like(mean), jnp.zeros_like(var)
  if d.wide_x is not None:
    d_mean = _total(plan, inputs, d.wide_x)
    # Around the pivot, near enough to lose nothing: one subtraction less than around the mean. The
    # order of the product decides what a TPU moves: the other way it is a quarter more.
    of_products = _total(plan, inputs, (d.wide_x * around.conj()).real)
    d_var = 2 * (of_products - (mean.conj() * d_mean).real)
  if d.weight is not None:
    unweighted = inputs._replace(weight=None)
    d_mean = d_mean + _total(plan, unweighted, d.weight * centered)
    d_var = d_var + _total(plan, unweighted, d.weight * abs_square(centered))
  if d_n is not None:
    d_var = d_var - var * d_n  # that of the mean is in d.weight * centered
  return d_mean / n, d_var / n


def _from_pivot(plan: Plan, inputs: Inputs, pivot: jax.Array | None) -> jax.Array:
  """x - pivot, and 0 where there is no element."""
  x = inputs.x.astype(plan.sum_dtype)
  d = x if pivot is None else x - pivot
  # A select, not a product: 0 * NaN is NaN, in the value and in the gradient.
  return d if inputs.valid is None else jnp.where(inputs.valid, d, 0)


def _total(plan: Plan, inputs: Inputs, values: jax.Array) -> jax.Array:
  """The weighted sum, per channel, over the elements that exist."""
  if inputs.valid is not None:
    values = jnp.where(inputs.valid, values, 0)
  if inputs.weight is not None:
    values = values * inputs.weight
  return jnp.sum(values, plan.axes.reduced)


def abs_square(x: jax.Array) -> jax.Array:
  """|x|^2, real also where x is complex."""
  if jnp.iscomplexobj(x):
    return lax.square(x.real) + lax.square(x.imag)
  return lax.square(x)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for all platforms
def _sample(plan: Plan, x: jax.Array, valid: jax.Array | None) -> jax.Array:
  """A pivot for each channel, from a few of its elements.

  The average of eight, which is seldom far from the mean; with a mask the first valid one, or 0.
  """
  x, reduced = lax.stop_gradient(x), plan.axes.reduced
  sharding = jax.typeof(x).sharding
  if sharding.mesh.explicit_axes:
    # A few elements cannot keep the batch's sharding, nor does indexing give that up by itself.
    of_channels = jax.P(*(sharding.spec[a] for a in plan.axes.features))
    return by_partitioner(functools.partial(_sample, plan), x, of_channels)(x, valid)
  if valid is None:
    # Some along one axis: eight, if there are, or a smaller power of two.
    usable = {a: min(x.shape[a], _SAMPLED) if isinstance(x.shape[a], int) else 1 for a in reduced}
    along = max(usable, key=usable.__getitem__, default=None)
    p = x
    for a in sorted(usable, key=along.__eq__):  # last the one that may be sharded: little is left
      p = lax.slice_in_dim(p, 0, 1 << usable[a].bit_length() - 1 if a == along else 1, axis=a)
    p = p.astype(plan.sum_dtype)
    while along is not None and p.shape[along] > 2:
      # In pairs, and halved first: exact where all are equal, and no overflow.
      first, second = jnp.split(0.5 * p, 2, along)
      p = first + second
    # A sum, so that under sharded jit every device has the result.
    p = jnp.sum(p if along is None else p / p.shape[along], reduced, keepdims=True)
  else:
    p = _first_valid(plan, x, valid)
  return lax.squeeze(_xla.apart(jnp.where(jnp.isfinite(p), p, 0)), reduced)


def _first_valid(plan: Plan, x: jax.Array, valid: jax.Array) -> jax.Array:
  axes = plan.axes
  reduced_shape = tuple(valid.shape[a] for a in axes.reduced)
  by_position = valid.transpose(axes.reduced + axes.features)
  by_position = by_position.reshape((math.prod(reduced_shape), *axes.shape(valid)))
  positions = jnp.unravel_index(jnp.argmax(by_position, axis=0), (1, *reduced_shape))[1:]
  channels = tuple(range(len(axes.features)))
  # Channel by channel: sharded channels then stay where they are.
  one_of_each = lax.GatherDimensionNumbers(
    offset_dims=(),
    collapsed_slice_dims=axes.reduced,
    start_index_map=axes.reduced,
    operand_batching_dims=axes.features,
    start_indices_batching_dims=channels,
  )
  along = [jnp.broadcast_to(p, axes.shape(x)) for p in positions]
  indices = jnp.stack(along, -1) if along else jnp.zeros((*axes.shape(x), 0), jnp.int32)
  first = lax.gather(x, indices, one_of_each, (1,) * x.ndim, mode="promise_in_bounds")
  first = first.astype(plan.sum_dtype)
  return axes.expand(jnp.where(by_position.any(axis=0), first, 0))
