r"""Whitening: batch normalization that also takes out the correlation between channels.

Decorrelated Batch Normalization (DBN, ZCA whitening by eigenvalues; Huang et al. 2018) and
IterNorm (iterative normalization, by Newton's method; Huang et al. 2019): the channels are cut into
groups of g, each with a mean and a covariance S of its own,

    y = scale * (W (x - mean)) + bias,   W = (S + epsilon I)^(-1/2),

and evaluation uses running averages of mean and W. The five steps are batch normalization's, with a
matrix in the place of a variance.

Three things decide the rest of this file:

- S is taken around a mean found first, so that nothing cancels. What it is right to is
  u * |S| (u = 6e-8 in float32): eigenvalues that differ by more than 1e6 cannot both be right,
  whatever the algorithm. One that is lost in rounding is over-estimated, never taken for zero.
- The derivative of W is written by W and its inverse R = W^-1 alone, in no place dividing by a
  difference of eigenvalues, as the derivative of an eigendecomposition does: see `_roots`.
- Matrix products are asked for in full precision: accelerators otherwise round to bfloat16 or TF32.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks
from jaxbn._moments import (
  Elements,
  How,
  _add_counts,
  _constant_pivot,
  _sum_over_axis,
  divisor,
  measure,
  valid_elements,
  zero_unless,
)
from jaxbn._normalize import arrange, fill, require_mask
from jaxbn._rule import Form, Given, accumulation_dtype, recomputing

if TYPE_CHECKING:
  import chex

__all__ = [
  "CovarianceMoments",
  "WhiteningStats",
  "covariance",
  "init",
  "merge",
  "whitening_matrix",
  "whitening_norm",
]

_METHODS = ("zca", "newton")
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class CovarianceMoments(NamedTuple):
  """What is known of a set of elements, each a vector of channels: `Moments` with a covariance.

  A commutative monoid under `merge`, exact up to rounding.

  Attributes:
    count: number of elements, or sum of their weights, of shape (), as in `jaxbn.Moments`.
    mean: mean per channel, of shape (channels,). float32 at least.
    cov: E[(x - mean)(x - mean)^T] within each group of channels, of shape (groups, g, g).
  """

  count: chex.Numeric
  mean: chex.Array
  cov: chex.Array


class WhiteningStats(NamedTuple):
  """The state of one layer: what evaluation normalizes by.

  Attributes:
    mean: running mean, of shape (channels,).
    whitening: running whitening matrix of each group, of shape (groups, g, g).
  """

  mean: chex.Array
  whitening: chex.Array


def init(channels: int, group_size: int = 16, *, dtype: Any = jnp.float32) -> WhiteningStats:
  """Running statistics before the first batch: mean 0, no whitening (the identity).

  Args:
    channels: how many channels there are.
    group_size: how many of them are whitened together; it divides their number.
    dtype: of both leaves.

  Returns:
    WhiteningStats.

  Raises:
    ValueError: a group_size that does not divide the channels.

  >>> from jaxbn.variants import whitening
  >>> whitening.init(4, group_size=2).whitening.tolist()
  [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]
  """
  (channels,) = _checks.channel_shape(channels)
  groups = channels // _group_size(group_size, channels)
  identity = jnp.tile(jnp.eye(group_size, dtype=dtype), (groups, 1, 1))
  return WhiteningStats(jnp.zeros(channels, dtype), identity)


def covariance(
  x: chex.Array,
  group_size: int = 16,
  axis: int = -1,
  *,
  mask: chex.Array | None = None,
  weights: chex.Array | None = None,
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
  x = _real(x)
  axes = _one_axis(x, axis)
  _checks.nonempty(x, axes)
  group_size = _group_size(group_size, *axes.shape(x))
  valid, weight = _counted(x, axes, mask, weights)
  return _measure(axes, group_size, x.astype(accumulation_dtype(x.dtype)), valid, weight)


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
  dtype = jnp.promote_types(a.cov.dtype, b.cov.dtype)
  n_a, n_b = jnp.asarray(a.count, dtype), jnp.asarray(b.count, dtype)
  n = divisor(n_a + n_b, dtype)
  share_a, share_b = n_a / n, n_b / n
  # A side without elements has no mean: it is not at a distance.
  delta = jnp.where((n_a > 0) & (n_b > 0), b.mean - a.mean, 0)
  mean = jnp.where(n_a > 0, a.mean, b.mean) + delta * share_b
  cov = a.cov * share_a + b.cov * share_b + _outer(delta, a.cov) * (share_a * share_b)
  return CovarianceMoments(_add_counts(a.count, b.count), mean, cov)


def whitening_matrix(
  cov: chex.Array, *, method: str = "zca", iterations: int = 5, epsilon: chex.Numeric = 1e-5
) -> jax.Array:
  r"""W = (cov + epsilon I)^(-1/2), symmetric, for each covariance matrix.

      "zca"      W = U diag(1/sqrt(l)) U^T  with the eigenvalues l and eigenvectors U of
                 cov + epsilon I                        (DBN: Huang et al. 2018, section 3)
      "newton"   P_0 = I,  P_k = (3 P_{k-1} - P_{k-1}^3 N) / 2,  W = P_T / sqrt(tr)  with
                 N = (cov + epsilon I) / tr, tr its trace    (IterNorm: Huang et al. 2019)

  Newton's method needs no decomposition, only products of matrices, and approaches the other from
  below: directions of little variance, below tr / 2.25^T, are left short of variance 1.

  Args:
    cov: real symmetric matrices, not negative, of shape (..., g, g).
    method: "zca" or "newton".
    iterations: T, for "newton".
    epsilon: added to the diagonal; finite and not negative.

  Returns:
    W, of cov's shape. An eigenvalue below the largest one's last place, which rounding has made, is
    taken to be of that size; NaN where cov is not finite.

  Raises:
    TypeError: iterations that are no integer.
    ValueError: another method; iterations below 1; epsilon out of range; no square matrices.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import whitening
  >>> print(whitening.whitening_matrix(jnp.diag(jnp.array([4.0, 0.25])), epsilon=0.0))
  [[0.5 0. ]
   [0.  2. ]]
  """
  cov = _real(cov, "cov")
  if cov.ndim < 2 or cov.shape[-1] != cov.shape[-2]:
    raise ValueError(f"cov has shape {cov.shape}; square matrices are needed, (..., g, g).")
  _checks.epsilon_in_range(epsilon)
  _require_method(method, iterations)
  # The matrix is symmetric but for rounding; the derivative relies on it.
  a = 0.5 * (cov + cov.mT) + jnp.asarray(epsilon, cov.dtype) * jnp.eye(cov.shape[-1])
  return _roots(a)[0] if method == "zca" else _newton(a, iterations)


def whitening_norm(
  x: chex.Array,
  scale: chex.Array | None = None,
  bias: chex.Array | None = None,
  state: WhiteningStats | None = None,
  *,
  use_running_average: bool,
  axis: int = -1,
  group_size: int = 16,
  method: str = "zca",
  iterations: int = 5,
  momentum: chex.Numeric = 0.99,
  epsilon: float = 1e-5,
  mask: chex.Array | None = None,
  weights: chex.Array | None = None,
  masked_value: float | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  use_fast_variance: bool = True,
  skip_nonfinite: bool = False,
  dtype: Any = None,
) -> tuple[jax.Array, WhiteningStats | None]:
  r"""Whitens x within groups of channels (Decorrelated Batch Normalization, IterNorm).

      training     m = covariance(x), of all devices
                   W = whitening_matrix(m.cov)
                   y = scale * (W (x - m.mean)) + bias
                   new_state = momentum * state + (1 - momentum) * (m.mean, W)
      evaluation   y = scale * (state.whitening (x - state.mean)) + bias

  (DBN: Huang et al. 2018, algorithms 1 and 2; IterNorm: Huang et al. 2019, algorithm 1.) Pure, as
  `jaxbn.batch_norm`, and like it works under every transformation of JAX; second derivatives too,
  also where eigenvalues coincide. With group_size=1 it is batch normalization.

  Accuracy: y is right to about u k times a few standard deviations, where k is the condition number
  of cov + epsilon I (at most 1/u is resolved; see `whitening_matrix`). With axis_name, covariances
  are shared by one all-reduce of channels * (g + 1) numbers around the running mean, and lose
  digits in the first steps as the variance does in `jaxbn.batch_norm`.

  A batch with fewer examples than a group has channels has no variance in some directions: W is
  1/sqrt(epsilon) there, and y 0. The running matrix then meets examples which are not 0 there: use
  a larger epsilon, smaller groups, or method="newton", whose W is at most 1.5^T / sqrt(tr).

  Args:
    x: real array of any rank.
    scale: of shape (channels,), or None for 1.
    bias: likewise, or None for 0.
    state: running statistics, from `init`. None in training: nothing is tracked, and sharing over
      axis_name takes two small all-reduces.
    use_running_average: False in training, True in evaluation; a Python bool.
    axis: the channels' axis, one.
    group_size: g: how many consecutive channels are whitened together; it divides their number.
    method, iterations: as in `whitening_matrix`.
    momentum: share of the old running values that is kept, from 0 to 1.
    epsilon: added to the covariance's diagonal.
    mask, weights: as in `covariance`.
    masked_value: what y holds in positions that do not exist, as in `jaxbn.normalize`.
    axis_name: name (or names) of the axis of pmap, shard_map or vmap whose members share
      statistics. Under jit with sharded arrays none is needed.
    axis_index_groups: as in `jaxbn.sync`.
    use_fast_variance: False spends a second, smaller all-reduce to find the mean first: accurate
      from the first step on.
    skip_nonfinite: a group whose batch mean or whitening matrix is not finite leaves its running
      ones as they were.
    dtype: of y; default, what x, scale and bias promote to.

  Returns:
    (y, new_state): y of x's shape; new_state of state's leaves, in evaluation state itself.

  Raises:
    TypeError, ValueError: as the functions named above; a state of another type or shape, or none
      in evaluation; momentum=None, for no averages over all batches are kept.

  >>> import jax, jax.numpy as jnp
  >>> from jaxbn.variants import whitening
  >>> x = jax.random.normal(jax.random.key(0), (64, 2)) @ jnp.array([[1.0, 0.9], [0.0, 0.1]])
  >>> state = whitening.init(2, group_size=2)
  >>> y, state = whitening.whitening_norm(
  ...   x, state=state, group_size=2, use_running_average=False, epsilon=0.0
  ... )
  >>> print(jnp.cov(y.T, bias=True).round(3) + 0.0)
  [[1. 0.]
   [0. 1.]]
  """
  x = _real(x)
  axes = _one_axis(x, axis)
  group_size = _group_size(group_size, *axes.shape(x))
  _require_momentum(momentum)
  _require_method(method, iterations)
  _check_state(state, x, axes, group_size)
  evaluating = _checks.static_bool("use_running_average", use_running_average)
  mean = state.mean if state is not None else None
  form, given = arrange(x, scale, bias, None, epsilon, axis, None, dtype, mean)
  valid, weight = _counted(x, axes, mask, weights)
  require_mask(masked_value, valid)
  given = given._replace(valid=valid)
  fast = _checks.static_bool("use_fast_variance", use_fast_variance)
  skip = _checks.static_bool("skip_nonfinite", skip_nonfinite)
  if evaluating:
    if state is None:
      raise ValueError("use_running_average=True needs the statistics: pass state.")
    return fill(_whiten(form, given, *state), valid, masked_value), state

  _checks.nonempty(x, axes)
  how = How(axes, fast, True, *_checks.sharing(axis_name, axis_index_groups))
  pivot = state.mean if state is not None and fast else None
  root = functools.partial(
    whitening_matrix, method=method, iterations=iterations, epsilon=given.epsilon
  )
  y, batch, matrix = _whiten_by_batch(form, how, group_size, root, given, weight, pivot)
  y = fill(y, valid, masked_value)
  return y, None if state is None else _track(state, batch, matrix, momentum, skip)


# Measure and share


def _measure(
  axes: _checks.Axes, group_size: int, wide: jax.Array, valid: Any, weight: Any
) -> CovarianceMoments:
  local = functools.partial(_measure_here, axes, group_size)
  return _by_partitioner(local, wide, CovarianceMoments(jax.P(), jax.P(), jax.P()))(
    wide, valid, weight
  )


def _measure_here(
  axes: _checks.Axes, group_size: int, wide: jax.Array, valid: Any, weight: Any
) -> CovarianceMoments:
  constant = lax.stop_gradient(wide)
  first = measure(How(axes), Elements(constant, constant, valid, weight))
  # A pivot, and so no path for gradients: they go through the moments around it.
  center = lax.stop_gradient(first.mean)
  sums = recomputing(functools.partial(_sums_around, axes, group_size))
  n = divisor(first.count, wide.dtype)
  total, products = (s / n for s in sums(wide, center, valid, weight))
  return CovarianceMoments(first.count, center + total.reshape(-1), _covariance(products, total))


def _sums_around(
  axes: _checks.Axes, group_size: int, wide: jax.Array, center: jax.Array, valid: Any, weight: Any
) -> tuple[jax.Array, jax.Array]:
  """The weighted sums of d and d d^T, d = x - center, of shapes (groups, g) and (groups, g, g)."""
  d = zero_unless(valid, wide - axes.expand(center))
  weighted = d if weight is None else d * weight
  d, weighted = (_grouped(v, axes, group_size) for v in (d, weighted))
  elements = tuple(range(1, d.ndim - 1))
  products = lax.dot_general(
    weighted, d, ((elements, elements), ((0,), (0,))), precision=lax.Precision.HIGHEST
  )
  return jnp.sum(weighted, elements), products


def _share(moments: CovarianceMoments, how: How, pivot: jax.Array | None) -> CovarianceMoments:
  """The moments of all devices, by the formulas of `jaxbn.sync`, for vectors."""
  share = functools.partial(_sum_over_axis, axis_name=how.axis_name, groups=how.axis_index_groups)
  count, mean, cov = moments
  if pivot is None:
    _, n, (weighted,) = share(count, [mean])
    pivot = weighted / n
  pivot = _constant_pivot(pivot, mean.dtype)
  # The mean of a device without elements is a placeholder: it lies at no distance.
  d = jnp.where(jnp.asarray(count) > 0, mean - pivot, 0)
  count, n, (d, products) = share(count, [d, cov + _outer(d, cov)])
  d = d / n
  cov = _covariance(products / n, d.reshape(cov.shape[:2]))
  return CovarianceMoments(count, jnp.where(jnp.asarray(count) > 0, pivot + d, 0), cov)


def _covariance(products: jax.Array, mean: jax.Array) -> jax.Array:
  """E[d d^T] - E[d] E[d]^T, and what rounding may have taken of it, on the diagonal.

  The difference is off by u |E[d]|^2. Added, an eigenvalue that is lost is too large and not zero,
  or negative, which W would divide by; a larger one changes by no more than its rounding.
  """
  lost = jnp.finfo(mean.dtype).eps * jnp.sum(lax.square(mean), -1)[:, None, None]
  identity = jnp.eye(mean.shape[-1], dtype=mean.dtype)
  return products - _outer(mean, products) + lax.stop_gradient(lost) * identity


def _outer(mean: jax.Array, like: jax.Array) -> jax.Array:
  """mean mean^T of each group."""
  v = mean.reshape(like.shape[:2])
  return v[:, :, None] * v[:, None, :]


def _by_partitioner(function: Any, x: jax.Array, out: Any) -> Any:
  """The function; on an explicit mesh one whose parts are placed by XLA, and its results as `out`.

  A product that sums over a sharded axis, as here and in the derivatives, has no type otherwise.
  """
  mesh = jax.typeof(x).sharding.mesh
  if not mesh.explicit_axes:
    return function
  placed = jax.tree.map(functools.partial(jax.NamedSharding, mesh), out)
  return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=placed)


# Choose


@jax.custom_jvp
def _roots(a: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
  r"""W = A^(-1/2) and R = A^(1/2), and the eigenvectors and eigenvalues of R.

  The derivative follows from R R = A and W R = I, and needs no derivative of an eigenvector:

      R dR + dR R = dA,   dW = -W dR W.

  In the basis of eigenvectors the first has the solution dR_ij = dA_ij / (r_i + r_j), so that
  dW_ij = -dA_ij / (r_i r_j (r_i + r_j)): the divided differences of the Daleckii-Krein formula for
  l^(-1/2), without a difference. `custom_linear_solve` differentiates the equation and not its
  solution, so that this holds for derivatives of any order; the third result is only for it.
  """
  eigenvalues, u = jnp.linalg.eigh(a, symmetrize_input=False)
  # What is below the last place of the largest one is rounding, and may be negative.
  eigenvalues = jnp.maximum(eigenvalues, jnp.finfo(a.dtype).eps * eigenvalues[..., -1:])
  r = jnp.sqrt(eigenvalues)
  columns = r[..., None, :]
  return _matmul(u / columns, u.mT), _matmul(u * columns, u.mT), (u, r)


@_roots.defjvp
def _roots_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
  w, root, basis = _roots(*primals)
  u, r = basis

  def solve(_: Any, c: jax.Array) -> jax.Array:
    in_basis = _matmul(_matmul(u.mT, c), u)
    return _matmul(_matmul(u, in_basis / (r[..., :, None] + r[..., None, :])), u.mT)

  def equation(d_root: jax.Array) -> jax.Array:
    return _matmul(root, d_root) + _matmul(d_root, root)

  (d_a,) = tangents
  d_root = lax.custom_linear_solve(equation, d_a, solve, symmetric=True)
  d_w = -_matmul(_matmul(w, d_root), w)
  return (w, root, basis), (d_w, d_root, jax.tree.map(jnp.zeros_like, basis))


def _newton(a: jax.Array, iterations: int) -> jax.Array:
  """IterNorm's P_k, with Q_k = P_k N beside it.

  P_k = T P_{k-1} and Q_k = Q_{k-1} T with T = (3 I - P_{k-1} Q_{k-1}) / 2 are the same matrices as
  the paper's, by as many products; but there rounding grows from step to step unless all
  eigenvalues are of one size (Higham 2008, Functions of Matrices, chapter 6).
  """
  trace = jnp.trace(a, axis1=-2, axis2=-1)[..., None, None]
  identity = jnp.eye(a.shape[-1], dtype=a.dtype)
  p, q = identity, a / trace
  for _ in range(iterations):
    t = 1.5 * identity - 0.5 * _matmul(p, q)
    p, q = _matmul(t, p), _matmul(q, t)
  return p * lax.rsqrt(trace)


# Apply


def _whiten_by_batch(
  form: Form, how: How, group_size: int, root: Any, given: Given, weight: Any, pivot: Any
) -> tuple[jax.Array, CovarianceMoments, jax.Array]:
  """Measure, share, choose, apply: y, the moments of the batch, and the whitening matrix."""
  batch = _measure(form.axes, group_size, given.wide, given.valid, weight)
  if how.axis_name is not None:
    batch = _share(batch, how, pivot)
  matrix = root(batch.cov)
  return _whiten(form, given, batch.mean, matrix), batch, matrix


def _whiten(form: Form, given: Given, mean: jax.Array, matrix: jax.Array) -> jax.Array:
  """y = scale * (W (x - mean)) + bias, rounded once, at the end."""
  # Half-precision running statistics too are applied in single precision.
  matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
  if given.scale is not None:
    matrix = matrix * given.scale.reshape(*matrix.shape[:2], 1)
  apply = recomputing(functools.partial(_product, form.axes))
  apply = _by_partitioner(apply, given.wide, jax.typeof(given.wide).sharding.spec)
  y = apply(given.wide, mean, matrix, given.valid)
  return (y if given.bias is None else y + form.axes.expand(given.bias)).astype(form.dtype)


def _product(
  axes: _checks.Axes, wide: jax.Array, mean: jax.Array, matrix: jax.Array, valid: Any
) -> jax.Array:
  """W (x - mean), in x's shape."""
  d = wide - axes.expand(mean)
  if valid is not None:
    # The gradient of the matrix sums over masked positions too, and 0 * NaN is NaN.
    d = jnp.where(valid | jnp.isfinite(lax.stop_gradient(d)), d, 0)
  y = _einsum("n...j,nij->n...i", _grouped(d, axes, matrix.shape[-1]), matrix)
  (axis,) = axes.features
  y = jnp.moveaxis(y, 0, -2)
  return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, axis)


