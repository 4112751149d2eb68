"""Smoother losses, or less internal covariate shift? Santurkar et al. 2018, measured.

python -m experiments.smoothness
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks import results as stored
from experiments import experiment
from experiments.classification import kept, orders, recipe, tuned
from experiments.experiment import (
  REFERENCE,
  THIRD,
  WITH,
  WITHOUT,
  Experiment,
  Found,
  Row,
  chosen_rate,
  looks,
  rate_grid,
  seeds,
)
from experiments.landscape import LAYER, MEASURES, NORM, PLAIN, SHIFTED, Network, measured
from experiments.training import descend, percent, spread

COLOURS = {PLAIN: WITHOUT, NORM: WITH, SHIFTED: THIRD, LAYER: REFERENCE}


class Plan(NamedTuple):
  """What is run."""

  dataset: str = "fashion_mnist"
  layers: int = 5
  width: int = 100
  batch_size: int = 60
  steps: int = 3000
  tuning_steps: int = 1500
  every: int = 100
  seeds: int = 3
  rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
  common_rate: float = 0.03  # of all, where they are measured


def measure(plan: Plan) -> list[Row]:
  """Each side at its own best rate, for its speed; and all at one rate, for what is measured."""
  rows: list[Row] = []
  for side in COLOURS:
    model = Network(side, plan.layers, plan.width)
    rows += tuned(recipe(model, plan.dataset), plan, side)
    rows += measures(model, plan)
  return rows


def measures(model: Network, plan: Plan) -> list[Row]:
  """A row for each seed: what is measured, look by look, at the common rate."""
  looked = recipe(model, plan.dataset, look=measured(model, plan))
  said = f"{model.side}: measured"
  _, seen = descend(looked, [plan.common_rate], orders(plan), plan.every, said)
  return [
    {
      **{"kind": "measured", "side": model.side, "seed": seed, "every": plan.every},
      **{name: kept(seen[name][:, 0, seed]) for name in MEASURES},
    }
    for seed in range(plan.seeds)
  ]


def early(found: Found, side: str) -> np.ndarray:
  """The mean test accuracy of the first tenth of the looks after the start: how fast it learns."""
  accuracies = looks(found, "test", side=side)[:, 1:]
  return accuracies[:, : max(accuracies.shape[1] // 10, 1)].mean(1)


def over_training(found: Found, side: str, what: str) -> np.ndarray:
  """The median of the looks after the start, by seed."""
  return np.median(looks(found, what, "measured", side=side)[:, 1:], axis=1)


def clear_pairs(found: Found) -> list[tuple[str, str]]:
  """The faster and the slower of two sides that differ by more than two standard errors."""
  speed = {side: early(found, side) for side in COLOURS}

  def clear(a: str, b: str) -> bool:
    error = np.sqrt((speed[a].var(ddof=1) + speed[b].var(ddof=1)) / len(speed[a]))
    return bool(speed[a].mean() - speed[b].mean() > 2 * error)

  return [pair for pair in itertools.permutations(COLOURS, 2) if clear(*pair)]


def agreement(found: Found, what: str) -> int:
  """In how many of these pairs the faster one has the smaller value."""
  value = {side: over_training(found, side, what).mean() for side in COLOURS}
  return sum(value[faster] < value[slower] for faster, slower in clear_pairs(found))


def verdict(found: Found) -> str:
  norm, shifted, plain = (percent(early(found, side)) for side in (NORM, SHIFTED, PLAIN))
  pairs, of = len(clear_pairs(found)), len(COLOURS) * (len(COLOURS) - 1) // 2
  smooth, shift = agreement(found, "beta"), agreement(found, "shift")
  says = (
    "too few to tell which of the two goes with the speed"
    if abs(smooth - shift) < 2
    else f"{'smoothness' if smooth > shift else 'the shift'} goes with the speed here"
  )
  more = over_training(found, SHIFTED, "shift") / over_training(found, PLAIN, "shift")
  return (
    f"early accuracy is {norm} % with batch norm, {shifted} % with shifts behind it, and {plain} % "
    f"without. Of {of} pairs of networks {pairs} differ in speed by more than two standard errors; "
    f"of these the faster one is the smoother (beta) in {smooth}, and has the smaller covariate "
    f"shift (of gradients) in {shift}: {says}. The network with shifts behind batch norm has "
    f"{spread(more)} times the covariate shift of the one without any norm."
  )


def report(found: Found) -> list[str]:
  speed = [["", "best rate", "early accuracy, %", "in the end, %"]]
  table = [["", "range of the loss", "gradient's change", "beta", "shift", "angle, degrees"]]
  for side in COLOURS:
    rate = chosen_rate(found, side=side)
    last = looks(found, "test", side=side)[:, -1]
    speed.append([side, str(rate), percent(early(found, side)), percent(last)])
    values = [over_training(found, side, what) for what in MEASURES]
    values[-1] = np.degrees(values[-1])
    table.append([side, *(spread(v, ".2f") for v in values)])
  return [
    "Networks of five layers of 100 ReLUs on Fashion-MNIST, 60 images to a batch, by plain "
    "stochastic gradient descent; a fifth of the training images held out. Shifted: behind batch "
    "norm each channel gets, in every training step, another random factor (0.5 to 1.5) and shift "
    "(-0.5 to 0.5), so that what the next layer sees is less stable than without any norm. "
    f"Mean ± standard deviation of {seeds(found)}.",
    "**Speed**, each at its own best rate; early: the mean of the first tenth of the looks.",
    stored.table(speed, range(1, 4)),
    "**What the paper measures**, all at one learning rate, on one batch of training images, the "
    "median over training. Along the gradient, for steps of 0.5 to 4 times the rate: the range of "
    "the loss; the largest change of the gradient, in its own length (predictiveness); beta, that "
    "change over the length of the step. Internal covariate shift: how much a layer's gradient "
    "changes when all layers before it have made their step, in its own length, and by which "
    "angle; the mean of the layers. To a step belong the factors and shifts that it draws.",
    stored.table(table, range(1, 6)),
    "Lower is smoother, or less of a shift. The table has four networks only, and its pairs are "
    "no proof: they say which measure could be the reason, not that it is.",
    *rate_grid(found),
  ]


def draw(found: Found, figure: Figure) -> None:
  accuracy, *panels = figure.subplots(1, 4, width_ratios=(1.3, 1, 1, 1))
  titles = {"loss_range": "range of the loss", "beta": "beta", "shift": "covariate shift"}
  for side, colour in COLOURS.items():
    for axes, what in zip((accuracy, *panels), ("test", *titles), strict=True):
      kind = "run" if what == "test" else "measured"
      values, every = looks(found, what, kind, side=side), found["rows"][-1]["every"]
      axes.plot(every * np.arange(values.shape[1]), values.mean(0), color=colour, label=side)
  accuracy.set(title="test accuracy, each at its best rate", ylim=(0.6, 0.9))
  for axes, title in zip(panels, titles.values(), strict=True):
    axes.set(title=title, yscale="log")
  for axes in (accuracy, *panels):
    axes.set(xlabel="steps")
    axes.grid(alpha=0.25)
  accuracy.legend(frameon=False, loc="lower right")


EXPERIMENT = Experiment(
  name="smoothness",
  title="Smoother, or less shift?",
  source='Santurkar et al. 2018, "How does batch normalization help optimization?", figures 1 to 4',
  claim="batch norm with random shifts injected behind it trains as well as without them, and "
  "better than no norm, though its inputs are less stable; internal covariate shift, measured by "
  "gradients, is no smaller with batch norm; and the loss is smoother along the gradient.",
  measure=measure,
  plan=Plan(),
  full=Plan(steps=30_000, tuning_steps=3000, every=300, seeds=10),
  verdict=verdict,
  report=report,
  draw=draw,
  size=(14, 3.8),
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
