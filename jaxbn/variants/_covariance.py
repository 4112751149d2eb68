"""Measure and share, for whitening: the mean and the covariance of groups of channels."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks
from jaxbn._arguments import valid_elements
from jaxbn._counts import divisor
from jaxbn._dtypes import wide
from jaxbn._measure import measure
from jaxbn._meshes import by_partitioner
from jaxbn._names import shown
from jaxbn._share import Sharing, merge_moments, share_moments
from jaxbn._types import Array, Axes, Inputs, Numeric, Plan
from jaxbn._xla import recomputing


class CovarianceMoments(NamedTuple):
  """What is known of a set of elements, each a vector of channels: `Moments` with a covariance.

  A commutative monoid under `merge`, exact up to rounding.

  Attributes:
    count: number of elements, or sum of their weights, of shape (), as in `jaxbn.Moments`.
    mean: mean per channel, of shape (channels,). float32 at least.
    cov: E[(x - mean)(x - mean)^T] within each group of channels, of shape (groups, g, g).
  """

  count: Numeric  # type: ignore[assignment]  # tuple's method gives way
  mean: jax.Array
  cov: jax.Array


def covariance(
  x: Array,
  group_size: int = 16,
  *,
  axis: int = -1,
  mask: Array | None = None,
  weights: Array | None = None,
) -> CovarianceMoments:
  r"""Count, mean, and covariance within each group of consecutive channels.

  For the valid elements x_i, vectors of the channels of a group, with weights w_i:

      count = sum_i w_i
      mean  = sum_i w_i x_i / count
      cov   = sum_i w_i (x_i - mean)(x_i - mean)^T / count

  in two passes, the second around the mean that the first has found, in float32 at least.

  Args:
    x: real array of any rank.
    group_size: how many channels a group has; it divides their number.
    axis: the channels' axis; all others are summed over.
    mask: boolean, broadcasts against x, the same for all channels: where False, the element does
      not exist, may be NaN or infinite, and reaches no statistic and no gradient.
    weights: real, not negative, likewise: how often each element counts.

  Returns:
    CovarianceMoments. Without a valid element all of them are 0.

  Raises:
    TypeError: integer or complex x; several axes; a mask that is not boolean.
    ValueError: a group_size that does not divide the channels; a mask or weights that do not
      broadcast, or that differ between channels; an axis out of range; an empty batch.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import whitening
  >>> m = whitening.covariance(jnp.array([[1.0, 0.0], [3.0, 4.0]]), group_size=2)
  >>> m.mean.tolist(), m.cov.tolist()
  ([2.0, 2.0], [[[1.0, 2.0], [2.0, 4.0]]])
  """
  x = real(x)
  axes = one_axis(x, axis)
  _checks.nonempty(x, axes)
  group_size = require_group_size(group_size, *axes.shape(x))
  inputs = Inputs(x, wide(x), *valid_elements(x, mask, weights))
  require_alike(x, axes, mask, weights)
  return measure_covariance(Plan(axes), inputs, group_size)


def merge(a: CovarianceMoments, b: CovarianceMoments) -> CovarianceMoments:
  r"""The moments of two disjoint sets of elements together.

      count = n_a + n_b,   delta = mean_b - mean_a
      mean  = mean_a + delta * n_b / count
      cov   = cov_a n_a/count + cov_b n_b/count + delta delta^T n_a n_b / count^2

  (Chan, Golub & LeVeque 1983, equation 2.1, for vectors.)

  Args:
    a: moments of one set.
    b: moments of another, of the same groups of channels.

  Returns:
    CovarianceMoments of the union. With count zero on one side, exactly the other side.

  Raises:
    ValueError: different channels or groups.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import whitening
  >>> x = jnp.array([[0.0, 0.0], [2.0, 2.0], [4.0, 1.0], [2.0, 1.0]])
  >>> both = whitening.merge(whitening.covariance(x[:1], 2), whitening.covariance(x[1:], 2))
  >>> both.mean.round(3).tolist(), both.cov.round(3).tolist()
  ([2.0, 1.0], [[[2.0, 0.5], [0.5, 0.5]]])
  """
  if jnp.shape(a.mean) != jnp.shape(b.mean) or jnp.shape(a.cov) != jnp.shape(b.cov):
    raise ValueError(
      f"the moments to merge have covariances of shape {jnp.shape(a.cov)} and {jnp.shape(b.cov)}: "
      "only moments of the same groups of channels can be merged."
    )
  return CovarianceMoments(*merge_moments(a, b, lambda delta: _outer(delta, a.cov)))


def measure_covariance(plan: Plan, inputs: Inputs, group_size: int) -> CovarianceMoments:
  """`covariance` of arguments that have been checked."""
  local = functools.partial(_measure_here, plan.axes, group_size)
  whole: Any = jax.P()
  everywhere = CovarianceMoments(whole, whole, whole)
  return by_partitioner(local, inputs.wide_x, everywhere)(
    inputs.wide_x, inputs.valid, inputs.weight
  )


def _measure_here(
  axes: Axes, group_size: int, x: jax.Array, valid: Any, weight: Any
) -> CovarianceMoments:
  constant = lax.stop_gradient(x)
  first = measure(Plan(axes), Inputs(constant, constant, valid, weight))
  # A pivot, and so no path for gradients: they go through the moments around it.
  center = lax.stop_gradient(first.mean)
  sums = recomputing(functools.partial(_sums_around, axes, group_size))
  n = divisor(first.count, x.dtype)
  total, products = (s / n for s in sums(x, center, valid, weight))
  return CovarianceMoments(first.count, center + total.reshape(-1), _covariance(products, total))


def _sums_around(
  axes: Axes, group_size: int, x: jax.Array, center: jax.Array, valid: Any, weight: Any
) -> tuple[jax.Array, jax.Array]:
  """The weighted sums of d and d d^T, d = x - center, of shapes (groups, g) and (groups, g, g)."""
  d = x - axes.expand(center)
  d = d if valid is None else jnp.where(valid, d, 0)
  weighted = d if weight is None else d * weight
  d, weighted = (grouped(v, axes, group_size) for v in (d, weighted))
  elements = tuple(range(1, d.ndim - 1))
  products = lax.dot_general(
    weighted, d, ((elements, elements), ((0,), (0,))), precision=lax.Precision.HIGHEST
  )
  return jnp.sum(weighted, elements), products


def share(moments: CovarianceMoments, axis_name: Any, groups: Any) -> CovarianceMoments:
  """The moments of all devices, as by `jaxbn.sync`, for vectors."""
  count, mean, cov = moments
  sharing = Sharing.among(axis_name, groups, _outer_of_rows, _covariance_of_rows)
  row = mean.reshape(1, *cov.shape[:2])
  count, row, rows = share_moments(sharing, count, row, jnp.swapaxes(cov, 0, 1))
  return CovarianceMoments(count, row.reshape(mean.shape), jnp.swapaxes(rows, 0, 1))


def _outer_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.swapaxes(a, -3, -1) * b


def _covariance_of_rows(products: jax.Array, mean: jax.Array) -> jax.Array:
  return jnp.swapaxes(_covariance(jnp.swapaxes(products, 0, 1), mean[0]), 0, 1)


def _covariance(products: jax.Array, mean: jax.Array) -> jax.Array:
  """E[d d^T] - E[d] E[d]^T, and what rounding may have taken of it, on the diagonal.

  The difference is off by u |E[d]|^2. Added, an eigenvalue that is lost is too large and not zero,
  or negative, which W would divide by; a larger one changes by no more than its rounding.
  """
  lost = jnp.finfo(mean.dtype).eps * jnp.sum(lax.square(mean), -1)[:, None, None]
  identity = jnp.eye(mean.shape[-1], dtype=mean.dtype)[None]
  return products - _outer(mean, products) + lax.stop_gradient(lost) * identity


def _outer(mean: jax.Array, like: jax.Array) -> jax.Array:
  """mean mean^T of each group."""
  v = mean.reshape(like.shape[:2])
  return v[:, :, None] * v[:, None, :]


def grouped(x: jax.Array, axes: Axes, group_size: int) -> jax.Array:
  """x with the groups on the first axis and the channels of each on the last."""
  (axis,) = axes.features
  x = jnp.moveaxis(x, axis, -1)
  shape = (*x.shape[:-1], x.shape[-1] // group_size, group_size)
  return jnp.moveaxis(x.reshape(shape), -2, 0)


def real(x: Any, name: str = "x") -> jax.Array:
  x = _checks.inexact(x, name)
  if jnp.iscomplexobj(x):
    raise TypeError(
      f"{name} has dtype {x.dtype}; whitening is for real channels: pass the real and imaginary "
      "parts as channels of their own."
    )
  return x


def one_axis(x: jax.Array, axis: Any) -> Axes:
  axes = _checks.split_axes(x.ndim, axis)
  if len(axes.features) != 1:
    raise ValueError(
      f"axis={shown(axis)}: whitening needs one axis of channels, for groups are cut along it: "
      "reshape x so that the channels have one axis."
    )
  return axes


def require_group_size(group_size: Any, channels: int) -> int:
  try:
    if isinstance(group_size, bool):
      raise TypeError
    size = operator.index(group_size)
  except TypeError:
    raise TypeError(
      f"group_size={shown(group_size)} is not an integer: pass how many channels a group has."
    ) from None
  if size < 1 or channels % size:
    fitting = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
    raise ValueError(
      f"group_size={size} does not divide the {channels} channels: pass one of {fitting}."
    )
  return size


def require_alike(x: jax.Array, axes: Axes, mask: Any, weights: Any) -> None:
  """Refuses a mask or weights that are not the same for all channels."""
  (axis,) = axes.features
  for name, value in {"mask": mask, "weights": weights}.items():
    position = axis - x.ndim + jnp.ndim(value) if value is not None else -1
    if position >= 0 and jnp.shape(value)[position] != 1:
      raise ValueError(
        f"{name} of shape {jnp.shape(value)} differs between the channels, on axis {axis} of x: a "
        "covariance is of elements that have all their channels: give it size 1 there."
      )
