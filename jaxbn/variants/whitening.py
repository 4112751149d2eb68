r"""Whitening: batch normalization that also takes out the correlation between channels.

Decorrelated Batch Normalization (DBN, ZCA whitening by eigenvalues; Huang et al. 2018) and
IterNorm (iterative normalization, by Newton's method; Huang et al. 2019): the channels are cut into
groups of g, each with a mean and a covariance S of its own,

    y = scale * (W (x - mean)) + bias,   W = (S + epsilon I)^(-1/2),

and evaluation uses running averages of mean and W. The five steps are batch normalization's, with a
matrix in the place of a variance.

Three things decide how it is computed:

- S is taken around a mean found first, so that nothing cancels. It is right to u * |S| (u = 6e-8 in
  float32): eigenvalues that differ by more than 1e6 cannot both be right, whatever the algorithm.
  One that is lost in rounding is over-estimated, never taken for zero.
- The derivative of W is written in terms of W and its inverse, and nowhere divides by a difference
  of eigenvalues, as that of an eigendecomposition does: see `_inverse_root.py`.
- Matrix products are asked for in full precision: accelerators otherwise round to bfloat16 or TF32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks
from jaxbn._arguments import check_layer
from jaxbn._dtypes import promoting
from jaxbn._meshes import by_partitioner
from jaxbn._names import by_our_names
from jaxbn._track import blend
from jaxbn._types import Array, Axes, Inputs, Numeric, Plan, Tracking
from jaxbn._xla import recomputing
from jaxbn.variants._covariance import (
  CovarianceMoments,
  covariance,
  grouped,
  measure_covariance,
  merge,
  one_axis,
  real,
  require_alike,
  require_group_size,
  share,
)
from jaxbn.variants._inverse_root import require_method, whitening_matrix

__all__ = [
  "CovarianceMoments",
  "WhiteningStats",
  "covariance",
  "init",
  "merge",
  "whitening_matrix",
  "whitening_norm",
]


def __dir__() -> list[str]:
  return __all__


class WhiteningStats(NamedTuple):
  """The state of one layer: what evaluation normalizes by.

  Attributes:
    mean: running mean, of shape (channels,).
    whitening: running whitening matrix of each group, of shape (groups, g, g).
  """

  mean: jax.Array
  whitening: jax.Array


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
  groups = channels // require_group_size(group_size, channels)
  identity = jnp.tile(jnp.eye(group_size, dtype=dtype), (groups, 1, 1))
  return WhiteningStats(jnp.zeros(channels, dtype), identity)


@by_our_names
def whitening_norm(
  x: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  state: WhiteningStats | None = None,
  *,
  use_running_average: bool,
  axis: int = -1,
  group_size: int = 16,
  method: str = "zca",
  iterations: int = 5,
  momentum: Numeric = 0.99,
  epsilon: float = 1e-5,
  mask: Array | None = None,
  weights: Array | None = None,
  masked_value: float | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  skip_nonfinite: bool = False,
  dtype: Any = None,
) -> tuple[jax.Array, WhiteningStats | None]:
  r"""Whitens x within groups of channels (Decorrelated Batch Normalization, IterNorm).

      training     m = covariance(x), of all devices
                   W = whitening_matrix(m.cov)
                   y = scale * (W (x - m.mean)) + bias
                   new_state = momentum * state + (1 - momentum) * (m.mean, W)
      evaluation   y = scale * (state.whitening (x - state.mean)) + bias

  (DBN: Huang et al. 2018, "Decorrelated Batch Normalization"; IterNorm: Huang et al. 2019,
  "Iterative Normalization: Beyond Standardization towards Efficient Whitening"). Pure: works under
  every transformation of JAX and has derivatives of any order, also where eigenvalues coincide.
  With group_size=1 it is batch normalization.

  Accuracy: y is right to about u k times a few standard deviations, where k is the condition number
  of cov + epsilon I (at most 1/u is resolved; see `whitening_matrix`). With axis_name, covariances
  are shared by one all-reduce of 4 channels * (g + 1) numbers, as exactly as by `jaxbn.sync`.

  A batch with fewer examples than a group has channels has no variance in some directions: there
  the ZCA matrix is 1/sqrt(epsilon), and y 0. The running matrix then meets examples that are not 0
  there: use a larger epsilon, smaller groups, or method="newton", of which the matrix is at most
  1.5^iterations / sqrt(trace).

  Args:
    x: real array of any rank.
    scale: of shape (channels,), or None for 1; where it differs between examples, with as many axes
      as x, each of size 1 or x's.
    bias: likewise, or None for 0.
    state: running statistics, from `init`. None in training: nothing is tracked.
    use_running_average: False in training, True in evaluation; a Python bool.
    axis: the channels' axis, one.
    group_size: g: how many consecutive channels are whitened together; it divides their number.
    method, iterations: as in `whitening_matrix`.
    momentum: share of the old running values that is kept, from 0 to 1 (in PyTorch 1 minus it).
    epsilon: added to the covariance's diagonal.
    mask, weights: as in `covariance`.
    masked_value: what y holds in positions that do not exist, as in `jaxbn.normalize`.
    axis_name: name (or names) of the axis of pmap, shard_map or vmap whose members share
      statistics. Under jit with sharded arrays none is needed.
    axis_index_groups: as in `jaxbn.sync`.
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
  x = real(x)
  axes = one_axis(x, axis)
  group_size = require_group_size(group_size, *axes.shape(x))
  _require_momentum(momentum)
  require_method(method, iterations)
  _check_state(state, x, axes, group_size)
  plan, inputs, tracking = check_layer(
    x,
    scale,
    bias,
    state,
    use_running_average=use_running_average,
    axis=axis,
    momentum=momentum,
    epsilon=epsilon,
    mask=mask,
    weights=weights,
    masked_value=masked_value,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    skip_nonfinite=skip_nonfinite,
    dtype=dtype,
  )
  require_alike(x, axes, mask, weights)
  if plan.use_running_average and state is not None:
    return _whiten(plan, inputs, *state), state
  batch = measure_covariance(plan, inputs, group_size)
  if plan.axis_name is not None:
    batch = share(batch, plan.axis_name, plan.axis_index_groups)
  matrix = whitening_matrix(batch.cov, method=method, iterations=iterations, epsilon=inputs.epsilon)
  y = _whiten(plan, inputs, batch.mean, matrix)
  return y, None if state is None else _track(state, batch, matrix, tracking)


