"""The layer and the networks of experiments/centering.py, and how they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
from benchmarks.results import Row
from experiments.classification import grid, kept, orders, recipe
from experiments.experiment import THIRD, WITH, WITHOUT
from experiments.networks import Perceptron
from experiments.splits import splits
from experiments.training import Recipe, descend


def only_mean(batch: jaxbn.Moments, state: jaxbn.RunningStats | None) -> jaxbn.Chosen:
  """Centres, and leaves the scale."""
  return jaxbn.Chosen(batch.mean, jnp.ones_like(batch.var))


class Side(NamedTuple):
  """Who normalizes, and how it is drawn."""

  options: Mapping[str, Any] | None  # of batch norm; None: there is none
  colour: str
  line: str


NORM, CONSTANTS = "batch norm", "statistics as constants"
CENTRED, CONSTANT_MEAN = "only centred", "only centred, mean as a constant"
SIDES = {
  NORM: Side({}, WITH, "-"),
  CONSTANTS: Side({"detach_stats": True}, THIRD, "-"),
  CENTRED: Side({"choose": only_mean}, WITH, "--"),
  CONSTANT_MEAN: Side({"choose": only_mean, "detach_stats": True}, THIRD, "--"),
  "without": Side(None, WITHOUT, "-"),
}


class Plan(NamedTuple):
  """What is run."""

  dataset: str = "fashion_mnist"
  width: int = 100
  layers: int = 2
  batch_size: int = 60
  steps: int = 3000
  every: int = 100
  seeds: int = 3
  rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
  looked_at: int = 2000  # images, for the loss by their own statistics
  alone_steps: int = 1000
  alone_every: int = 100


def measure(plan: Plan) -> list[Row]:
  """The paper's layer, of which only the bias learns; and networks, of which all does."""
  rows: list[Row] = []
  for side in (CENTRED, CONSTANT_MEAN):
    all_images = np.zeros((plan.seeds, plan.alone_steps, 1), np.int32)  # in every step
    said = f"{side}: one layer"
    _, seen = descend(alone(plan, side), plan.rates, all_images, plan.alone_every, said)
    rows += each(plan, seen, plan.alone_every, kind="alone", side=side)
  for side in SIDES:
    _, seen = descend(network(plan, side), plan.rates, orders(plan), plan.every, side)
    rows += each(plan, seen, plan.every, kind="run", side=side)
    rows += grid(plan.rates, seen["held_out"][-1], side=side)
  return rows


def each(plan: Plan, seen: Mapping[str, np.ndarray], every: int, **what: Any) -> list[Row]:
  """A row for each rate and seed."""
  return [
    {**what, "rate": rate, "seed": seed, "every": every}
    | {name: kept(values[:, i, seed]) for name, values in seen.items()}
    for i, rate in enumerate(plan.rates)
    for seed in range(plan.seeds)
  ]


def cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def alone(plan: Plan, side: str) -> Recipe:
  """The paper's example, x = u + b less its mean over all examples: only b is learned."""
  images, labels = (jnp.asarray(a[: plan.looked_at]) for a in splits(plan.dataset)["train"])
  options = SIDES[side].options or {}
  lecun = nn.initializers.lecun_normal()

  def start(key: jax.Array) -> Any:
    below, above = jax.random.split(key)
    flat = images.reshape(len(images), -1)
    u = flat @ lecun(below, (flat.shape[1], plan.width))
    return u, lecun(above, (plan.width, 10)), jnp.zeros(plan.width)

  def loss(bias: jax.Array, u: jax.Array, head: jax.Array) -> jax.Array:
    x, _ = jaxbn.batch_norm(u + bias, use_running_average=False, **options)
    return cross_entropy(nn.relu(x) @ head, labels)

  def step(carry: Any, rate: jax.Array, batch: jax.Array) -> Any:
    u, head, bias = carry
    return u, head, bias - rate * jax.grad(loss)(bias, u, head)

  def look(carry: Any) -> dict[str, jax.Array]:
    u, head, bias = carry
    return {"loss": loss(bias, u, head), "biases": jnp.linalg.norm(bias)}

  return Recipe(start, step, look)


def network(plan: Plan, side: str) -> Recipe:
  """Hidden layers with a bias before the norm, and no scale and bias after it, as in section 2."""
  options = SIDES[side].options
  model = Perceptron(
    (plan.width,) * plan.layers,
    norm="none" if options is None else "before",
    options={"use_scale": False, "use_bias": False, **(options or {})},
    bias=True,
  )
  of = splits(plan.dataset)

  def by_batch(variables: Any, split: str) -> tuple[jax.Array, jax.Array]:
    """Logits of the first images by their own statistics, as in training; and their labels."""
    images, labels = (jnp.asarray(a[: plan.looked_at]) for a in of[split])
    logits, _ = model.apply(variables, images, True, mutable=["batch_stats"])
    return logits, labels

  def look(carry: Any) -> dict[str, jax.Array]:
    variables = carry[0]
    logits, labels = by_batch(variables, "validation")
    held_out = jnp.mean(jnp.argmax(logits, -1) == labels)
    loss = cross_entropy(*by_batch(variables, "train"))
    hidden = [variables["params"][f"Dense_{i}"] for i in range(plan.layers)]
    return {
      "loss": loss,
      "held_out": jnp.where(jnp.isfinite(loss), held_out, jnp.nan),
      "biases": optax.tree.norm([layer["bias"] for layer in hidden]),
      "kernels": optax.tree.norm([layer["kernel"] for layer in hidden]),
    }

  return recipe(model, plan.dataset)._replace(look=look)