def _grouped(x: jax.Array, axes: _checks.Axes, group_size: int) -> jax.Array:
  """x with the groups on the first axis and the channels of each on the last."""
  (axis,) = axes.features
  x = jnp.moveaxis(x, axis, -1)
  shape = (*x.shape[:-1], x.shape[-1] // group_size, group_size)
  return jnp.moveaxis(x.reshape(shape), -2, 0)


# Track


def _track(
  state: WhiteningStats,
  batch: CovarianceMoments,
  matrix: jax.Array,
  momentum: chex.Numeric,
  skip_nonfinite: bool,
) -> WhiteningStats:
  """`jaxbn.update`, for a matrix: all of a group, or nothing of it."""
  groups, size, _ = matrix.shape
  usable = jnp.broadcast_to(jnp.asarray(batch.count) > 0, (groups,))
  if skip_nonfinite:
    usable &= jnp.isfinite(batch.mean).reshape(groups, size).all(-1)
    usable &= jnp.isfinite(matrix).all((-2, -1))
  # A NumPy number would impose its own precision.
  keep = momentum if isinstance(momentum, jax.Array) else float(momentum)

  def blend(old: jax.Array, new: jax.Array, usable: jax.Array) -> jax.Array:
    wide = jnp.promote_types(old.dtype, new.dtype)
    # Selected twice: an unusable value must reach neither the result nor a gradient.
    blended = keep * old.astype(wide) + (1 - keep) * jnp.where(usable, new, 0)
    half = jnp.finfo(old.dtype).bits < 32
    return jnp.where(usable, blended.astype(old.dtype if half else blended.dtype), old)

  mean = blend(state.mean, batch.mean, jnp.repeat(usable, size))
  return WhiteningStats(mean, blend(state.whitening, matrix, usable[:, None, None]))


# What is refused


def _real(x: Any, name: str = "x") -> jax.Array:
  x = _checks.inexact(x, name)
  if jnp.iscomplexobj(x):
    raise TypeError(
      f"{name} has dtype {x.dtype}; whitening is for real channels: pass the real and imaginary "
      "parts as channels of their own."
    )
  return x


def _one_axis(x: jax.Array, axis: Any) -> _checks.Axes:
  axes = _checks.split_axes(x.ndim, axis)
  if len(axes.features) != 1:
    raise ValueError(
      f"axis={axis!r}: whitening needs one axis of channels, for groups are cut along it: reshape "
      "x so that the channels have one axis."
    )
  return axes


def _group_size(group_size: Any, channels: int) -> int:
  try:
    if isinstance(group_size, bool):
      raise TypeError
    size = operator.index(group_size)
  except TypeError:
    raise TypeError(
      f"group_size={group_size!r} is not an integer: pass how many channels a group has."
    ) from None
  if size < 1 or channels % size:
    fitting = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
    raise ValueError(
      f"group_size={size} does not divide the {channels} channels: pass one of {fitting}."
    )
  return size


def _counted(x: jax.Array, axes: _checks.Axes, mask: Any, weights: Any) -> tuple[Any, Any]:
  """`valid_elements`, of a mask and weights that are the same for all channels."""
  valid, weight = valid_elements(x, mask, weights)
  (axis,) = axes.features
  for name, value in {"mask": mask, "weights": weights}.items():
    position = axis - x.ndim + jnp.ndim(value) if value is not None else -1
    if position >= 0 and jnp.shape(value)[position] != 1:
      raise ValueError(
        f"{name} of shape {jnp.shape(value)} differs between the channels, on axis {axis} of x: a "
        "covariance is of elements that have all their channels: give it size 1 there."
      )
  return valid, weight


def _require_method(method: Any, iterations: Any) -> None:
  if method not in _METHODS:
    raise ValueError(f"method={method!r}: it is 'zca' (DBN) or 'newton' (IterNorm).")
  if isinstance(iterations, bool) or not hasattr(iterations, "__index__"):
    raise TypeError(f"iterations={iterations!r} is not an integer: pass how many; 5 is usual.")
  if operator.index(iterations) < 1:
    raise ValueError(f"iterations={iterations!r}: at least one is needed; 5 is usual.")


def _require_momentum(momentum: Any) -> None:
  if momentum is None:
    raise ValueError(
      "momentum=None: whitening keeps no average over all batches: pass the share of the old value "
      "that is kept, from 0 to 1 (0.99 is usual)."
    )
  _checks.momentum_in_range(momentum, False)


def _check_state(state: Any, x: jax.Array, axes: _checks.Axes, group_size: int) -> None:
  if state is None:
    return
  if not isinstance(state, WhiteningStats):
    raise TypeError(
      f"state is a {type(state).__name__}; a WhiteningStats is needed: make it with "
      "whitening.init(channels, group_size)."
    )
  _checks.channels("state.mean", state.mean, x, axes)
  (channels,) = axes.shape(x)
  needed = (channels // group_size, group_size, group_size)
  if jnp.shape(state.whitening) != needed:
    raise ValueError(
      f"state.whitening has shape {jnp.shape(state.whitening)}, but {channels} channels in groups "
      f"of group_size={group_size} need {needed}: make the state with "
      f"whitening.init({channels}, {group_size}), or pass the group_size that it was made with."
    )
