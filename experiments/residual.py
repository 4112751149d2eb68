"""A residual network of dense layers, with batch norm and without."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from jaxbn import linen as bn
from jaxbn.alternatives import normalizer_free


class Residual(nn.Module):
  """A residual network of dense layers, with batch norm or normalizer-free.

  With batch norm, a block is x + f(x) with the norms and ReLUs before the layers; without, it is
  x + alpha f(x / beta), with standardized kernels, scaled ReLUs and SkipInit.
  """

  width: int
  blocks: int
  normalized: bool
  activation: Callable[[jax.Array], jax.Array]
  classes: int = 10
  alpha: float = 0.2

  @nn.compact
  def __call__(self, images: jax.Array, training: bool) -> jax.Array:
    def active(x: jax.Array, var: float) -> jax.Array:
      if not self.normalized:
        return self.activation(x / var**0.5)
      return bn.BatchNorm(not training, momentum=0.9, activation=self.activation)(x)

    def dense(x: jax.Array) -> jax.Array:
      layer = nn.Dense(self.width, use_bias=False) if self.normalized else bn.WSDense(self.width)
      return layer(x)

    x = dense(images.reshape(len(images), -1))
    *before, last = normalizer_free.expected_variances([False] * self.blocks, alpha=self.alpha)
    for var in before:
      y = dense(active(dense(active(x, var)), 1.0))
      x = x + (y if self.normalized else self.alpha * bn.SkipInit()(y))
    return nn.Dense(self.classes, name="head")(active(x, last))
