"""The networks of experiments/rates.py, and how they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.results import Row
from experiments.classification import Training, recipe, tuned
from experiments.experiment import THIRD, WITH, WITHOUT
from experiments.networks import Perceptron
from experiments.splits import splits

PLAIN, NORMALIZED, LARGER = "without", "with batch norm", "without, kernels 4 times as large"
SIDES = (PLAIN, NORMALIZED)
COLOURS = {PLAIN: WITHOUT, NORMALIZED: WITH, LARGER: THIRD}
FITTED = 5000  # training images on which the fit is measured


class Plan(NamedTuple):
  """What is run: each part's trainings, and what it goes through."""

  rates: Training = Training((0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), 2000, 2000, 1000)
  depth: Training = Training((0.1, 0.3, 1.0, 3.0), 1000, 3000, 500)
  dropout: Training = Training((0.1, 0.3, 1.0), 2000, 5000, 1000)
  width: int = 100
  layers: int = 3  # but where the depth is what changes
  depths: tuple[int, ...] = (3, 5, 7, 9)
  dropouts: tuple[float, ...] = (0.0, 0.25, 0.5)
  examples: int = FITTED  # of the training images, so few that networks without dropout overfit


class Case(NamedTuple):
  """A network to train."""

  part: str
  side: str
  setting: float  # the depth, or what is dropped
  model: Perceptron
  examples: int | None = None


def cases(plan: Plan) -> Iterator[Case]:
  """All networks, part by part."""
  lecun, larger = (nn.initializers.variance_scaling(g**2, "fan_in", "normal") for g in (1, 4))
  made = {PLAIN: ("none", lecun), NORMALIZED: ("before", lecun), LARGER: ("none", larger)}
  hidden = (plan.width,) * plan.layers
  for side in SIDES:
    yield Case("rates", side, plan.layers, Perceptron(hidden, norm=made[side][0]))
  for depth in plan.depths:
    for side, (norm, init) in made.items():
      deep = (plan.width,) * depth
      model = Perceptron(deep, norm=norm, kernel_init=init, activation=nn.sigmoid)
      yield Case("depth", side, depth, model)
  for share in plan.dropouts:
    for side in SIDES:
      model = Perceptron(hidden, norm=made[side][0], dropout=share)
      yield Case("dropout", side, share, model, plan.examples)


def measure(plan: Plan) -> list[Row]:
  return [row for case in cases(plan) for row in trained(plan, case)]


def trained(plan: Plan, case: Case) -> list[Row]:
  """A network at its best learning rate, with its accuracies on training images, too."""
  part, side, setting, model, examples = case
  training: Training = getattr(plan, part)
  images, labels = (jnp.asarray(a[:FITTED]) for a in splits(training.dataset)["train"])

  def fit(variables: Any) -> dict[str, jax.Array]:
    logits: Any = model.apply(variables, images, False)
    return {"train": jnp.mean(jnp.argmax(logits, -1) == labels)}

  made = recipe(model, training.dataset, look=fit)
  return tuned(made, training, side, examples, part=part, setting=setting)
