"""The networks of several experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax

import jaxbn.linen


class Perceptron(nn.Module):
  """Fully connected layers, each with batch norm before its activation, after it, or without.

  Batch norm takes the place of the bias where it stands before the activation, unless `bias` says
  otherwise. What goes into each activation is sown as `intermediates`.

  Attributes:
    widths: of the hidden layers.
    classes: of the last.
    norm: "before", "after" or "none".
    activation: of the hidden layers.
    kernel_init: of all layers.
    momentum: of the running statistics.
    layer: batch norm, or a layer that is called like it.
    options: other options of that layer.
    bias: before batch norm, too, where it cancels.
    dropout: the share of each hidden layer's outputs that is dropped in training.
  """

  widths: Sequence[int]
  classes: int = 10
  norm: str = "before"
  activation: Callable[[jax.Array], jax.Array] = nn.relu
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  momentum: float = 0.9
  layer: Callable[..., nn.Module] = jaxbn.linen.BatchNorm
  options: Mapping[str, Any] = flax.core.FrozenDict()
  bias: bool = False
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, training: bool) -> jax.Array:
    def normalized(x: jax.Array) -> jax.Array:
      norm = self.layer(use_running_average=not training, momentum=self.momentum, **self.options)
      normed: jax.Array = norm(x)
      return normed

    use_bias = self.bias or self.norm != "before"

    x = x.reshape(len(x), -1)
    for width in self.widths:
      x = nn.Dense(width, use_bias=use_bias, kernel_init=self.kernel_init)(x)
      x = normalized(x) if self.norm == "before" else x
      self.sow("intermediates", "input", x)
      x = self.activation(x)
      x = normalized(x) if self.norm == "after" else x
      x = nn.Dropout(self.dropout, deterministic=not training)(x)
    return nn.Dense(self.classes, kernel_init=self.kernel_init)(x)
