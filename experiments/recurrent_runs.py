"""The networks of experiments/recurrent.py, and how they are trained."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxbn.linen
from benchmarks.results import Row
from experiments.classification import tuned
from experiments.splits import Split, splits
from experiments.training import Recipe
from jaxbn.variants.recurrent import forget_gates_at_one

PLAIN, LAYER, GAIN_SMALL, GAIN_ONE = "LSTM", "layer norm", "batch norm, 0.1", "batch norm, 1"
METHODS = (PLAIN, LAYER, GAIN_SMALL, GAIN_ONE)
ROWS, PIXELS, PERMUTED = "row by row", "pixel by pixel", "pixels permuted"
TASKS = (ROWS, PIXELS, PERMUTED)
CLASSES = 10
NOISE = 0.1  # of the first hidden state: where all inputs are equal, something must differ
CLIP = 1.0  # of the gradient's norm


class Plan(NamedTuple):
  """What is run."""

  dataset: str = "digits"
  units: int = 48
  batch_size: int = 64
  steps: int = 600
  tuning_steps: int = 600
  every: int = 50
  seeds: int = 3
  rates: tuple[float, ...] = (0.002, 0.01)


class LSTMCell(nn.RNNCellBase):
  """A plain LSTM, or with layer normalization where `jaxbn.linen.LSTMCell` has the batch's.

  It starts as that does, forget gates at 1. (Flax's own cells start them at 0.)
  """

  features: int
  layer_norm: bool = False

  @nn.compact
  def __call__(self, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    c, h = carry
    dense = functools.partial(nn.Dense, 4 * self.features, use_bias=False)
    from_input, from_hidden = dense()(x), dense(kernel_init=nn.initializers.orthogonal())(h)
    bias = self.param("bias", forget_gates_at_one, (4 * self.features,))
    if self.layer_norm:
      from_input = nn.LayerNorm(use_bias=False)(from_input)
      from_hidden = nn.LayerNorm(use_bias=False)(from_hidden)
    i, f, g, o = jnp.split(from_input + from_hidden + bias, 4, -1)
    c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
    h = nn.sigmoid(o) * jnp.tanh(nn.LayerNorm()(c) if self.layer_norm else c)
    return (c, h), h

  @property
  def num_feature_axes(self) -> int:
    return 1


class Classifier(nn.Module):
  """The class of a sequence, from the last hidden state."""

  method: str
  units: int
  max_length: int

  @nn.compact
  def __call__(self, x: jax.Array, noise: jax.Array, training: bool) -> jax.Array:
    cell: nn.RNNCellBase
    if self.method in (PLAIN, LAYER):
      cell = LSTMCell(self.units, layer_norm=self.method == LAYER)
      carry: Any = (jnp.zeros_like(noise), noise)
    else:
      gain = nn.initializers.constant(0.1 if self.method == GAIN_SMALL else 1.0)
      cell = jaxbn.linen.LSTMCell(
        self.units,
        self.max_length,
        use_running_average=not training,
        momentum=None,  # a plain average: see `population`
        scale_init=gain,
      )
      carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)._replace(h=noise)
    if training:
      layer = nn.RNN(cell, variable_carry="batch_stats")
    else:
      layer = nn.RNN(cell, variable_broadcast=("params", "batch_stats"))
    _, outputs = layer(x, initial_carry=carry, return_carry=True)
    return nn.Dense(CLASSES)(outputs[:, -1])


def sequences(task: str, images: np.ndarray) -> np.ndarray:
  """(examples, steps, features)."""
  n, height, width, _ = images.shape
  if task == ROWS:
    return images.reshape(n, height, width)
  pixels = images.reshape(n, height * width, 1)
  if task == PERMUTED:
    pixels = pixels[:, np.random.default_rng(0).permutation(height * width)]
  return pixels


def recipe(method: str, task: str, plan: Plan) -> Recipe:
  """Adam with clipped gradients, on sequences."""
  of = {
    name: jax.tree.map(jnp.asarray, Split(sequences(task, images), labels))
    for name, (images, labels) in splits(plan.dataset).items()
  }
  train = of["train"]
  model = Classifier(method, plan.units, train.images.shape[1])
  optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam())

  def noise(key: jax.Array, examples: int) -> jax.Array:
    return NOISE * jax.random.normal(key, (examples, plan.units))

  def init(key: jax.Array) -> Any:
    return model.init(key, train.images[:2], noise(key, 2), True)

  fresh = jax.jit(init)(jax.random.key(0)).get("batch_stats", {})  # no updates yet

  def start(key: jax.Array) -> Any:
    at_init, key = jax.random.split(key)
    params = init(at_init)["params"]
    return params, optimizer.init(params), key

  def step(carry: Any, rate: jax.Array, batch: jax.Array) -> Any:
    params, state, key = carry
    key, at_noise = jax.random.split(key)

    def loss(params: Any) -> jax.Array:
      variables = {"params": params, "batch_stats": fresh}
      h = noise(at_noise, len(batch))
      logits, _ = model.apply(variables, train.images[batch], h, True, mutable=["batch_stats"])
      each = optax.softmax_cross_entropy_with_integer_labels(logits, train.labels[batch])
      return each.mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, key

  def population(params: Any, key: jax.Array) -> Any:
    """The average of the statistics of batches of the whole training set, as in the paper."""
    whole = len(train.labels) // plan.batch_size
    every = jnp.arange(whole * plan.batch_size).reshape(whole, plan.batch_size)

    def follow(stats: Any, batch: jax.Array) -> tuple[Any, None]:
      variables = {"params": params, "batch_stats": stats}
      h = noise(key, len(batch))
      _, new = model.apply(variables, train.images[batch], h, True, mutable=["batch_stats"])
      return new["batch_stats"], None

    return lax.scan(follow, fresh, every)[0] if fresh else fresh

  def look(carry: Any) -> dict[str, jax.Array]:
    params, _, key = carry
    variables = {"params": params, "batch_stats": population(params, key)}

    def accuracy(split: Split) -> jax.Array:
      logits: Any = model.apply(variables, split.images, noise(key, len(split.images)), False)
      return jnp.mean(jnp.argmax(logits, -1) == split.labels)

    return {name: accuracy(of[name]) for name in ("validation", "test")}

  return Recipe(start, step, look)


def measure(plan: Plan) -> list[Row]:
  """Rows for each task and method."""
  rows: list[Row] = []
  for task in TASKS:
    for method in METHODS:
      rows += tuned(recipe(method, task, plan), plan, method, task=task)
  return rows
