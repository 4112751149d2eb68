r"""Share: from the moments of pieces to those of the whole. `merge` for two, `sync` for devices.

One all-reduce carries the sums over devices of n_i mean_i and n_i |mean_i|^2 in digits that add up
without rounding (`_digits.py`). So the sums around any p follow as if all devices had known it:

    sum_i n_i (mean_i - p)     = sum_i n_i mean_i - p N
    sum_i n_i |mean_i - p|^2   = sum_i n_i |mean_i|^2 - 2 p sum_i n_i mean_i + p^2 N

p is the mean of all, rounded to half of its digits, so that what E[|d|^2] - |E[d]|^2 loses around
it, u |mean - p|^2, is of the size of what the rounding of the mean itself does, (u |mean|)^2.

Derivatives need none of these digits. With M and V the mean and the variance of all,

    dM = sum_i (n_i dmean_i + dn_i (mean_i - M)) / N
    dV = sum_i (n_i (dvar_i + 2 (mean_i - M) dmean_i) + dn_i (var_i + |mean_i - M|^2 - V)) / N

so that one all-reduce of two numbers per channel carries them, forward or backward.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxbn import _checks, _counts, _digits
from jaxbn._counts import divisor, is_integer, is_known, occupied, where
from jaxbn._dtypes import promoting
from jaxbn._measure import abs_square, variance
from jaxbn._types import Inputs, Moments, Numeric, Plan
from jaxbn._xla import nonzero


def merge(a: Moments, b: Moments) -> Moments:
  r"""The moments of two disjoint sets of elements together.

      count = n_a + n_b,   delta = mean_b - mean_a
      mean  = mean_a + delta * n_b / count
      var   = var_a n_a/count + var_b n_b/count + |delta|^2 n_a n_b / count^2

  (Chan, Golub & LeVeque 1983, equation 2.1). Nothing cancels: all terms of var are positive.

  Args:
    a: moments of one set.
    b: moments of another, of the same channels' shape.

  Returns:
    Moments of the union. With count zero on one side, exactly the other side.

  Raises:
    TypeError: an argument that is not Moments.
    ValueError: different channels' shapes.

  >>> import jax.numpy as jnp, jaxbn
  >>> x = jnp.array([[0.0], [2.0], [7.0]])
  >>> both = jaxbn.merge(jaxbn.moments(x[:2]), jaxbn.moments(x[2:]))
  >>> int(both.count), both.mean.tolist()
  (3, [3.0])
  """
  _checks.is_moments(a)
  _checks.is_moments(b)
  if jnp.shape(a.mean) != jnp.shape(b.mean):
    raise ValueError(
      f"the moments to merge have channels of shape {jnp.shape(a.mean)} and {jnp.shape(b.mean)}: "
      "only moments of the same channels can be merged."
    )
  return Moments(*merge_moments(a, b, abs_square))


@promoting
def merge_moments(
  a: Sequence[Any], b: Sequence[Any], square: Callable[[jax.Array], jax.Array]
) -> tuple[Numeric, jax.Array, jax.Array]:
  """The count, the mean and the variance, or covariance, of two sets of elements together."""
  (count_a, mean_a, var_a), (count_b, mean_b, var_b) = a, b
  real = jnp.promote_types(var_a.dtype, var_b.dtype)
  n_a, n_b = jnp.asarray(count_a, real), jnp.asarray(count_b, real)
  n = divisor(n_a + n_b, real)
  share_a, share_b = n_a / n, n_b / n
  # A side without elements has no mean: it is neither at a distance nor, if huge, 0 times infinity.
  delta = jnp.where((n_a > 0) & (n_b > 0), mean_b - mean_a, 0)
  mean = jnp.where(n_a > 0, mean_a, mean_b) + delta * share_b
  var = var_a * share_a + var_b * share_b + square(delta) * (share_a * share_b)
  return _counts.add(count_a, count_b), mean, var


def sync(
  moments: Moments,
  axis_name: Any,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
  r"""The moments of the elements of all devices along a named axis, from each device's own.

  With n_i, mean_i, var_i those of device i and N = sum_i n_i:

      mean = sum_i n_i mean_i / N
      var  = sum_i n_i (var_i + |mean_i - mean|^2) / N

  so that devices with more valid elements weigh more and a device with none does not count:
  these are the statistics of all valid elements together, not a mean of means. One all-reduce does
  it, of eight values per channel (and the counts, where they depend on a mask), and its transpose
  takes two; nothing cancels, however far the means are from 0 (the head of the file says why).

  Args:
    moments: this device's. A count that is a Python or NumPy number must be the same on every
      device, as it is where `moments` gives one.
    axis_name: name (or tuple of names) of a bound axis of pmap, shard_map or vmap.
    axis_index_groups: indices along that axis in groups, each sharing among itself only. Under
      vmap, and shard_map with its checks on, JAX has no grouped reduction: one over the whole axis
      is used that is as many times larger as there are groups; under shard_map, where that is
      less, a gather within the group.

  Returns:
    Moments, the same on every device of a group.

  Raises:
    TypeError: moments that are not Moments.
    ValueError: axis_name is not bound; the groups do not partition the axis.

  >>> import jax, jax.numpy as jnp, jaxbn
  >>> x = jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]])  # two devices, two examples each
  >>> share = lambda x: jaxbn.sync(jaxbn.moments(x), "batch")
  >>> jax.vmap(share, axis_name="batch")(x).mean.tolist()
  [[3.0], [3.0]]
  """
  _checks.is_moments(moments)
  return _shared(moments, *_checks.sharing(axis_name, axis_index_groups))


def share(plan: Plan, moments: Moments) -> Moments:
  """`sync`, with the devices of a plan."""
  return _shared(moments, plan.axis_name, plan.axis_index_groups)


def _shared(moments: Moments, axis_name: Any, groups: Any) -> Moments:
  count, mean, var = moments
  sharing = Sharing.among(axis_name, groups)
  count, mean, var = share_moments(sharing, count, mean[None], var[None])
  return Moments(count, mean[0], var[0])


class Sharing(NamedTuple):
  """With whom moments are shared, and what products of means are part of.

  Means and variances have one row, along a first axis of their own; covariances within groups of
  channels have one for each channel of a group.
  """

  axis_name: Any
  groups: tuple[tuple[int, ...], ...] | None
  sizes: tuple[int, ...]  # of the groups
  times: Callable[[jax.Array, jax.Array], jax.Array] = jnp.multiply
  central: Callable[[jax.Array, jax.Array], jax.Array] = variance  # from E[d d] and E[d]

  @classmethod
  def among(cls, axis_name: Any, groups: Any, *how: Any) -> Sharing:
    """The devices of an axis that is bound here: where a derivative is taken, it may not be."""
    size = _checks.axis_size(axis_name)
    sizes = {size} if groups is None else {len(group) for group in groups}
    return cls(axis_name, groups, tuple(sizes), *how)

  def cross(self, a: jax.Array, terms: jax.Array) -> jax.Array:
    """a b + b a, of a sum b, in terms."""
    if self.times is jnp.multiply:
      return 2 * a * terms
    return jnp.concatenate([self.times(a, terms), self.times(terms, a)])

  def square(self, halves: jax.Array) -> jax.Array:
    """b b, of a sum b of two halves, in terms."""
    upper, lower = halves
    ends = jnp.stack([self.times(upper, upper), self.times(lower, lower)])
    return jnp.concatenate([ends, self.cross(upper, lower[None])])

  def sum(self, values: list[jax.Array]) -> list[jax.Array]:
    return sum_over_devices(values, self.axis_name, self.groups)


@promoting
def share_moments(
  sharing: Sharing, count: Numeric, mean: jax.Array, var: jax.Array
) -> tuple[Numeric, jax.Array, jax.Array]:
  """The count, the mean and the variance, or covariance, of all devices."""
  if is_known(count) and len(sharing.sizes) == 1:
    # Every device weighs the same: there are no counts to send.
    _, mean, var = _combine(sharing, None, mean, var)
    count = _counts.multiply_known(count, *sharing.sizes)
    return count, where(occupied(count), mean, 0), var
  aligned = jnp.reshape(count, (1,) * (mean.ndim - np.ndim(count)) + np.shape(count))
  # The mean of a device without elements is a placeholder: it lies at no distance.
  mean = where(occupied(aligned), mean, 0)
  terms, mean, var = _combine(sharing, aligned, mean, var)
  count_of_all = _counts.from_high_and_low(terms) if is_integer(count) else jnp.sum(terms, 0)
  return count_of_all.reshape(np.shape(count)), mean, var


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _combine(
  sharing: Sharing, count: jax.Array | None, mean: jax.Array, var: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The count, in terms of which none is rounded, the mean and the variance of all devices.

  A count of None is the same everywhere: each device counts as 1.
  """
  dtype, parts = var.dtype, len(_real_parts(mean))
  sums, *counts_sent = sharing.sum(_to_send(sharing, count, mean, var))
  if count is None:
    known = _digits.halves_of_known(max(sharing.sizes), dtype)
    counts = halves_of_n = jnp.asarray(known.reshape(-1, *(1,) * mean.ndim))
  else:
    (counts,) = counts_sent
    halves_of_n = _digits.halves(counts)
  n = divisor(jnp.sum(counts, 0), dtype)
  around_0 = jnp.sum(sums, 0) / n
  p = _digits.upper_half(around_0[:parts])
  first = jnp.concatenate([sums[:, :parts], -halves_of_n * p])
  second = [sums[:, parts:]]
  for i in range(parts):
    part = slice(i, i + 1)
    second.append(-sharing.cross(p[part], _digits.halves(sums[:, part])))
    second.append(_digits.products(halves_of_n, sharing.times(p[part], p[part])[None]))
  around_p = _digits.total(_beside(first, jnp.concatenate(second))) / n
  mean = _complex(p + around_p[:parts])
  var = sharing.central(around_p[parts:], _complex(around_p[:parts]))
  # Where squares overflow, those around 0 say that the variance is infinite.
  overflown = sharing.central(around_0[parts:], mean)
  return counts, mean, jnp.where(jnp.isfinite(around_p[parts:]), var, overflown)


