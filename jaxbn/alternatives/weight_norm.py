r"""Weight normalization (Salimans & Kingma 2016): a kernel's direction and length apart.

For each output feature, with v its incoming weights and g one number,

    w = g v / ||v||                                                        (equation 2)

so that descent on v turns w and descent on g lengthens it. Unlike batch normalization it knows
nothing of the data; the paper brings two things back: an initialization by one batch
(`data_dependent_init`, section 3), and the centring (`mean_only_batch_norm`, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import Chosen, Moments, RunningStats, _checks, batch_norm, moments, sync
from jaxbn._dtypes import accumulation_dtype
from jaxbn._names import by_our_names
from jaxbn._types import Array

__all__ = ["data_dependent_init", "lengths", "mean_only_batch_norm", "weight_norm"]


def __dir__() -> list[str]:
  return __all__


def weight_norm(
  kernel: Array,
  scale: Array,
  *,
  axis: int | Sequence[int] = -1,
  epsilon: float = 1e-12,
) -> jax.Array:
  r"""w = scale * kernel / sqrt(||kernel||^2 + epsilon), feature by feature.

  The sum of squares is taken in float32 at least. For the gradients of equation 3 JAX is enough:
  that of the kernel is orthogonal to it.

  Args:
    kernel: v, real, of any rank.
    scale: g, of the shape of the kernel's features.
    axis: the axis or axes of the output features; the last one of Flax's kernels.
    epsilon: keeps a kernel of zeros from dividing by zero, as in Flax.

  Returns:
    w, of the kernel's shape and of the dtype to which both promote.

  Raises:
    TypeError: an integer kernel.
    ValueError: a scale of another shape; an axis out of range or twice; epsilon out of range.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import weight_norm
  >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])
  >>> print(weight_norm.weight_norm(kernel, jnp.array([10.0, 1.0])))
  [[6. 0.]
   [8. 1.]]
  """
  kernel = _checks.inexact(kernel, "kernel")
  axes = _checks.split_axes(kernel.ndim, axis)
  _checks.epsilon_in_range(epsilon)
  scale = _checks.channels("scale", scale, kernel, axes)
  dtype = jnp.result_type(kernel, scale)
  wide = kernel.astype(accumulation_dtype(dtype))
  inverse = lax.rsqrt(jnp.sum(lax.square(wide), axes.reduced) + epsilon)
  return (wide * axes.expand(scale * inverse)).astype(dtype)


def lengths(kernel: Array, *, axis: int | Sequence[int] = -1) -> jax.Array:
  r"""||v|| of each feature: the scale with which `weight_norm` gives the kernel back.

  So that training can go on, in the new parameters, from weights that were trained without.

  Args:
    kernel: real, of any rank.
    axis: the axis or axes of the output features.

  Returns:
    Lengths, of the shape of the kernel's features and of its dtype.

  Raises:
    TypeError: an integer kernel.
    ValueError: an axis out of range or twice.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import weight_norm
  >>> weight_norm.lengths(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
  [5.0, 1.0]
  """
  kernel = _checks.inexact(kernel, "kernel")
  axes = _checks.split_axes(kernel.ndim, axis)
  wide = kernel.astype(accumulation_dtype(kernel.dtype))
  return jnp.sqrt(jnp.sum(lax.square(wide), axes.reduced)).astype(kernel.dtype)


def data_dependent_init(
  t: Array,
  *,
  axis: int | Sequence[int] = -1,
  epsilon: float = 1e-10,
  mask: Array | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[jax.Array, jax.Array]:
  r"""The first scale and bias: with them one batch has mean 0 and variance 1 in each feature.

      t = v x / ||v||,   g <- 1 / sqrt(var[t] + epsilon),   b <- -mean[t] g

  (section 3). Layer by layer, from the input on: what a layer is given depends on the
  initialization of those before it. The layers in `jaxbn.linen` and `jaxbn.nnx` do so.

  Args:
    t: what the layer gives for the batch with scale 1 and bias 0.
    axis: the axis or axes of the features in t.
    epsilon: added to the variance.
    mask: boolean, broadcasts against t: which elements exist.
    axis_name, axis_index_groups: as in `jaxbn.sync`.

  Returns:
    (scale, bias), of the shape of t's features, float32 at least.

  Raises:
    TypeError, ValueError: as `jaxbn.moments` and `jaxbn.sync`; epsilon out of range; groups without
      axis_name.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import weight_norm
  >>> t = jnp.array([[1.0], [5.0]])
  >>> scale, bias = weight_norm.data_dependent_init(t)
  >>> scale.item(), bias.item()
  (0.5, -1.5)
  """
  _checks.epsilon_in_range(epsilon)
  batch = moments(t, axis=axis, mask=mask)
  axis_name, axis_index_groups = _checks.sharing(axis_name, axis_index_groups)
  if axis_name is not None:
    batch = sync(batch, axis_name, axis_index_groups)
  scale = lax.rsqrt(batch.var + epsilon)
  return scale, -batch.mean * scale


@by_our_names
def mean_only_batch_norm(
  x: Array,
  bias: Array | None = None,
  state: RunningStats | None = None,
  *,
  use_running_average: bool,
  **options: Any,
) -> tuple[jax.Array, RunningStats | None]:
  r"""y = x - mean + bias: batch normalization that leaves the lengths to weight normalization.

  (section 4) In training with the batch's mean, through which gradients flow, so that they are
  centred as well; in evaluation with the running one.

  Args:
    x: real or complex array of any rank: w x of a layer without a bias of its own.
    bias: of the shape of x's channels, or None for 0.
    state: running statistics, from `jaxbn.init`, or None in training. Their variance is not used
      and stays as it is.
    use_running_average: False in training, True in evaluation; a Python bool.
    **options: those of `jaxbn.batch_norm` that concern the mean: axis, momentum, debias,
      skip_nonfinite, mask, weights, masked_value, axis_name, axis_index_groups, virtual_batch_size,
      use_fast_variance, activation, residual, dtype.

  Returns:
    (y, new_state), as of `jaxbn.batch_norm`.

  Raises:
    TypeError, ValueError: as `jaxbn.batch_norm`; another option.

  >>> import jax.numpy as jnp, jaxbn
  >>> from jaxbn.alternatives import weight_norm
  >>> x = jnp.array([[1.0], [5.0]])
  >>> y, state = weight_norm.mean_only_batch_norm(
  ...   x, state=jaxbn.init(1), use_running_average=False, momentum=0.0
  ... )
  >>> y[:, 0].tolist(), state.mean.item(), state.var.item()
  ([-2.0, 2.0], 3.0, 1.0)
  """
  if unknown := options.keys() - _OPTIONS:
    raise TypeError(
      f"mean_only_batch_norm has no option {sorted(unknown)[0]!r}: there is no variance and no "
      f"scale; the options are {', '.join(sorted(_OPTIONS))}."
    )
  unit = state
  if isinstance(state, RunningStats):
    state = _checks.running_stats(state)
    unit = state._replace(var=jnp.ones_like(state.var))
  y, new_state = batch_norm(
    x,
    None,
    bias,
    unit,
    use_running_average=use_running_average,
    epsilon=0.0,
    choose=_mean_only,
    **options,
  )
  return y, None if state is None or new_state is None else new_state._replace(var=state.var)


_OPTIONS = {
  "activation",
  "axis",
  "axis_index_groups",
  "axis_name",
  "debias",
  "dtype",
  "mask",
  "masked_value",
  "momentum",
  "residual",
  "skip_nonfinite",
  "use_fast_variance",
  "virtual_batch_size",
  "weights",
}


def _mean_only(batch: Moments, state: RunningStats | None) -> Chosen:
  del state
  return Chosen(batch.mean, jnp.ones_like(batch.var))
