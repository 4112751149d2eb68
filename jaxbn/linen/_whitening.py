"""Whitening for Flax Linen: it holds parameters and state, and calls `whitening_norm`."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn._names import ByOurNames
from jaxbn.linen._common import mended
from jaxbn.variants.whitening import WhiteningStats, init, whitening_norm


class WhiteningNorm(ByOurNames, nn.Module):
  r"""Decorrelated batch normalization (DBN) and iterative normalization (IterNorm).

      y = scale * (W (x - mean)) + bias,   W = (covariance + epsilon I)^(-1/2)

  within groups of channels, with the batch's statistics in training and running averages of mean
  and W, kept in the collection `batch_stats`, in evaluation (ZCA: Huang et al. 2018, "Decorrelated
  Batch Normalization"; Newton's method: Huang et al. 2019, "Iterative Normalization: Beyond
  Standardization towards Efficient Whitening"). `jaxbn.variants.whitening.whitening_norm` says what
  is computed, how accurately, and what errors are raised. Fields that `jaxbn.linen.BatchNorm` has
  too mean the same. Initialization never changes the statistics, and needs no bound axis.

  Attributes:
    axis: the channels' axis, one.
    epsilon: added to the diagonal of the covariance.
    use_running_average, momentum, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
      axis_name, axis_index_groups, skip_nonfinite, masked_value: as in `BatchNorm`; momentum is not
      None.
    group_size: how many consecutive channels are whitened together; it divides their number.
    method: "zca" (DBN) or "newton" (IterNorm).
    iterations: of Newton's method.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.WhiteningNorm(use_running_average=False, group_size=2)
  >>> x = jnp.array([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0], [4.0, 4.0]])
  >>> variables = layer.init(jax.random.key(0), x)
  >>> jax.tree.map(jnp.shape, variables["batch_stats"])
  {'mean': (2,), 'whitening': (1, 2, 2)}
  >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
  >>> print(updates["batch_stats"]["mean"])
  [0.02 0.03]
  """

  use_running_average: bool | None = None
  axis: int = -1
  momentum: float = 0.99
  epsilon: float = 1e-5
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: Initializer = nn.initializers.zeros
  scale_init: Initializer = nn.initializers.ones
  axis_name: Any = None
  axis_index_groups: Any = None
  skip_nonfinite: bool = False
  masked_value: float | None = None
  group_size: int = 16
  method: str = "zca"
  iterations: int = 5

  @nn.compact
  @mended
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
      use_running_average: True in evaluation, False in training, if not said in the constructor.
      mask: binary, broadcasts against x, the same for all channels: which elements exist. As in
        Flax any dtype will do; what is not zero is True.
      weights: real, not negative, likewise: how often each element counts.

    Returns:
      y, of x's shape.
    """
    use_running_average = nn.merge_param(
      "use_running_average", self.use_running_average, use_running_average
    )
    x = _checks.inexact(x)
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)

    def variable(name: str) -> Any:
      def start() -> jax.Array:
        return getattr(init(math.prod(shape), self.group_size), name)

      return self.variable("batch_stats", name, start)

    state: Any = WhiteningStats(*map(variable, WhiteningStats._fields))
    initializing = self.is_initializing()
    shapes_only = initializing and not x.size  # an empty batch has no statistics
    y, new_state = whitening_norm(
      x,
      self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None,
      self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None,
      jax.tree.map(lambda leaf: leaf.value, state),
      use_running_average=shapes_only or use_running_average,
      axis=self.axis,
      group_size=self.group_size,
      method=self.method,
      iterations=self.iterations,
      momentum=self.momentum,
      epsilon=self.epsilon,
      mask=None if mask is None else jnp.asarray(mask, bool),
      weights=weights,
      masked_value=None if mask is None and weights is None else self.masked_value,
      axis_name=None if initializing else self.axis_name,
      axis_index_groups=None if initializing else self.axis_index_groups,
      skip_nonfinite=self.skip_nonfinite,
      dtype=self.dtype,
    )
    if new_state is not None and not initializing and not use_running_average:
      for leaf, value in zip(state, new_state, strict=True):
        leaf.value = value
    return y