def _to_send(
  sharing: Sharing, count: jax.Array | None, mean: jax.Array, var: jax.Array
) -> list[jax.Array]:
  """In pieces: n mean, in its real parts, and below it n (mean^2 + var); and n if not known."""
  dtype, parts = var.dtype, _real_parts(mean)
  bits = _digits.significand(dtype) - (max(sharing.sizes) - 1).bit_length()
  squares = [sharing.square(_digits.halves(m[None])) for m in parts]
  terms = _beside(jnp.concatenate(parts)[None], jnp.concatenate(squares))
  about = jnp.concatenate([*parts, 0.5 * _twice_product(sharing, mean, mean)])
  more = jnp.concatenate([*map(jnp.zeros_like, parts), var])
  if count is None:
    return [_digits.pieces(terms, about, more, bits=bits)]
  n = count.astype(dtype)
  weight = _counts.high_and_low(count, dtype) if is_integer(count) else n[None]
  terms = _digits.products(_digits.halves(weight), terms)
  return [
    _digits.pieces(terms, n * about, n * more, bits=bits),
    weight if is_integer(count) else _digits.pieces(weight, n, jnp.zeros_like(n), bits=bits),
  ]


def _beside(few: jax.Array, many: jax.Array) -> jax.Array:
  """Terms of some sums beside more terms of others."""
  there_are_no_more = [(0, len(many) - len(few))] + [(0, 0)] * (few.ndim - 1)
  return jnp.concatenate([jnp.pad(few, there_are_no_more), many], 1)


