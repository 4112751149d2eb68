"""The networks of experiments/renorm.py, and how they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax

import jaxbn.linen
from benchmarks.results import Row
from examples.models import space_to_depth
from experiments.classification import Training, recipe, tuned

NORMS = NORM, RENORM, NONE = "batch norm", "batch renorm", "no norm"
CONVOLUTIONAL, CONNECTED = "convolutional", "fully connected"
# Layer by layer: a patch of so many positions squared becomes one, of so many channels.
NETWORKS = {
  CONVOLUTIONAL: ((2, 32), (1, 32), (2, 64)),
  CONNECTED: ((8, 64), (1, 64), (1, 64)),
}
MOMENTUM = 0.9  # of the gradients


class Setting(NamedTuple):
  """A network, and whether a batch's examples are of two classes, or drawn evenly."""

  network: str
  two_classes: bool

  @property
  def title(self) -> str:
    return f"{self.network}, {'two classes in a batch' if self.two_classes else 'drawn evenly'}"


SETTINGS = (Setting(CONVOLUTIONAL, False), Setting(CONVOLUTIONAL, True), Setting(CONNECTED, False))


class Plan(NamedTuple):
  """What is run: `examples` are seen in training, whatever the size of the batches."""

  dataset: str = "digits"
  batch_sizes: tuple[int, ...] = (2, 4, 8, 32)
  examples: int = 6144
  looks: int = 4
  seeds: int = 3
  rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)


class Patches(nn.Module):
  """Convolutions of patches that do not overlap, each normalized before its ReLU.

  Attributes:
    layers: sides of the patches, and channels.
    side: of NORM, RENORM and NONE.
    steps: of the training, in shares of which renorm's limits are.
  """

  layers: tuple[tuple[int, int], ...]
  side: str
  steps: int

  @nn.compact
  def __call__(self, x: jax.Array, training: bool) -> jax.Array:
    r_max, d_max = limits(self.steps)
    for patch, channels in self.layers:
      # A convolution by its matrix: many of them at once are slow on the CPU.
      x = nn.Dense(channels, use_bias=self.side == NONE)(space_to_depth(x, patch))
      options: dict[str, Any] = {"use_running_average": not training, "momentum": 0.99}
      if self.side == NORM:
        x = jaxbn.linen.BatchNorm(**options, debias=True)(x)
      elif self.side == RENORM:
        x = jaxbn.linen.BatchRenorm(**options, debias=True, r_max=r_max, d_max=d_max)(x)
      x = nn.relu(x)
    return nn.Dense(10)(x.mean((1, 2)))


def limits(steps: int) -> tuple[optax.Schedule, optax.Schedule]:
  """The paper's r_max and d_max, in shares of the training instead of its thousands of steps."""
  first, d_end, r_end = (round(share * steps) for share in (0.05, 0.25, 0.4))
  return (
    optax.linear_schedule(1.0, 3.0, max(r_end - first, 1), first),
    optax.linear_schedule(0.0, 5.0, max(d_end - first, 1), first),
  )


def cases(plan: Plan) -> Iterator[tuple[Setting, Training, str]]:
  for setting in SETTINGS:
    for size in plan.batch_sizes:
      steps = plan.examples // size
      every = steps // plan.looks
      training = Training(plan.rates, steps, steps, every, plan.dataset, size, plan.seeds)
      for side in NORMS:
        yield setting, training, side


def measure(plan: Plan) -> list[Row]:
  """Rows for each setting, batch size and norm."""
  rows: list[Row] = []
  for setting, training, side in cases(plan):
    model = Patches(NETWORKS[setting.network], side, training.steps)
    made = recipe(model, plan.dataset, MOMENTUM)
    what: dict[str, Any] = {"setting": setting.title, "batch_size": training.batch_size}
    rows += tuned(made, training, side, two_classes=setting.two_classes, **what)
  return rows
