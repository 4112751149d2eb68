"""The layer for Flax NNX: it holds parameters and state, and calls `jaxbn.batch_norm`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from jaxbn import _checks, _layers
from jaxbn._names import by_our_names
from jaxbn._track import init
from jaxbn._types import Choose, RunningStats
from jaxbn.nnx._common import Trackable, as_function, of_shape, parameter, tuples


class BatchNorm(Trackable, nnx.BatchNorm):
  r"""Batch normalization (Ioffe & Szegedy 2015): a drop-in for `flax.nnx.BatchNorm`.

      y = (x - mean) / sqrt(var + epsilon) * scale + bias

  with the batch's statistics after `train()` and the running ones after `eval()`. Arguments,
  defaults, variable types and names are Flax's; outputs are bit-equal to `jaxbn.linen.BatchNorm`'s.
  `jaxbn.batch_norm` says what is computed, how accurately, and what errors are raised. What differs
  from Flax: see `jaxbn.linen.BatchNorm`; and with dtype=bfloat16 the statistics and parameters are
  not rounded to it before they are used, only the result is. A promote_dtype of your own is called,
  and what it returns is used, as in Flax. An instance is one of Flax's class too, so that code that
  looks for batch norms by their type finds it.

  Args:
    num_features: number of channels (with several axes, the product).
    use_running_average: True in evaluation, False in training; the call's comes first.
    axis: the axis or axes of the channels.
    momentum: share of the old running value that is kept (PyTorch's momentum is 1 minus it: its 0.1
      is 0.9 here); None for a cumulative average.
    epsilon: added to the variance.
    dtype: of the result (default: what input, parameters and statistics promote to).
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
    promote_dtype: function from (inputs, mean, var, scale, bias) and dtype to the promoted tuple.
    rngs: rng key.
    bias_metadata: metadata of bias.
    scale_metadata: metadata of scale.
    debias: running statistics without the weight of their initial values. Adds the BatchStat
      `count`.
    unbiased: track the variance times n / (n - 1), as PyTorch does.
    skip_nonfinite: a batch whose statistics are not finite leaves the running ones as they were.
    detach_stats: no gradient through the batch's statistics (for demonstration).
    masked_value: what the output holds where the mask is False; None: the formula's value.
    activation: elementwise function applied to the result, such as `nnx.relu`, or a module, or
      None; here its derivative needs no memory of its own. What draws random numbers is a module,
      such as `nnx.Sequential(nnx.tanh, nnx.Dropout(0.1, rngs=rngs))`.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  >>> y = layer(jnp.arange(12.0).reshape(4, 3))
  >>> print(layer.mean[...])
  [0.045 0.055 0.065]
  >>> layer.eval()
  >>> layer(jnp.zeros((1, 3))).shape
  (1, 3)
  """

  def __init__(
    self,
    num_features: int,
    *,
    use_running_average: bool | None = False,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = nnx.initializers.zeros,
    scale_init: Initializer = nnx.initializers.ones,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
    promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
    rngs: nnx.Rngs,
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    debias: bool = False,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
    detach_stats: bool = False,
    masked_value: float | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    virtual_batch_size: int | str | None = None,
    choose: Choose | None = None,
  ):
    shape = (num_features,)
    start = init(shape, momentum=momentum, debias=debias)
    self.mean = nnx.BatchStat(start.mean)
    self.var = nnx.BatchStat(start.var)
    if start.count is not None:
      self.count = nnx.BatchStat(start.count)

    made = shape, param_dtype, rngs
    self.scale = parameter(use_scale, scale_init, *made, scale_metadata)
    self.bias = parameter(use_bias, bias_init, *made, bias_metadata)

    self.num_features = num_features
    self.use_running_average = use_running_average
    self.axis = tuples(axis)
    self.momentum = momentum  # type: ignore[assignment]  # in Flax never None
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.axis_name = axis_name
    self.axis_index_groups = tuples(axis_index_groups)
    self.use_fast_variance = use_fast_variance
    self.promote_dtype = promote_dtype
    self.debias = debias
    self.unbiased = unbiased
    self.skip_nonfinite = skip_nonfinite
    self.detach_stats = detach_stats
    self.masked_value = masked_value
    self.activation = activation
    self.virtual_batch_size = virtual_batch_size
    self.choose = choose

  @by_our_names
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
      use_running_average: True in evaluation, False in training; before the constructor's.
      mask: binary, broadcasts against x, last axes aligned: which elements exist. For sequences
        x (N, T, C) it is mask[..., None]; see `jaxbn.moments`. As in Linen any dtype will
        do; what is not zero is True.
      weights: real, not negative, broadcasts against x: how often each element counts.
      residual: of x's shape, added before the activation, or None.

    Returns:
      y, of x's shape.
    """
    given = {"mask": mask, "weights": weights, "residual": residual}
    return self._normalize(_checks.inexact(x), self.scale, self.bias, use_running_average, **given)

  def _normalize(
    self, x: jax.Array, scale: Any, bias: Any, use_running_average: bool | None, **given: Any
  ) -> jax.Array:
    """The layer with these parameters, and for those that are derived of it with more options."""
    use_running_average = self._evaluating(use_running_average)
    x, scale, bias, state, dtype = self._promoted(x, scale, bias, use_running_average)
    y, new_state = _layers.call(
      self,
      x,
      scale,
      bias,
      state,
      use_running_average=use_running_average,
      axis_name=self.axis_name,
      axis_index_groups=self.axis_index_groups,
      virtual_batch_size=self.virtual_batch_size,
      dtype=dtype,
      activation=as_function(self.activation, x),
      **given,
    )
    if not use_running_average:
      self._store(new_state)
    return y

  def _promoted(
    self, x: jax.Array, scale: Any, bias: Any, use_running_average: bool
  ) -> tuple[jax.Array, Any, Any, RunningStats, Any]:
    """Input, parameters, state and the result's dtype, after `promote_dtype`."""
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)
    if math.prod(shape) != self.num_features:
      raise ValueError(
        f"x of shape {x.shape} has channels of shape {shape} on axis={self.axis}, but this layer "
        f"was made with num_features={self.num_features}: pass num_features={math.prod(shape)} to "
        "the constructor, or name the channels' axis" + _checks.other_axis(x, (self.num_features,))
      )

    def value(variable: nnx.Variable | jax.Array | None) -> Any:
      return None if variable is None else of_shape(variable, shape)

    mean, var, scale, bias = map(value, (self.mean, self.var, scale, bias))
    state = RunningStats(mean, var, value(getattr(self, "count", None)))
    dtype = self.dtype
    if self.promote_dtype is not dtypes.promote_dtype:
      x, mean, var, scale, bias = self.promote_dtype((x, mean, var, scale, bias), dtype=dtype)
      if use_running_average:  # in training the statistics keep their precision, as in Flax
        state = RunningStats(mean, var)
    elif dtype is None:
      # Flax's own casts everything to the common dtype first. The core works in float32 at least
      # and rounds once, at the end, so it only needs to know that dtype.
      dtype = jnp.result_type(*(a for a in (x, mean, var, scale, bias) if a is not None))
    return x, scale, bias, state, dtype