@promoting
def _whiten(plan: Plan, inputs: Inputs, mean: jax.Array, matrix: jax.Array) -> jax.Array:
  """y = scale * (W (x - mean)) + bias, rounded once, at the end."""
  axes, x = plan.axes, inputs.wide_x
  # Half-precision running statistics too are applied in single precision.
  matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
  parameters = inputs.scale, inputs.bias
  by_example = bool(axes.reduced) and any(v is not None and v.ndim == x.ndim for v in parameters)
  scale, bias = (v if v is None or v.ndim == x.ndim else axes.expand(v) for v in parameters)
  if scale is not None and not by_example:
    matrix = matrix * scale.reshape(*matrix.shape[:2], 1)  # one product less of x's size
  product = recomputing(functools.partial(_product, axes))
  product = by_partitioner(product, x, jax.typeof(x).sharding.spec)
  y = product(x, mean, matrix, inputs.valid)
  if scale is not None and by_example:
    y = y * scale
  if bias is not None:
    y = y + bias
  y = y.astype(plan.dtype)
  return y if inputs.masked_value is None else jnp.where(inputs.valid, y, inputs.masked_value)


def _product(axes: Axes, x: jax.Array, mean: jax.Array, matrix: jax.Array, valid: Any) -> jax.Array:
  """W (x - mean), in x's shape."""
  d = x - axes.expand(mean)
  if valid is not None:
    # The gradient of the matrix sums over masked positions too, and 0 * NaN is NaN.
    d = jnp.where(valid | jnp.isfinite(lax.stop_gradient(d)), d, 0)
  d = grouped(d, axes, matrix.shape[-1])
  y = jnp.einsum("n...j,nij->n...i", d, matrix, precision=lax.Precision.HIGHEST)
  (axis,) = axes.features
  y = jnp.moveaxis(y, 0, -2)
  return jnp.moveaxis(y.reshape(*y.shape[:-2], x.shape[axis]), -1, axis)


def _track(
  state: WhiteningStats,
  batch: CovarianceMoments,
  matrix: jax.Array,
  tracking: Tracking,
) -> WhiteningStats:
  """`jaxbn.update`, for a matrix: all of a group, or nothing of it."""
  groups, size, _ = matrix.shape
  usable = jnp.broadcast_to(jnp.asarray(batch.count) > 0, (groups,))
  if tracking.skip_nonfinite:
    usable &= jnp.isfinite(batch.mean).reshape(groups, size).all(-1)
    usable &= jnp.isfinite(matrix).all((-2, -1))
  # A NumPy number would impose its own precision.
  momentum: Any = tracking.momentum
  keep = momentum if isinstance(momentum, jax.Array) else float(momentum)

  mean = blend(keep, 1 - keep, jnp.repeat(usable, size), state.mean, batch.mean)
  whitening = blend(keep, 1 - keep, usable[:, None, None], state.whitening, matrix)
  return WhiteningStats(mean, whitening)


def _require_momentum(momentum: Any) -> None:
  if momentum is None:
    raise ValueError(
      "momentum=None: whitening keeps no average over all batches: pass the share of the old value "
      "that is kept, from 0 to 1 (0.99 is usual)."
    )
  _checks.momentum_in_range(momentum, False)


def _check_state(state: Any, x: jax.Array, axes: Axes, group_size: int) -> None:
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
