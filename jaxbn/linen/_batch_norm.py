"""The layer for Flax Linen: it holds parameters and state, and calls `jaxbn.batch_norm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from jaxbn import _checks, _layers
from jaxbn._names import ByOurNames
from jaxbn._track import init
from jaxbn._types import Choose, RunningStats
from jaxbn.linen._common import first_activation, has_count, mended, pure


class BatchNorm(ByOurNames, nn.BatchNorm):
  r"""Batch normalization (Ioffe & Szegedy 2015): a drop-in for `flax.linen.BatchNorm`.

      y = (x - mean) / sqrt(var + epsilon) * scale + bias

  with the batch's statistics in training and the running ones, kept in the collection
  `batch_stats`, in evaluation. Arguments, defaults, names, shapes and dtypes are Flax's, so that
  its checkpoints load; `jaxbn.batch_norm` says what is computed, how accurately, and what errors
  are raised. What differs from Flax: the statistics stay accurate where the mean is large; with a
  mask and an axis_name they are those of all valid elements of all devices; masked positions may
  hold NaN; integer input is refused. Initialization never changes the statistics, and needs no
  bound axis. An instance is one of Flax's class too, so that code that looks for batch norms by
  their type finds it.

  Attributes:
    use_running_average: True in evaluation, False in training; here or at the call.
    axis: the axis or axes of the channels.
    momentum: share of the old running value that is kept (PyTorch's momentum is 1 minus it: its 0.1
      is 0.9 here); None for a cumulative average.
    epsilon: added to the variance.
    dtype: of the result (default: what input and parameters promote to).
    param_dtype: of scale and bias.
    use_bias: whether there is a bias (beta).
    use_scale: whether there is a scale (gamma).
    bias_init: initializer of bias.
    scale_init: initializer of scale.
    axis_name: the axis of pmap, shard_map or vmap whose members share statistics. Under jit with
      sharded arrays none is needed.
    axis_index_groups: indices along it in groups, each sharing among itself only.
    choose: which statistics normalize in training, where not the batch's own: a function of the
      batch's `jaxbn.Moments` and the running statistics (see `jaxbn.batch_norm`).
    virtual_batch_size: examples of the global batch that are normalized together, by statistics of
      their own (see `jaxbn.batch_norm`); "device": those of each device; None: all.
    use_fast_variance: one pass over the input; False takes two.
    force_float32_reductions: if False, `batch_stats` starts in param_dtype, and parameters loaded
      with another dtype are cast to it. Sums are taken in float32 at least either way.
    debias: running statistics without the weight of their initial values: right for evaluation from
      the first steps on. Adds the leaf `count` to `batch_stats`.
    unbiased: track the variance times n / (n - 1), as PyTorch does.
    skip_nonfinite: a batch whose statistics are not finite leaves the running ones as they were.
    detach_stats: no gradient through the batch's statistics (for demonstration).
    masked_value: what the output holds where the mask is False; None: the formula's value.
    activation: elementwise function applied to the result, such as `nn.relu`, or a module, such as
      `nn.PReLU()`, or None; here its derivative needs no memory of its own.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.BatchNorm(use_running_average=False)
  >>> x = jnp.arange(12.0).reshape(4, 3)
  >>> variables = layer.init(jax.random.key(0), x)
  >>> jax.tree.map(jnp.shape, variables)
  {'batch_stats': {'mean': (3,), 'var': (3,)}, 'params': {'bias': (3,), 'scale': (3,)}}
  >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
  >>> print(updates["batch_stats"]["mean"])
  [0.045 0.055 0.065]
  """

  # Flax's fields and defaults are inherited; these take more than there.
  axis: int | Sequence[int] = -1  # type: ignore[assignment]
  momentum: float | None = 0.99  # type: ignore[assignment]
  axis_name: Any = None
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False
  detach_stats: bool = False
  masked_value: float | None = None
  activation: Callable[..., Any] | None = None
  virtual_batch_size: int | str | None = None
  choose: Choose | None = None

  @nn.compact
  @mended
  def __call__(
    self,
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    residual: jax.Array | None = None,
  ) -> jax.Array:
    """Normalizes x.

    Args:
      x: real or complex array of any rank.
      use_running_average: True in evaluation, False in training, if not said in the constructor.
      mask: binary, broadcasts against x, last axes aligned: which elements exist. For sequences
        x (N, T, C) it is mask[..., None]; see `jaxbn.moments`. As in Flax any dtype will
        do; what is not zero is True.
      weights: real, not negative, broadcasts against x: how often each element counts.
      residual: of x's shape, added before the activation, or None.

    Returns:
      y, of x's shape.
    """
    x = _checks.inexact(x)
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)
    scale = self._parameter("scale", self.scale_init, shape) if self.use_scale else None
    bias = self._parameter("bias", self.bias_init, shape) if self.use_bias else None
    given = {"mask": mask, "weights": weights, "residual": residual}
    return self._normalize(x, scale, bias, use_running_average, **given)

  # To Flax every method is a call, that is captured, listed and intercepted: all but `__call__` are
  # kept from it, here and in all layers.
  @nn.nowrap
  def _normalize(
    self,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    use_running_average: bool | None,
    **given: Any,
  ) -> jax.Array:
    """The layer with these parameters, and for those that are derived of it with more options."""
    use_running_average = nn.merge_param(
      "use_running_average", self.use_running_average, use_running_average
    )
    initializing = self.is_initializing()
    shapes_only = initializing and not x.size  # an empty batch has no statistics
    evaluating = shapes_only or use_running_average
    state = self._running_stats(_checks.split_axes(x.ndim, self.axis).shape(x), evaluating)
    y, new_state = _layers.call(
      self,
      x,
      scale,
      bias,
      jax.tree.map(lambda leaf: leaf.value, state),
      use_running_average=evaluating,
      axis_name=None if initializing else self.axis_name,
      axis_index_groups=None if initializing else self.axis_index_groups,
      virtual_batch_size=None if initializing else self.virtual_batch_size,
      dtype=self.dtype,
      activation=pure(self),
      **given,
    )
    y = first_activation(self, y, given.get("mask"), given.get("weights"))
    if new_state is not None and not initializing and not use_running_average:
      for variable, value in zip(state, new_state, strict=True):
        if variable is not None:
          variable.value = value
    return y

  @nn.nowrap
  def _parameter(self, name: str, initializer: Initializer, shape: tuple[int, ...]) -> jax.Array:
    value = self.param(name, initializer, shape, self.param_dtype)
    # As in Flax, whatever dtype it was loaded with.
    return value if self.force_float32_reductions else jnp.asarray(value, self.param_dtype)

  @nn.nowrap
  def _running_stats(self, shape: tuple[int, ...], evaluating: bool) -> Any:
    """The layer's variables, in the place of the values that they hold."""
    dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
    counted = has_count(self, self.momentum, self.debias, evaluating)

    def variable(name: str) -> Any:
      def start() -> jax.Array:
        return getattr(init(shape, momentum=self.momentum, debias=self.debias, dtype=dtype), name)

      return self.variable("batch_stats", name, start)

    return RunningStats(variable("mean"), variable("var"), variable("count") if counted else None)
