"""The layer for Flax Linen with a scale and a bias for each class."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._common import mended
from jaxbn.variants.conditional import of_class


class ConditionalBatchNorm(BatchNorm, kw_only=True):
  r"""Conditional batch normalization: a `BatchNorm` with a scale and a bias for each class.

      y_i = (x_i - mean) / sqrt(var + epsilon) * scale[labels_i] + bias[labels_i]

  See `jaxbn.variants.conditional`. The parameters `scale` and `bias` are (classes, channels); the
  statistics in `batch_stats` are those of all classes together. Where a network makes scale and
  bias: `BatchNorm(use_scale=False, use_bias=False)(x) * scale + bias`.

  Attributes:
    num_classes: number of classes; to be named.
    scale_init, bias_init: initializers, called with the shape (classes, channels).
    use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale,
      axis_name, axis_index_groups, use_fast_variance, force_float32_reductions, debias, unbiased,
      skip_nonfinite, detach_stats, masked_value, activation, choose,
      virtual_batch_size: as in `BatchNorm`.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.ConditionalBatchNorm(num_classes=10, use_running_average=False)
  >>> x, labels = jnp.arange(12.0).reshape(4, 3), jnp.array([3, 1, 4, 1])
  >>> variables = layer.init(jax.random.key(0), x, labels)
  >>> jax.tree.map(jnp.shape, variables["params"])
  {'bias': (10, 3), 'scale': (10, 3)}
  """

  num_classes: int

  @nn.compact
  @mended
  def __call__(  # type: ignore[override]
    self,
    x: Any,
    labels: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    residual: jax.Array | None = None,
  ) -> jax.Array:
    """Normalizes x.

    Args:
      x: real or complex array, with its examples along the first axis that is not a channel's.
      labels: each example's class, integers of shape (N,), or one for all.
      use_running_average, mask, weights, residual: as in `BatchNorm`.

    Returns:
      y, of x's shape.
    """
    x = _checks.inexact(x)
    shape = (self.num_classes, *_checks.split_axes(x.ndim, self.axis).shape(x))
    scales = self._parameter("scale", self.scale_init, shape) if self.use_scale else None
    biases = self._parameter("bias", self.bias_init, shape) if self.use_bias else None
    valid = None if mask is None else jnp.asarray(mask, bool)
    scale, bias = of_class(x, scales, biases, labels, self.axis, valid, weights)
    given = {"mask": mask, "weights": weights, "residual": residual}
    return self._normalize(x, scale, bias, use_running_average, **given)
