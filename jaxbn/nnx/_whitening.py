"""Whitening for Flax NNX: it holds parameters and state, and calls `whitening_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn._names import by_our_names
from jaxbn.nnx._common import Trackable, of_shape, parameter, tuples
from jaxbn.variants.whitening import WhiteningStats, init, whitening_norm


class WhiteningNorm(Trackable):
  r"""Decorrelated batch normalization (DBN) and iterative normalization (IterNorm).

      y = scale * (W (x - mean)) + bias,   W = (covariance + epsilon I)^(-1/2)

  within groups of channels, with the batch's statistics after `train()` and running averages of
  mean and W after `eval()` (ZCA: Huang et al. 2018, "Decorrelated Batch Normalization"; Newton's
  method: Huang et al. 2019, "Iterative Normalization: Beyond Standardization towards Efficient
  Whitening"). `jaxbn.variants.whitening.whitening_norm` says what is computed, how accurately, and
  what errors are raised; outputs are bit-equal to `jaxbn.linen.WhiteningNorm`'s. Arguments that
  `jaxbn.nnx.BatchNorm` has too mean the same.

  Args:
    num_features: number of channels.
    axis: the channels' axis, one.
    epsilon: added to the diagonal of the covariance.
    use_running_average, momentum, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
      axis_name, axis_index_groups, skip_nonfinite, masked_value, bias_metadata, scale_metadata,
      rngs: as in `BatchNorm`; momentum is not None.
    group_size: how many consecutive channels are whitened together; it divides their number.
    method: "zca" (DBN) or "newton" (IterNorm).
    iterations: of Newton's method.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.WhiteningNorm(2, group_size=2, rngs=nnx.Rngs(0))
  >>> y = layer(jnp.array([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0], [4.0, 4.0]]))
  >>> print(layer.mean[...])
  [0.02 0.03]
  >>> layer.whitening.shape
  (1, 2, 2)
  """

  def __init__(
    self,
    num_features: int,
    *,
    use_running_average: bool | None = False,
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = nnx.initializers.zeros,
    scale_init: Initializer = nnx.initializers.ones,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    rngs: nnx.Rngs,
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    skip_nonfinite: bool = False,
    masked_value: float | None = None,
    group_size: int = 16,
    method: str = "zca",
    iterations: int = 5,
  ):
    start = init(num_features, group_size)
    self.mean = nnx.BatchStat(start.mean)
    self.whitening = nnx.BatchStat(start.whitening)

    made = (num_features,), param_dtype, rngs
    self.scale = parameter(use_scale, scale_init, *made, scale_metadata)
    self.bias = parameter(use_bias, bias_init, *made, bias_metadata)

    self.num_features = num_features
    self.use_running_average = use_running_average
    self.axis = axis
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.axis_name = tuples(axis_name)
    self.axis_index_groups = tuples(axis_index_groups)
    self.skip_nonfinite = skip_nonfinite
    self.masked_value = masked_value
    self.group_size = group_size
    self.method = method
    self.iterations = iterations

  @by_our_names
  def __call__(
    self,
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
  ) -> jax.Array:
    """Whitens x.

    Args:
      x: real array of any rank.
      use_running_average: True in evaluation, False in training; before the constructor's.
      mask: binary, broadcasts against x, the same for all channels: which elements exist. As in
        Linen any dtype will do; what is not zero is True.
      weights: real, not negative, likewise: how often each element counts.

    Returns:
      y, of x's shape.
    """
    use_running_average = self._evaluating(use_running_average)
    x = _checks.inexact(x)
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)
    if shape != (self.num_features,):
      raise ValueError(
        f"x of shape {x.shape} has channels of shape {shape} on axis={self.axis}, but this layer "
        f"was made with num_features={self.num_features}: pass the number of channels to the "
        "constructor, or name their axis."
      )

    y, new_state = whitening_norm(
      x,
      None if self.scale is None else of_shape(self.scale, shape),
      None if self.bias is None else of_shape(self.bias, shape),
      WhiteningStats(of_shape(self.mean, shape), self.whitening[...]),
      use_running_average=use_running_average,
      axis=self.axis,
      group_size=self.group_size,
      method=self.method,
      iterations=self.iterations,
      momentum=self.momentum,
      epsilon=self.epsilon,
      mask=None if mask is None else jnp.asarray(mask, bool),
      weights=weights,
      masked_value=None if mask is None and weights is None else self.masked_value,
      axis_name=self.axis_name,
      axis_index_groups=self.axis_index_groups,
      skip_nonfinite=self.skip_nonfinite,
      dtype=self.dtype,
    )
    if not use_running_average:
      self._store(new_state)
    return y
