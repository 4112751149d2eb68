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
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import _checks
from jaxbn._rule import accumulation_dtype, nonzero, once, promoting, recomputing, unshared

if TYPE_CHECKING:
  import chex

INT32_MAX = 2**31 - 1
_NEAR = 4  # squared distance of the mean from 0, in variances, up to which 0 is a good pivot
_SAMPLED = 8  # elements that make a pivot
_EXACT_ONES = 2**24  # of which a sum in float32 is exact


class Moments(NamedTuple):
  """What is known of a set of elements, per channel: how many, their mean, their variance.

  A commutative monoid under `merge`, exact up to rounding, whose identity has count zero
  (`empty_moments`).

  Attributes:
    count: number of elements, or sum of their weights. int32 for plain and masked elements: exact
      up to 2**31 - 1, where it stops; a NumPy number where it is known without looking at the data.
      Floating point for weights, and for more than 2**31 - 1 elements where that is known; to
      merge more than that, start from a floating-point count. Shape () where all channels share it,
      else one that broadcasts against mean.
    mean: mean per channel, of the channels' shape. float32 at least; complex for complex elements.
    var: E[|x - mean|^2] (divided by the count, not the count less one), real, of the same shape.
  """

  count: chex.Numeric
  mean: chex.Array
  var: chex.Array


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