@functools.partial(_combine.defjvp, symbolic_zeros=True)
@promoting
def _combine_jvp(sharing: Sharing, primals: Any, tangents: Any) -> tuple[Any, Any]:
  count, mean, var = primals
  d_count, d_mean, d_var = nonzero(tangents)
  counts, mean_of_all, var_of_all = values = _combine(sharing, *primals)
  n = jnp.ones((), var.dtype) if count is None else count.astype(var.dtype)
  distance = mean - mean_of_all
  both = [jnp.zeros_like(mean), jnp.zeros_like(var)]
  if d_mean is not None:
    both = [n * d_mean, n * _twice_product(sharing, distance, d_mean)]
  if d_var is not None:
    both[1] = both[1] + n * d_var
  if d_count is None:
    first, second = sharing.sum(both)
    d_counts = jnp.zeros_like(counts)
  else:
    both[0] = both[0] + d_count * distance
    square = 0.5 * _twice_product(sharing, distance, distance)
    both[1] = both[1] + d_count * (var + square - var_of_all)
    first, second, d_n = sharing.sum([*both, d_count])
    d_counts = jnp.zeros_like(counts).at[-1].set(d_n)
  n = divisor(jnp.sum(counts, 0), var.dtype)
  return values, (d_counts, first / n, second / n)


