"""Batch normalization trains faster: figure 1 of Ioffe & Szegedy 2015, drawn anew.

python -m experiments.faster
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from benchmarks import results as stored
from experiments import experiment
from experiments.classification import recipe, tuned
from experiments.experiment import (
  WITH,
  WITHOUT,
  Experiment,
  Found,
  Row,
  chosen_rate,
  curves,
  rate_grid,
  seeds,
)
from experiments.networks import Perceptron
from experiments.splits import splits
from experiments.training import percent, spread

SIDES = {"without": ("none", WITHOUT), "with batch norm": ("before", WITH)}
PAPER, MODERN = "small Gaussian", "LeCun's"
STARTS = {PAPER: nn.initializers.normal(0.01), MODERN: nn.initializers.lecun_normal()}
QUANTILES = (0.15, 0.5, 0.85)
SMOOTHED = 5  # looks whose mean counts as the accuracy at a step


class Plan(NamedTuple):
  """What is run."""

  dataset: str = "fashion_mnist"
  width: int = 100
  batch_size: int = 60
  steps: int = 50_000
  tuning_steps: int = 5_000
  every: int = 500
  seeds: int = 3
  rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)


def measure(plan: Plan) -> list[Row]:
  """Three hidden layers of sigmoids, with and without, from the paper's start and a later one."""
  images = jnp.asarray(splits(plan.dataset)["test"].images)
  rows: list[Row] = []
  for (start, kernels), (side, (norm, _)) in itertools.product(STARTS.items(), SIDES.items()):
    model = Perceptron((plan.width,) * 3, norm=norm, activation=nn.sigmoid, kernel_init=kernels)

    def unit(variables: Any, model: Perceptron = model) -> dict[str, jax.Array]:
      """What goes into the first unit of the last hidden layer."""
      _, seen = model.apply(variables, images, False, mutable=["intermediates"])
      inputs = seen["intermediates"]["input"][-1][:, 0]
      return {"unit": jnp.quantile(inputs, jnp.array(QUANTILES))}

    rows += tuned(recipe(model, plan.dataset, look=unit), plan, side, start=start)
  return rows


def smooth(found: Found, start: str, side: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps, and means of the accuracies of SMOOTHED looks up to there, (seeds, looks)."""
  steps, accuracies = curves(found, "test", start=start, side=side)
  windows = np.lib.stride_tricks.sliding_window_view(accuracies[:, 1:], SMOOTHED, axis=1)
  return steps[SMOOTHED:], windows.mean(-1)


def sooner(found: Found, start: str) -> tuple[np.ndarray, np.ndarray]:
  """By seed: when the network without is at its best, and when the other is first as good."""
  (steps, without), (_, normalized) = (smooth(found, start, side) for side in SIDES)
  as_good = normalized >= without.max(1, keepdims=True)
  when = np.where(as_good.any(1), steps[as_good.argmax(1)], np.inf)
  return steps[without.argmax(1)], when


def verdict(found: Found) -> str:
  slow, fast = sooner(found, PAPER)
  slow_now, fast_now = sooner(found, MODERN)
  return (
    f"from a small Gaussian start the network without is at its best after {spread(slow, ',.0f')} "
    f"steps, and with batch norm it is as good after {spread(fast, ',.0f')}: {spread(slow / fast)} "
    f"times sooner. From LeCun's start the factor is {spread(slow_now / fast_now)}."
  )


def report(found: Found) -> list[str]:
  lines = [["start", "", "learning rate", "best test accuracy, %", "after steps", "in the end, %"]]
  for start, side in itertools.product(STARTS, SIDES):
    steps, accuracies = smooth(found, start, side)
    rate = chosen_rate(found, start=start, side=side)
    best, last = percent(accuracies.max(1)), percent(accuracies[:, -1])
    after = spread(steps[accuracies.argmax(1)], ",.0f")
    lines.append([start, side, str(rate), best, after, last])
  units = (curves(found, "unit", start=PAPER, side=side)[1] for side in SIDES)
  quantiles = [float(np.ptp(unit[0, look])) for unit in units for look in (len(unit[0]) // 10, -1)]
  return [
    "The paper's network: three hidden layers of 100 sigmoids, 60 examples to a batch, 50,000 "
    "steps of plain stochastic gradient descent; here on Fashion-MNIST, with a fifth of the "
    "training images held out. The paper starts from small random Gaussian weights and does not "
    "say how small: here their deviation is 0.01. Beside it LeCun's start, one over the square "
    "root of the number of inputs, which keeps signals at one size without any norm. Rates are "
    f"chosen after a tenth of the steps. Mean ± standard deviation of {seeds(found)}; an accuracy "
    f"is the mean of {SMOOTHED} looks, so that a lucky one does not count.",
    stored.table(lines, range(2, 6)),
    "Above, the accuracy on test images, in evaluation; each line is a seed. Below, what goes into "
    "one sigmoid of the last hidden layer, over the test images, from the paper's start: the "
    "median, and the 15th and 85th percentiles, as in the paper's figure, of the first seed.",
    f"Where it does not hold: from {quantiles[0]:.1f} after a tenth of the steps to "
    f"{quantiles[1]:.1f} in the end is how far these percentiles lie apart without, and from "
    f"{quantiles[2]:.1f} to {quantiles[3]:.1f} with batch norm. What goes into a sigmoid is not "
    "held still: scale and bias, which come after the normalization, learn.",
    *rate_grid(found),
  ]


def draw(found: Found, figure: Figure) -> None:
  above, below = figure.subplots(2, 2, sharex=True)
  low = min(smooth(found, start, side)[1][:, 0].max() for start in STARTS for side in SIDES)
  for axes, start in zip(above, STARTS, strict=True):
    for side, (_, colour) in SIDES.items():
      steps, accuracies = curves(found, "test", start=start, side=side)
      axes.plot(steps, accuracies.T, color=colour, linewidth=1)
      axes.plot([], [], color=colour, label=side)
    axes.set(title=f"test accuracy, {start} start", ylim=(min(low, 0.75), None))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  above[0].legend(frameon=False, loc="lower right")
  for axes, (side, (_, colour)) in zip(below, SIDES.items(), strict=True):
    steps, (unit, *_) = curves(found, "unit", start=PAPER, side=side)
    axes.fill_between(steps, unit[:, 0], unit[:, 2], color=colour, alpha=0.25, linewidth=0)
    axes.plot(steps, unit[:, 1], color=colour)
    axes.set(xlabel="steps", title=f"input of a sigmoid, {side}")
  for axes in figure.axes:
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


EXPERIMENT = Experiment(
  name="faster",
  title="Batch normalization trains faster",
  source="Ioffe & Szegedy 2015, figure 1 and section 4.2",
  claim="on MNIST a network of sigmoids learns faster and better with batch norm, and the "
  "distribution of a unit's input moves less over training; on ImageNet the same accuracy "
  "is reached with 14 times fewer steps.",
  measure=measure,
  plan=Plan(),
  full=Plan(seeds=10, rates=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
  verdict=verdict,
  report=report,
  draw=draw,
  size=(11, 7),
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