def moments(
  x: chex.Array,
  axis: int | Sequence[int] = -1,
  *,
  mask: chex.Array | None = None,
  weights: chex.Array | None = None,
  use_fast_variance: bool = True,
  pivot: chex.Array | None = None,
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
      infinite and reaches no statistic and no gradient.
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
  valid, weight = valid_elements(x, mask, weights)
  if pivot is not None:
    pivot = constant_pivot(_checks.channels("pivot", pivot, x, axes), x.dtype)
  fast = _checks.static_bool("use_fast_variance", use_fast_variance)
  how = How(axes, fast)
  return measure(how, Elements(x, x.astype(accumulation_dtype(x.dtype)), valid, weight), pivot)


class How(NamedTuple):
  """How moments are taken, and with whom they are shared: what is known when tracing."""

  axes: _checks.Axes
  use_fast_variance: bool = True
  sample_pivot: bool = True  # False: 0, where the data has too few digits to need another
  axis_name: Any = None
  axis_index_groups: Any = None


class Elements(NamedTuple):
  """The elements of which there are moments, or their tangents; x and wide as in `_rule.Given`."""

  x: Any
  wide: Any
  valid: Any = None
  weight: Any = None


@promoting
def measure(how: How, elements: Elements, pivot: jax.Array | None = None) -> Moments:
  """`moments` of arguments that have been checked."""
  x, axes = elements.x, how.axes
  count = _count(x, axes, elements.valid if elements.weight is None else elements.weight)
  alone = how._replace(axis_name=None, axis_index_groups=None)
  pivot, mean, var = _around(alone, elements, None if is_known(count) else count, pivot)
  return Moments(count, pivot + mean, var)


class Around(NamedTuple):
  """The moments of d = x - pivot: the pivot, E[d] and the variance."""

  pivot: jax.Array
  mean: jax.Array
  var: jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _around(
  how: How, elements: Elements, count: jax.Array | None, pivot: jax.Array | None
) -> Around:
  """Around the pivot given, or else one that costs little where this runs.

  A count of None follows from the shape.
  """
  elements = elements._replace(wide=None)
  if pivot is not None:
    return _around_pivot(how, elements, count, pivot)
  return _around_any(how, elements, count)


@once
def _around_any(how: How, elements: Elements, count: jax.Array | None) -> Around:
  around_sample = functools.partial(_around_sample, how)
  around_0 = functools.partial(_around_pivot, how, pivot=None)
  # On CPUs a branch costs nothing, and subtracting in a sum half as much as the sum.
  by_branch = functools.partial(_around_0_where_near, how)
  default = around_sample if how.sample_pivot else around_0
  return lax.platform_dependent(elements, count, cpu=by_branch, default=default)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # traced once for both platforms
def _around_sample(how: How, elements: Elements, count: jax.Array | None) -> Around:
  pivot = _sample(elements.x, how.axes, elements.valid)
  return _around_pivot(how, elements, count, pivot)


def _around_0_where_near(how: How, elements: Elements, count: jax.Array | None) -> Around:
  """Around 0, and in channels whose mean is far from it, if there are any, around the sample."""
  sums = _sums(how, elements, count, None)
  first = _around_of(how, sums, elements, count)
  near = (abs_square(first.mean) < _NEAR * first.var) & jnp.isfinite(first.var) | (first.mean == 0)

  # The mean as the pivot, from now on. All in one array: for the CPU, each costs as much as all.
  # Each branch makes it from the sums: one made before would be copied.
  def around_0(near: jax.Array, sums: Any, *args: Any) -> jax.Array:
    _, mean, var = _around_of(how, sums, *args)
    # Zeros that vary as the rest does: under vmap on an explicit mesh, JAX stacks no others.
    return jnp.stack([mean, 0 * near.astype(mean.dtype), var])

  def elsewhere(near: jax.Array, sums: Any, *args: Any) -> jax.Array:
    return jnp.where(near, around_0(near, sums, *args), jnp.stack(_around_sample(how, *args)))

  pivot, mean, var = lax.cond(_all(near), around_0, elsewhere, near, sums, elements, count)
  return Around(pivot, mean, var.real)


@jax.custom_batching.custom_vmap
def _all(conditions: jax.Array) -> jax.Array:
  """Whether all hold; under vmap for the whole batch, so that a branch on it stays a branch."""
  return jnp.all(conditions)


@_all.def_vmap
def _(axis_size: int, batched: Any, conditions: jax.Array) -> tuple[jax.Array, bool]:
  return _all(conditions), False


def _around_pivot(
  how: How, elements: Elements, count: jax.Array | None, pivot: jax.Array | None
) -> Around:
  """The moments of d = x - pivot; None: around 0."""
  return _around_of(how, _sums(how, elements, count, pivot), elements, count, pivot)


def _sums(
  how: How, elements: Elements, count: jax.Array | None, pivot: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """The sums of d = x - pivot and of |d|^2, or in a second pass of |d - E[d]|^2."""
  total = functools.partial(_total, axes=how.axes, elements=elements)
  p = None if pivot is None else how.axes.expand(pivot)
  first = total(_from_pivot(elements, p))
  # The same once more, not shared: XLA would store it, to read it twice.
  d = _from_pivot(elements._replace(x=unshared(elements.x, 1)), _apart(p))
  if not how.use_fast_variance:
    # Around the mean of d, not of x: d holds all of x's digits, the mean of x is rounded.
    d = d - how.axes.expand(first / _divisor_of(how, elements.x, count))
  return first, total(abs_square(d))


def _around_of(
  how: How,
  sums: tuple[jax.Array, jax.Array],
  elements: Elements,
  count: jax.Array | None,
  pivot: jax.Array | None = None,
) -> Around:
  """E[d] and the variance, from the sums."""
  n = _divisor_of(how, elements.x, count)
  mean, second = sums[0] / n, sums[1] / n
  var = variance(second, mean) if how.use_fast_variance else second
  return Around(jnp.zeros_like(mean) if pivot is None else pivot, mean, var)


@functools.partial(_around.defjvp, symbolic_zeros=True)
@promoting
def _around_jvp(how: How, primals: Any, tangents: Any) -> tuple[Around, Around]:
  elements, count, _ = primals
  d_elements, d_count, _ = nonzero(tangents)
  values = _around(how, *primals)
  kept = elements._replace(wide=None)
  d_mean, d_var = _around_tangent(how, kept, count, values, d_elements, d_count)
  return values, Around(jnp.zeros_like(values.pivot), d_mean, d_var)


@once
def _around_tangent(how: How, *args: Any) -> tuple[jax.Array, jax.Array]:
  @recomputing
  def tangent(elements: Elements, *args: Any) -> Any:
    return d_mean_and_var(how, elements._replace(x=unshared(elements.x, 2)), *args)

  return tangent(*args)


def d_mean_and_var(
  how: How, elements: Elements, count: Any, values: Around, d: Elements, d_count: Any
) -> tuple[jax.Array, jax.Array]:
  """The tangents: dmean = E[dx], dvar = 2 E[(x - mean) dx], and what weights add.

  A count of None follows from the shape.
  """
  pivot, mean, var = values
  total = functools.partial(_total, axes=how.axes)
  p = how.axes.expand(pivot)
  # Apart from the forward pass's; where no pivot is taken, XLA shall see that it is 0.
  around = _from_pivot(elements, _apart(p) if how.sample_pivot else p)
  centered = around - how.axes.expand(mean)
  d_mean, d_var = jnp.zeros_like(mean), jnp.zeros_like(var)
  if d.wide is not None:
    d_mean = total(d.wide, elements=elements)
    # Around the pivot, near enough to lose nothing: one subtraction less than around the mean. The
    # order of the product decides what a TPU moves: the other way it is a quarter more.
    of_products = total((d.wide * around.conj()).real, elements=elements)
    d_var = 2 * (of_products - (mean.conj() * d_mean).real)
  if d.weight is not None:
    unweighted = elements._replace(weight=None)
    d_mean = d_mean + total(d.weight * centered, elements=unweighted)
    d_var = d_var + total(d.weight * abs_square(centered), elements=unweighted)
  if d_count is not None:
    d_var = d_var - var * d_count  # that of the mean is in d.weight * centered
  n = _divisor_of(how, elements.x, count)
  return d_mean / n, d_var / n


def _from_pivot(elements: Elements, pivot: jax.Array | None) -> jax.Array:
  """x - pivot, wide, and 0 where there is no element."""
  x = elements.x.astype(accumulation_dtype(elements.x.dtype))
  return zero_unless(elements.valid, x if pivot is None else x - pivot)


def _apart(pivot: Any) -> Any:
  return None if pivot is None else lax.optimization_barrier(pivot)


def _total(values: jax.Array, axes: _checks.Axes, elements: Elements) -> jax.Array:
  """The weighted sum, per channel, over the elements that exist."""
  values = zero_unless(elements.valid, values)
  if elements.weight is not None:
    values = values * elements.weight
  return jnp.sum(values, axes.reduced)


def abs_square(x: jax.Array) -> jax.Array:
  """|x|^2, real also where x is complex."""
  if jnp.iscomplexobj(x):
    return lax.square(x.real) + lax.square(x.imag)
  return lax.square(x)


def valid_elements(
  x: jax.Array, mask: chex.Array | None, weights: chex.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
  """Which elements of x exist, and their weights, aligned with x; None where all do, or weigh 1.

  A weight of 0 is a mask, and what is masked weighs 0.
  """
  valid = None if mask is None else _checks.boolean_mask(mask, x)
  if weights is None:
    return valid, None
  weight = _checks.nonnegative_weights(weights, x).astype(accumulation_dtype(x.real.dtype))
  valid = weight > 0 if valid is None else valid & (weight > 0)
  return valid, zero_unless(valid, weight)


def are_reliabilities(weights: chex.Array | None) -> bool:
  """Whether these weights say how far an element can be relied on, not how often it is there."""
  return weights is not None and jnp.issubdtype(jnp.result_type(weights), jnp.floating)


def sum_of_squares(how: How, elements: Elements) -> jax.Array:
  """sum w^2 per channel, of the smallest shape."""
  return jnp.asarray(_count(elements.x, how.axes, jnp.square(elements.weight)))


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


def constant_pivot(pivot: chex.Array, dtype: Any) -> jax.Array:
  """A pivot as given: no path for gradients, and 0 where it is not finite."""
  if jnp.iscomplexobj(pivot) and not jnp.issubdtype(dtype, jnp.complexfloating):
    raise TypeError(f"pivot is complex, but x is not: {dtype}. Pass the real part.")
  pivot = lax.stop_gradient(jnp.asarray(pivot, dtype))
  return jnp.where(jnp.isfinite(pivot), pivot, 0)


def require_moments(value: Any) -> None:
  """Refuses what is not Moments."""
  if not isinstance(value, Moments):
    raise TypeError(
      f"a {type(value).__name__} was given; jaxbn.Moments are needed, such as jaxbn.moments(x)."
    )


def zero_unless(valid: jax.Array | None, x: jax.Array) -> jax.Array:
  # A select, not a product: 0 * NaN is NaN, in the value and in the gradient.
  return x if valid is None else jnp.where(valid, x, 0)


def divisor(count: chex.Numeric, dtype: Any) -> chex.Numeric:
  """The count to divide by: 1 where there is nothing to divide."""
  if is_known(count):
    return np.where(np.asarray(count) > 0, count, 1).astype(dtype)
  count = jnp.asarray(count, dtype)
  return jnp.where(count > 0, count, 1)


def occupied(count: chex.Numeric) -> Any:
  """Whether a channel has elements; True itself where all are known to have."""
  if is_known(count) and np.all(np.asarray(count) > 0):
    return True
  return jnp.asarray(count) > 0


def where(condition: Any, value: jax.Array, otherwise: chex.Numeric) -> jax.Array:
  """jnp.where, and no operation at all where the condition is True itself."""
  if condition is True:
    return value
  condition, value, otherwise = sharded_alike(condition, value, otherwise)
  return jnp.where(condition, value, otherwise)


def sharded_alike(*values: Any) -> tuple[Any, ...]:
  """Values per channel, on an explicit mesh sharded as that which is sharded most: for a select."""
  shardings = [jax.typeof(v).sharding for v in values if np.ndim(v)]
  shardings = [s for s in shardings if s.mesh.explicit_axes]
  if not shardings:
    return values
  most = max(shardings, key=lambda s: sum(axis is not None for axis in s.spec))
  return tuple(jax.sharding.reshard(v, most) if np.ndim(v) else v for v in values)


def _divisor_of(how: How, x: jax.Array, count: chex.Numeric | None) -> chex.Numeric:
  """The count of x's elements to divide by; one of None follows from the shape."""
  real = accumulation_dtype(jnp.finfo(x.dtype).dtype)
  return divisor(_size(x, how.axes) if count is None else count, real)


def _sample(x: jax.Array, axes: _checks.Axes, valid: jax.Array | None) -> jax.Array:
  """A pivot for each channel, from a few of its elements, broadcasting against x.

  The average of eight, which is seldom far from the mean; with a mask the first valid one, or 0.
  """
  x = lax.stop_gradient(x)
  sharding = jax.typeof(x).sharding
  if sharding.mesh.explicit_axes:
    # A few elements cannot keep the batch's sharding, nor does indexing give that up by itself.
    kept = (sharding.spec[a] for a in axes.features)
    local = jax.sharding.auto_axes(
      lambda x, valid: _sample(x, axes, valid),
      axes=sharding.mesh.explicit_axes,
      out_sharding=jax.NamedSharding(sharding.mesh, jax.P(*kept)),
    )
    return local(x, valid)
  pivot = _average_of_some(x, axes) if valid is None else _first_valid(x, axes, valid)
  return lax.squeeze(_apart(jnp.where(jnp.isfinite(pivot), pivot, 0)), axes.reduced)


def _average_of_some(x: jax.Array, axes: _checks.Axes) -> jax.Array:
  """The average of the first elements along one axis: of eight if there are, of a power of two."""
  usable = {a: 1 if is_symbolic(x.shape[a]) else x.shape[a] for a in axes.reduced}
  along = max(usable, key=lambda a: min(usable[a], _SAMPLED), default=None)
  sizes = dict.fromkeys(axes.reduced, 1)
  if along is not None:
    sizes[along] = 1 << min(usable[along], _SAMPLED).bit_length() - 1
  p = x
  for a in sorted(sizes, key=lambda a: a == along):
    p = lax.slice_in_dim(p, 0, sizes[a], axis=a)
  p = p.astype(accumulation_dtype(x.dtype))
  while along is not None and p.shape[along] > 2:
    # In pairs, and halved first: exact where all are equal, and no overflow.
    first, second = jnp.split(0.5 * p, 2, along)
    p = first + second
  # A sum, so that under sharded jit every device has the result.
  return jnp.sum(p if along is None else p / p.shape[along], axes.reduced, keepdims=True)


def _first_valid(x: jax.Array, axes: _checks.Axes, valid: jax.Array) -> jax.Array:
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
  first = first.astype(accumulation_dtype(x.dtype))
  return axes.expand(jnp.where(by_position.any(axis=0), first, 0))


def _count(x: jax.Array, axes: _checks.Axes, counted: jax.Array | None) -> chex.Numeric:
  """The number of valid elements (or the sum of weights) per channel, of the smallest shape."""
  if counted is None:
    return _size(x, axes)
  whole, own = (math.prod(a.shape[i] for i in axes.reduced) for a in (x, counted))
  # Counting the mask as it is, not broadcast, is exact and costs little.
  integer = counted.dtype == jnp.bool_ and (is_symbolic(whole) or whole <= INT32_MAX)
  real = accumulation_dtype(x.real.dtype)
  # Under jit with sharded arrays a sum of the dtype of the others is one all-reduce with them.
  exact = not is_symbolic(own) and own <= _EXACT_ONES
  count = jnp.sum(counted, axes.reduced, dtype=jnp.int32 if integer and not exact else real)
  dtype = jnp.int32 if integer else real
  count = count.astype(dtype) * jnp.asarray(whole // own, dtype)
  return count.reshape(()) if count.size == 1 else count


def _size(x: jax.Array, axes: _checks.Axes) -> chex.Numeric:
  sizes = [x.shape[a] for a in axes.reduced]
  whole = math.prod(sizes)
  if is_symbolic(whole):
    about = math.prod(jnp.asarray(n).astype(jnp.float32) for n in sizes)
    return jnp.where(about < 2.0**31, jnp.asarray(whole).astype(jnp.int32), INT32_MAX)
  return np.int32(whole) if whole <= INT32_MAX else np.float32(whole)


def is_symbolic(size: Any) -> bool:
  """Whether a program is exported for any size, and learns it when it runs."""
  return not isinstance(size, int)


def is_known(count: chex.Numeric) -> bool:
  """Whether a count follows from shapes alone, and so is the same on every device."""
  return isinstance(count, int | float | np.generic | np.ndarray)


def is_integer(count: chex.Numeric) -> bool:
  return jnp.issubdtype(jnp.result_type(count), jnp.integer)
