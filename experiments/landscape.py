"""What Santurkar et al. 2018 measure of a network: how smooth its loss is, and covariate shift."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxbn.linen
from experiments.splits import splits
from jaxbn.diagnostics import gradient_shift, smoothness

PLAIN, NORM, SHIFTED, LAYER = "without", "batch norm", "batch norm, shifted", "layer norm"
MULTIPLES = (0.5, 1.0, 2.0, 4.0)  # of the learning rate: the paper's range of steps
MEASURES = ("loss_range", "predictiveness", "beta", "shift", "angle")


class Network(nn.Module):
  """Layers of ReLU, each normalized before it, or not.

  SHIFTED: behind batch norm every channel has, in training, another factor and another shift in
  each step, drawn evenly from 0.5 to 1.5 and from -0.5 to 0.5. They follow from the number of the
  step, which each layer counts among its variables, from a random start: so that the shift can be
  measured of one layer's next step and not of another's.
  """

  side: str
  layers: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array, training: bool) -> jax.Array:
    x = x.reshape(len(x), -1)
    for i in range(self.layers):
      x = nn.Dense(self.width, name=f"Dense_{i}")(x)
      if self.side == LAYER:
        x = nn.LayerNorm(name=f"Norm_{i}")(x)
      elif self.side != PLAIN:
        x = jaxbn.linen.BatchNorm(use_running_average=not training, name=f"Norm_{i}")(x)
      x = nn.relu(self.shifted(x, i, training) if self.side == SHIFTED else x)
    return nn.Dense(10, name=f"Dense_{self.layers}")(x)

  def shifted(self, x: jax.Array, layer: int, training: bool) -> jax.Array:
    def anywhere() -> jax.Array:
      return jax.random.randint(self.make_rng("params"), (), 0, 2**20).astype(float)

    step = self.variable("steps", f"Step_{layer}", anywhere)
    if not training:
      return x
    key = jax.random.fold_in(jax.random.key(layer), step.value.astype(int))
    factor, shift = jax.random.uniform(key, (2, self.width), minval=-0.5, maxval=0.5)
    if self.is_mutable_collection("steps"):
      step.value += 1
    return x * (1 + factor) + shift


def measured(model: Network, plan: Any) -> Any:
  """Of a network's variables, what Santurkar et al. measure, on one batch, in training mode."""
  train = splits(plan.dataset)["train"]
  x, labels = (jnp.asarray(a[: 4 * plan.batch_size]) for a in train)

  def look(variables: Any) -> dict[str, jax.Array]:
    params, steps = variables["params"], variables.get("steps", {})

    def loss(params: Any, steps: Any = steps) -> jax.Array:
      given = {**variables, "params": params, "steps": steps}
      logits: Any
      logits, _ = model.apply(given, x, True, mutable=["batch_stats"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def of_layers(layers: Any) -> jax.Array:
      both = {name: value for layer in layers for name, value in layer.items()}
      at = {name: both.pop(name) for name in steps}
      return loss(both, at)

    gradient = jax.grad(loss)(params)
    along = smoothness(loss, params, plan.common_rate * jnp.array(MULTIPLES))
    after = jax.tree.map(lambda p, g: p - plan.common_rate * g, params, gradient)
    later = {name: step + 1 for name, step in steps.items()}
    # Behind batch norm a step also draws other factors and shifts, whose own gradient is 0.
    shifts = gradient_shift(of_layers, by_layer({**params, **steps}), by_layer({**after, **later}))
    lengths = [optax.tree.norm(g) for g in by_layer(gradient)]
    pairs = list(zip(shifts, lengths, strict=True))[1:]  # before the first nothing moves
    return {
      "loss_range": along.loss.max() - along.loss.min(),
      "predictiveness": along.gradient_distance.max() / optax.tree.norm(gradient),
      "beta": along.beta.max(),
      "shift": jnp.stack([norm / length for (norm, _), length in pairs]).mean(),
      "angle": jnp.stack([jnp.arccos(jnp.clip(c, -1, 1)) for (_, c), _ in pairs]).mean(),
    }

  return look


def by_layer(params: Any) -> list[Any]:
  """The parameters of each layer and its norm, from the input on."""
  number = lambda name: int(name.rpartition("_")[2])  # noqa: E731
  grouped = itertools.groupby(sorted(params, key=number), number)
  return [{name: params[name] for name in names} for _, names in grouped]
