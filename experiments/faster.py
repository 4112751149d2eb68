"""Batch normalization trains faster: figure 1 of Ioffe & Szegedy 2015, drawn anew.

python -m experiments.faster
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import results as stored
from experiments import experiment
from experiments.classification import recipe, tuned
from experiments.experiment import WITH, WITHOUT, Experiment, Found, Row, rate_grid
from experiments.networks import Perceptron
from experiments.splits import splits
from experiments.training import percent, spread

SIDES = {"without": ("none", WITHOUT), "with batch norm": ("before", WITH)}
QUANTILES = (0.15, 0.5, 0.85)


class Plan(NamedTuple):
  """What is run."""

  dataset: str = "fashion_mnist"
  width: int = 100
  batch_size: int = 60
  steps: int = 50_000
  tuning_steps: int = 10_000
  every: int = 500
  seeds: int = 3
  rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)


def measure(plan: Plan) -> list[Row]:
  """Three hidden layers of sigmoids, with and without."""
  images = jnp.asarray(splits(plan.dataset)["test"].images)
  rows: list[Row] = []
  for side, (norm, _) in SIDES.items():
    model = Perceptron((plan.width,) * 3, norm=norm, activation=nn.sigmoid)

    def unit(variables: Any, model: Perceptron = model) -> dict[str, jax.Array]:
      """What goes into the first unit of the last hidden layer."""
      _, seen = model.apply(variables, images, False, mutable=["intermediates"])
      inputs = seen["intermediates"]["input"][-1][:, 0]
      return {"unit": jnp.quantile(inputs, jnp.array(QUANTILES))}

    rows += tuned(recipe(model, plan.dataset, look=unit), plan, side)
  return rows


def runs(found: Found, side: str, what: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps at which was looked, and what was seen, (seeds, looks, ...)."""
  rows = stored.of(found["rows"], kind="run", side=side)
  values = np.array([row[what] for row in rows])
  return rows[0]["every"] * np.arange(values.shape[1]), values


def sooner(found: Found) -> list[tuple[float, float]]:
  """By seed: when the network without is at its best, and when the other is first as good."""
  (steps, without), (_, normalized) = (runs(found, side, "test") for side in SIDES)
  steps, without, normalized = steps[1:], without[:, 1:], normalized[:, 1:]
  pairs = []
  for plain, other in zip(without, normalized, strict=True):
    as_good = steps[other >= plain.max()]
    pairs.append((float(steps[plain.argmax()]), float(as_good[0]) if len(as_good) else np.inf))
  return pairs


def verdict(found: Found) -> str:
  slow, fast = np.array(sooner(found)).T
  return (
    f"without, the best accuracy comes after {spread(slow, ',.0f')} steps; with batch norm the "
    f"same is reached after {spread(fast, ',.0f')}, {spread(slow / fast)} times sooner."
  )


def report(found: Found) -> list[str]:
  lines = [["", "learning rate", "best test accuracy, %", "after steps", "in the end, %"]]
  for side in SIDES:
    steps, accuracies = runs(found, side, "test")
    rate = stored.of(found["rows"], kind="run", side=side)[0]["rate"]
    at = steps[accuracies.argmax(1)]
    best, last = accuracies.max(1), accuracies[:, -1]
    lines.append([side, str(rate), percent(best), spread(at, ",.0f"), percent(last)])
  return [
    "The paper's network: three hidden layers of 100 sigmoids, 60 examples to a batch, 50,000 "
    "steps of plain stochastic gradient descent; here on Fashion-MNIST, with a fifth of the "
    "training images held out. Mean ± standard deviation of three seeds.",
    stored.table(lines, range(1, 5)),
    "On the left the accuracy on test images, in evaluation; each line is a seed. On the right "
    "what goes into one sigmoid of the last hidden layer, over the test images: the median, and "
    "the 15th and 85th percentiles, as in the paper's figure, of the first seed.",
    *rate_grid(found),
  ]


def draw(found: Found, figure: Figure) -> None:
  left, *right = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
  for side, (_, colour) in SIDES.items():
    steps, accuracies = runs(found, side, "test")
    left.plot(steps, accuracies.T, color=colour, linewidth=1)
    left.plot([], [], color=colour, label=side)
  low = min(runs(found, side, "test")[1][:, 2:].min() for side in SIDES)
  left.set(xlabel="steps", ylim=(low - 0.01, None), title="test accuracy")
  left.yaxis.set_major_formatter(PercentFormatter(1.0))
  left.legend(frameon=False, loc="lower right")
  for axes, (side, (_, colour)) in zip(right, SIDES.items(), strict=True):
    steps, (unit, *_) = runs(found, side, "unit")
    axes.fill_between(steps, unit[:, 0], unit[:, 2], color=colour, alpha=0.25, linewidth=0)
    axes.plot(steps, unit[:, 1], color=colour)
    axes.set(xlabel="steps", title=f"input of a sigmoid, {side}")
  for axes in (left, *right):
    axes.grid(alpha=0.25)


EXPERIMENT = Experiment(
  name="faster",
  title="Batch normalization trains faster",
  source="Ioffe & Szegedy 2015, figure 1 and section 4.2",
  claim="on MNIST a network of sigmoids learns faster and better with batch norm, and the "
  "distribution of a unit's input stays the same over training; on ImageNet the same accuracy "
  "is reached with 14 times fewer steps.",
  measure=measure,
  plan=Plan(),
  full=Plan(seeds=10, rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
  verdict=verdict,
  report=report,
  draw=draw,
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
