"""Higher learning rates, deep sigmoids, less dropout: Ioffe & Szegedy 2015, section 4.2.

python -m experiments.rates
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from benchmarks import results as stored
from experiments import experiment
from experiments.experiment import REFERENCE, Experiment, Found, looks, rate_grid, seeds
from experiments.rates_runs import COLOURS, PLAIN, SIDES, Plan, measure
from experiments.training import best, highest, percent, spread, tried

CHANCE = 0.1


def last(found: Found, what: str = "test", **which: Any) -> np.ndarray:
  """The accuracies in the end, by seed; NaN where the network diverged."""
  return looks(found, what, **which)[:, -1]


def settings(found: Found, part: str) -> list[float]:
  return sorted({row["setting"] for row in stored.of(found["rows"], part=part)})


def grid(found: Found, side: str) -> tuple[np.ndarray, np.ndarray]:
  """The rates, and accuracies (rates, seeds), of networks of ReLU."""
  return tried(stored.of(found["rows"], kind="grid", part="rates", side=side))


def gain(found: Found, side: str) -> np.ndarray:
  """By seed, the points of accuracy that dropout gains, at the best of the shares but 0."""
  none, *some = (
    last(found, part="dropout", side=side, setting=share) for share in settings(found, "dropout")
  )
  return 100 * (max(some, key=np.mean) - none)


def deepest(found: Found) -> list[np.ndarray]:
  """The accuracies of the deepest networks of sigmoids, side by side."""
  depth = settings(found, "depth")[-1]
  return [last(found, part="depth", side=side, setting=depth) for side in COLOURS]


def verdict(found: Found) -> str:
  low, high = (highest(*grid(found, side)) for side in SIDES)
  least, most = (highest(*grid(found, side), close=0.5) for side in SIDES)
  plain, normalized, larger = map(percent, deepest(found))
  without, with_norm = (spread(gain(found, side)) for side in SIDES)
  return (
    f"the highest rate that costs no more than 2 points is {low:g} without and {high:g} with "
    f"batch norm, {high / low:.0f} times as high, and the highest that trains at all is {least:g} "
    f"and {most:g}; {settings(found, 'depth')[-1]} layers of sigmoids reach {plain} % without, "
    f"{normalized} % with it, and {larger} % without it if kernels start 4 times as large; dropout "
    f"changes the test accuracy by {without} points without, and by {with_norm} with batch norm."
  )


def table(found: Found, part: str, first: str, what: tuple[str, ...] = ("test",)) -> str:
  """Accuracies in the end, a line for each setting, a column for each side."""
  sides = [side for side in COLOURS if stored.of(found["rows"], part=part, side=side)]
  names = {"test": "", "train": ", training images"}
  lines = [[first, *(side + names[w] for side in sides for w in what)]]
  for setting in settings(found, part):
    accuracies = [
      last(found, w, part=part, side=side, setting=setting) for side in sides for w in what
    ]
    lines.append([f"{setting:g}", *map(percent, accuracies)])
  return stored.table(lines, range(1, len(lines[0])))


def report(found: Found) -> list[str]:
  best_rates = [rates[best(accuracies)] for rates, accuracies in map(grid, [found] * 2, SIDES)]
  own = (
    f"Both are best at {best_rates[0]:g}, so that it is not a higher rate that makes the networks "
    "with batch norm better"
    if best_rates[0] == best_rates[1]
    else f"They are best at {best_rates[0]:g} without and {best_rates[1]:g} with batch norm"
  )
  plain, _, larger = (accuracies.mean() for accuracies in deepest(found))
  starts = (
    "It is how they start, more than what sigmoids are, that stops deep networks of them from "
    'learning: the words "only with batch norm" do not hold here.'
    if larger > plain + 0.2
    else "That does not help here."
  )
  plain_fit, normalized_fit = (last(found, part="dropout", side=s, setting=0.0) for s in SIDES)
  need = (
    "Even without batch norm dropout gains nothing here, though the networks fit their images, "
    "perhaps since they are small; so there is no need of it that batch norm could take away. "
    if gain(found, PLAIN).mean() < 0.3
    else "Without batch norm, dropout gains something here. "
  ) + (
    "Whether batch norm itself keeps networks from fitting too well: without dropout, it changes "
    f"the test accuracy by {spread(100 * (normalized_fit - plain_fit))} points."
  )
  return [
    "All networks have hidden layers of 100 units and learn from Fashion-MNIST by plain stochastic "
    "gradient descent, 60 images to a batch, a fifth of the training images held out. Mean ± "
    f"standard deviation of {seeds(found)}; accuracies are in %, on test images, in the end, of "
    "each network at its own best rate, unless said otherwise.",
    "**Higher learning rates** (left): three layers of ReLU, 2,000 steps at each of the rates; "
    "accuracy on the images held out, each dot a seed. What diverged is drawn at chance. "
    f"{own}.",
    table(found, "rates", "layers of ReLU"),
    "**Deep sigmoids** (middle): 3,000 steps. The slope of a sigmoid is a quarter at most, so that "
    "a gradient becomes at least 4 times smaller in each layer, if kernels start so that they keep "
    "sizes otherwise. So the third line: no batch norm, but kernels that start 4 times as large. "
    + starts,
    table(found, "depth", "layers of sigmoids"),
    "**Dropout** (right): three layers of ReLU, trained on 5,000 images only, for 60 epochs, so "
    "that networks fit them; dashed, the accuracy on these. " + need,
    table(found, "dropout", "share dropped", ("test", "train")),
    *rate_grid(found),
  ]


def draw(found: Found, figure: Figure) -> None:
  rates, depth, dropout = figure.subplots(1, 3)
  for side in SIDES:
    draw_line(rates, *grid(found, side), side)
  rates.set(
    xscale="log",
    xlabel="learning rate",
    ylabel="accuracy on images held out",
    title="learning rates, 3 layers of ReLU",
  )
  for axes, part in ((depth, "depth"), (dropout, "dropout")):
    for side in COLOURS:
      if stored.of(found["rows"], part=part, side=side):
        x = settings(found, part)
        y = np.array([last(found, part=part, side=side, setting=s) for s in x])
        draw_line(axes, np.array(x), y, side)
  for side in SIDES:
    x = settings(found, "dropout")
    fits = [last(found, "train", part="dropout", side=side, setting=s).mean() for s in x]
    dropout.plot(x, fits, "--", color=COLOURS[side], linewidth=1)
  depth.set(
    xlabel="hidden layers",
    xticks=settings(found, "depth"),
    ylabel="test accuracy",
    title="deep sigmoids",
  )
  dropout.set(
    xlabel="share dropped",
    xticks=settings(found, "dropout"),
    ylabel="test accuracy",
    title="dropout, 3 layers of ReLU",
  )
  dropout.yaxis.set_major_locator(MultipleLocator(0.05))
  for axes in (rates, depth):
    axes.axhline(CHANCE, color=REFERENCE, linewidth=1, linestyle=":", zorder=0)
    axes.set(ylim=(0, 1))
  for axes in (rates, depth, dropout):
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.25)
  for side, colour in COLOURS.items():
    rates.plot([], [], "o-", color=colour, label=side, markersize=4)
  rates.plot([], [], "--", color=REFERENCE, label="on training images")
  rates.plot([], [], ":", color=REFERENCE, label="chance")
  figure.legend(
    *rates.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
  )


def draw_line(axes: Axes, x: np.ndarray, accuracies: np.ndarray, side: str) -> None:
  """The mean of the seeds, and each as a dot; what diverged is as good as chance."""
  colour, shown = COLOURS[side], np.nan_to_num(accuracies, nan=CHANCE)
  axes.plot(x, shown.mean(-1), color=colour)
  axes.plot(x, shown, "o", color=colour, markersize=3)


EXPERIMENT = Experiment(
  name="rates",
  title="Higher learning rates, deep sigmoids, less dropout",
  source="Ioffe & Szegedy 2015, sections 3.3, 3.4 and 4.2, figures 2 and 3",
  claim="with batch norm Inception trains at 5 and 30 times its learning rate, while without it 5 "
  "times the rate made the parameters infinite; with sigmoids it reaches 69.8 %, while without "
  "batch norm it stayed at chance; and dropout can be removed or reduced.",
  measure=measure,
  plan=Plan(),
  full=Plan(depths=(1, 3, 5, 7, 9, 12, 15)),
  verdict=verdict,
  report=report,
  draw=draw,
  size=(12, 4.4),
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
