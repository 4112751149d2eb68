"""Networks whose weights have a length and a direction, and what a loss says of the directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.classification import Look
from experiments.splits import splits
from jaxbn.linen import WeightNorm


class WeightNormed(nn.Module):
  """A perceptron of hyperbolic tangents that starts as the plain one, but learns lengths apart."""

  widths: tuple[int, ...]
  classes: int = 10

  @nn.compact
  def __call__(self, x: jax.Array, training: bool) -> jax.Array:
    x = x.reshape(len(x), -1)
    for width in self.widths:
      x = nn.tanh(WeightNorm(nn.Dense(width), data_dependent_init=False)(x))
    return nn.Dense(self.classes)(x)


def by_direction(model: nn.Module, dataset: str, widths: Sequence[int], examples: int) -> Look:
  """The loss of the first training images, and the norm of its derivative by directions.

  Those of the weights of all hidden units: layers of these widths, which the last is not.
  """
  train = splits(dataset)["train"]
  images, labels = (jnp.asarray(a[:examples]) for a in train)

  def look(variables: Any) -> dict[str, jax.Array]:
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Any) -> jax.Array:
      logits: Any = model.apply({"params": params, **state}, images, True, mutable=list(state))[0]
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradient = jax.value_and_grad(loss)(variables["params"])
    pairs = [
      (layer["kernel"], gradient[name]["kernel"])
      for name, layer in variables["params"].items()
      if "kernel" in layer and layer["kernel"].shape[1] in widths
    ]
    return {"loss": value, "direction": jnp.sqrt(sum(across(w, g) for w, g in pairs))}

  return look


def across(w: jax.Array, gradient: jax.Array) -> jax.Array:
  """The squared norm of a derivative by directions w / |w|, each a column, all taken together."""
  squares = jnp.square(w).sum(0)
  along = (w * gradient).sum(0) / squares
  return (squares * jnp.square(gradient - along * w).sum(0)).sum()
