"""The layer for Flax NNX with a scale and a bias for each class."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer

from jaxbn import _checks
from jaxbn._names import by_our_names
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.variants.conditional import of_class


class ConditionalBatchNorm(BatchNorm):
  r"""Conditional batch normalization: a `BatchNorm` with a scale and a bias for each class.

      y_i = (x_i - mean) / sqrt(var + epsilon) * scale[labels_i] + bias[labels_i]

  See `jaxbn.variants.conditional`. The parameters `scale` and `bias` are (classes, channels); the
  statistics are those of all classes together. Where a network makes scale and bias:
  `BatchNorm(..., use_scale=False, use_bias=False)(x) * scale + bias`.

  Args:
    num_features: number of channels (with several axes, the product).
    num_classes: number of classes.
    scale_init: initializer of scale, called with the shape (num_classes, num_features).
    bias_init: initializer of bias, likewise.
    rngs: rng key.
    options: as in `BatchNorm`; `keep` is "input".

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.ConditionalBatchNorm(3, num_classes=10, rngs=nnx.Rngs(0))
  >>> layer(jnp.arange(12.0).reshape(4, 3), jnp.array([3, 1, 4, 1])).shape, layer.scale.shape
  ((4, 3), (10, 3))
  """

  def __init__(
    self,
    num_features: int,
    num_classes: int,
    *,
    scale_init: Initializer = nnx.initializers.ones,
    bias_init: Initializer = nnx.initializers.zeros,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    def table(initializer: Initializer) -> Initializer:
      return lambda key, shape, *args: initializer(key, (num_classes, *shape), *args)

    scale_init, bias_init = table(scale_init), table(bias_init)
    super().__init__(num_features, scale_init=scale_init, bias_init=bias_init, rngs=rngs, **options)
    self.num_classes = num_classes

  @by_our_names
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
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)

    def by_axes(variable: Any) -> jax.Array | None:
      return None if variable is None else variable[...].reshape(self.num_classes, *shape)

    valid = None if mask is None else jnp.asarray(mask, bool)
    scales, biases = by_axes(self.scale), by_axes(self.bias)
    scale, bias = of_class(x, scales, biases, labels, self.axis, valid, weights)
    given = {"mask": mask, "weights": weights, "residual": residual}
    return self._normalize(x, scale, bias, use_running_average, **given)