def _twice_product(sharing: Sharing, a: jax.Array, b: jax.Array) -> jax.Array:
  """a b + b a, of the real parts."""
  pairs = zip(_real_parts(a), _real_parts(b), strict=True)
  return functools.reduce(
    operator.add, (sharing.times(v, w) + sharing.times(w, v) for v, w in pairs)
  )


def _real_parts(x: jax.Array) -> list[jax.Array]:
  return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _complex(parts: jax.Array) -> jax.Array:
  return lax.complex(parts[:1], parts[1:]) if len(parts) == 2 else parts


@promoting
def worth(plan: Plan, inputs: Inputs, batch: Moments) -> Moments:
  """With (sum w)^2 / sum w^2 for the count: what as many equal weights tell (Kish 1965)."""
  squares = _counts.count_of(plan.axes, inputs.x, jnp.square(inputs.weight))
  return batch._replace(count=of_equal_weights(plan, batch.count, squares))


def of_equal_weights(plan: Plan, count: Any, squares: Any) -> jax.Array:
  """(sum w)^2 / sum w^2, of a count that all devices share and this device's sum of squares."""
  if plan.axis_name is not None:
    (squares,) = sum_over_devices([squares], plan.axis_name, plan.axis_index_groups)
  return jnp.square(count) / divisor(squares, squares.dtype)


def sum_over_devices(
  values: list[jax.Array], axis_name: Any, groups: tuple[tuple[int, ...], ...] | None
) -> list[jax.Array]:
  """The sums of several arrays over the devices of one's group, by a single all-reduce."""
  if any(jax.typeof(v).sharding.mesh.explicit_axes for v in values):
    # Inside of a shard_map over some axes, channels may be sharded over another: they stay there.
    return [_psum_in_groups(v, axis_name, groups) for v in values]
  flat, unflatten = ravel_pytree(values)
  return unflatten(_psum_in_groups(flat, axis_name, groups))


def _psum_in_groups(
  x: jax.Array, axis_name: Any, groups: tuple[tuple[int, ...], ...] | None
) -> jax.Array:
  if groups is None:
    return lax.psum(x, axis_name)
  # vmap has no grouped psum, and says so only when a jit inside it is batched: ask the mesh.
  if set(_checks.axis_names(axis_name)) <= set(jax.sharding.get_abstract_mesh().manual_axes):
    try:
      return lax.psum(x, axis_name, axis_index_groups=groups)
    except NotImplementedError:  # shard_map with its checks on
      if {len(g) for g in groups} == {(size := len(groups[0]))} and size < len(groups):
        # Many small groups: the parts of one are fewer than a table of all groups has rows.
        return jnp.sum(lax.all_gather(x, axis_name, axis_index_groups=groups), 0)
  group_of = np.zeros(sum(map(len, groups)), np.int32)
  for g, members in enumerate(groups):
    group_of[list(members)] = g
  mine = jnp.asarray(group_of)[lax.axis_index(axis_name)]
  rows = jnp.where(jnp.arange(len(groups))[:, None] == mine, x, 0)
  return lax.psum(rows, axis_name)[mine]
