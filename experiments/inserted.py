"""Batch norm enters a trained VGG: what the network is then, and how it trains on.

python -m experiments.inserted
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import results as stored
from experiments import experiment
from experiments.experiment import (
  REFERENCE,
  WITH,
  WITHOUT,
  Experiment,
  Found,
  chosen_rate,
  curves,
  rate_grid,
  seeds,
)
from experiments.inserted_runs import INSERTED, PLAIN, RESET, Plan, measure
from experiments.training import highest, percent, spread, tried

COLOURS = {PLAIN: WITHOUT, INSERTED: WITH, RESET: REFERENCE}
CHANCE = 0.1
PUBLISHED = (64.4, 63.4, 65.6)  # % of 5,000 images: the VGG, with norms inserted, an epoch later


def runs(found: Found, side: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps at which was looked, and the test accuracies, (seeds, looks)."""
  return curves(found, "test", side=side)


def grid(found: Found, side: str) -> tuple[np.ndarray, np.ndarray]:
  return tried(stored.of(found["rows"], kind="grid", side=side))


def largest(found: Found, mode: str) -> float:
  return max(row[mode] for row in stored.of(found["rows"], kind="inserted"))


def verdict(found: Found) -> str:
  (steps, plain), (_, inserted), (_, reset) = (runs(found, side) for side in COLOURS)
  tops = [highest(*grid(found, side)) for side in (PLAIN, INSERTED)]
  gain = 100 * (inserted[:, -1] - plain[:, -1])
  clear = abs(gain.mean()) > gain.std(ddof=1)
  return (
    f"accuracy is {percent(plain[:, 0])} % before and {percent(inserted[:, 0])} % after, and "
    f"{percent(reset[:, 0])} % if scale and bias are not set; outputs differ by "
    f"{largest(found, 'evaluation'):.0e} of the largest. {steps[-1]} steps later it is "
    f"{percent(plain[:, -1])} % without and {percent(inserted[:, -1])} % with batch norm, a "
    f"difference of {spread(gain)} points"
    + (", " if clear else ", which is within its spread, ")
    + f"and the highest rate that costs no more than 2 points is {tops[0]:g} without and "
    f"{tops[1]:g} with it."
  )


def report(found: Found) -> list[str]:
  heading = ["", "learning rate", "test accuracy before, %", "in the end, %"]
  lines = [heading]
  for side in COLOURS:
    rate = chosen_rate(found, side=side)
    _, tests = runs(found, side)
    lines.append([side, f"{rate:g}", percent(tests[:, 0]), percent(tests[:, -1])])
  steps = runs(found, PLAIN)[0][-1]
  return [
    "Simonyan & Zisserman's VGG (2015) has no norms, since it is older than batch norm. To have "
    "them in a VGG that is trained already, each norm gets the mean and the deviation of what goes "
    "through it for its running statistics, and for its bias and scale as well: it does nothing "
    "at first, and can be trained. `jaxbn.surgery.insert` does that, behind all convolutions; the "
    "course did it behind the two dense layers that have a ReLU. Its scale is the variance where "
    "it should be the deviation, which may be what its accuracy lost in between.",
    "Here a small VGG, with two stages of two convolutions, has learned scikit-learn's digits by "
    "100 steps of Adam, and is trained on by the same data, as examples/insert.py does it, for "
    f"{steps} more steps of 128 images: without norms, with them, and with norms "
    "whose scale and bias are those of a new network. In training an inserted norm is by its "
    "batch, whose statistics are not those of all images: outputs differ by "
    f"{largest(found, 'training'):.2g} of the largest there. Mean ± standard deviation of "
    f"{seeds(found)}, each of which is a VGG of its own.",
    stored.table(lines, range(1, len(heading))),
    "On the left the accuracy on images held out over the learning rate; each dot is a seed, and "
    "what diverged is drawn at chance. On the right the test accuracy of each at its best rate.",
    *rate_grid(found),
  ]


def draw(found: Found, figure: Figure) -> None:
  left, right = figure.subplots(1, 2)
  for side, colour in COLOURS.items():
    rates, accuracies = grid(found, side)
    shown = np.nan_to_num(accuracies, nan=CHANCE)
    left.plot(rates, shown.mean(-1), color=colour)
    left.plot(rates, shown, "o", color=colour, markersize=3)
    steps, tests = runs(found, side)
    right.plot(steps, tests.T, color=colour, linewidth=1)
    right.plot([], [], color=colour, label=side)
  left.set(xscale="log", xlabel="learning rate", title="accuracy on images held out", ylim=(0, 1))
  right.set(xlabel="steps of training on", title="test accuracy, at the best rates", ylim=(0, 1))
  right.legend(frameon=False, loc="lower right")
  for axes in (left, right):
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.25)


EXPERIMENT = Experiment(
  name="inserted",
  title="Batch norm enters a trained VGG",
  source="Howard, Practical Deep Learning for Coders 2016, notebook imagenet_batchnorm",
  claim="batch norms whose scale and bias undo their statistics leave a trained VGG-16's output "
  "as it was, and training on then has higher learning rates and is more resilient; the top-1 "
  f"accuracy of 5,000 images went from {PUBLISHED[0]} to {PUBLISHED[1]} %, and to {PUBLISHED[2]} "
  "% after an epoch.",
  measure=measure,
  plan=Plan(),
  full=Plan(seeds=10, rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
  verdict=verdict,
  report=report,
  draw=draw,
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
