"""What the steps are told, and what they hand to each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

INT32_MAX = 2**31 - 1

Array: TypeAlias = jax.Array | np.ndarray
Numeric: TypeAlias = Array | np.number | float


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

  count: Numeric  # type: ignore[assignment]  # tuple's method gives way
  mean: jax.Array
  var: jax.Array


class RunningStats(NamedTuple):
  """The state of one layer: what evaluation normalizes by.

  Attributes:
    mean: running mean, of the channels' shape.
    var: running variance, real, of the same shape.
    count: how many updates each channel has had, of the same shape; only where `debias` or a
      cumulative average needs it, else None, so that the leaves are those of Flax. float32, so that
      it stays what it is where all statistics are averaged over devices; integers will do.
  """

  mean: jax.Array
  var: jax.Array
  count: jax.Array | None = None  # type: ignore[assignment]  # tuple's method gives way


class Chosen(NamedTuple):
  """What normalizes: z = (x - mean) / sqrt(var + epsilon) * scale + bias.

  Each is of the shape of the channels, or broadcasts against x with as many axes as x. The layer's
  own scale and bias are applied to z.

  Attributes:
    mean: what is subtracted.
    var: real, not negative.
    scale: correction of z, such as r of batch renormalization, or None for 1.
    bias: likewise, such as d of batch renormalization, or None for 0.
  """

  mean: jax.Array
  var: jax.Array
  scale: jax.Array | None = None
  bias: jax.Array | None = None


Choose: TypeAlias = Callable[[Moments, RunningStats | None], Chosen]


class Options(TypedDict, total=False):
  """The options of `batch_norm`, for type checkers."""

  axis: int | Sequence[int]
  momentum: Numeric | None
  epsilon: float
  mask: Array | None
  weights: Array | None
  masked_value: float | None
  axis_name: Any
  axis_index_groups: Sequence[Sequence[int]] | None
  virtual_batch_size: int | str | None
  use_fast_variance: bool
  debias: bool
  unbiased: bool
  skip_nonfinite: bool
  detach_stats: bool
  choose: Choose | None
  activation: Callable[[jax.Array], jax.Array] | None
  residual: Array | None
  dtype: Any


class Axes(NamedTuple):
  """How an array's axes divide into those of the channels and those summed over.

  Both are sorted; `features` are the channels' axes, `reduced` all others.
  """

  features: tuple[int, ...]
  reduced: tuple[int, ...]

  def shape(self, x: jax.Array) -> tuple[int, ...]:
    """The shape of one statistic of x: its sizes along the channel axes."""
    return tuple([x.shape[a] for a in self.features])

  def expand(self, statistic: jax.Array) -> jax.Array:
    """A statistic with the summed axes put back as ones, so that it broadcasts against x."""
    return jnp.expand_dims(statistic, self.reduced)

  def size(self, x: jax.Array) -> Numeric:
    """How many elements a channel of x has, as a count of `Moments`."""
    sizes = [x.shape[a] for a in self.reduced]
    whole = math.prod(sizes)
    if isinstance(whole, int):
      return np.int32(whole) if whole <= INT32_MAX else np.float32(whole)
    # Exported for any size: the program learns it when it runs.
    about = math.prod(jnp.asarray(n).astype(jnp.float32) for n in sizes)
    return jnp.where(about < 2.0**31, jnp.asarray(whole).astype(jnp.int32), INT32_MAX)


class Groups(NamedTuple):
  """How the examples of x are grouped, where there is more than one virtual batch."""

  axis: int  # of the examples
  size: int  # examples of x in one group
  number: int  # of groups that x holds, or holds a part of
  axis_name: Any  # of the devices that share a group
  axis_index_groups: tuple[tuple[int, ...], ...] | None
  everyone: Any  # axis_name of all devices


class Tracking(NamedTuple):
  """How the running statistics follow those of the batches."""

  momentum: Numeric | None = 0.99  # may be traced
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False


class Plan(NamedTuple):
  """What is known when tracing: how the steps go."""

  axes: Axes
  sum_dtype: Any = None  # in which all is computed: float32 at least
  dtype: Any = None  # of y
  use_running_average: bool = False
  activation: Callable[..., jax.Array] | None = None
  activation_dtype: Any = None  # of what the activation is given
  activation_lasts: bool = True  # as long as the process, so that JAX's caches may hold it
  use_fast_variance: bool = True
  sample_pivot: bool = True  # False: 0, where the data has too few digits to need another
  detach_stats: bool = False
  axis_name: Any = None
  axis_index_groups: tuple[tuple[int, ...], ...] | None = None
  groups: Groups | None = None
  count_by_worth: bool = False  # what weights are worth, where they say how reliable an element is


class Inputs(NamedTuple):
  """The arrays that the steps read, aligned with x, or their tangents; None where there is none.

  `x` is for values and `wide_x`, the same in the dtype of sums, for its first tangent: the parts of
  x's gradient cancel, and so are added before they are rounded; but x is what is kept.
  """

  x: Any
  wide_x: Any = None
  valid: Any = None  # which elements exist
  weight: Any = None  # 0 where they do not
  scale: Any = None
  bias: Any = None
  residual: Any = None
  epsilon: Any = None
  constants: tuple[Any, ...] = ()  # further arguments of the activation
  masked_value: Any = None
