"""Batch renormalization (Ioffe 2017) beside batch normalization, where batches are small.

python -m experiments.renorm
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import results as stored
from experiments import experiment
from experiments.experiment import THIRD, WITH, WITHOUT, Experiment, Found, looks, rate_grid, seeds
from experiments.renorm_runs import MOMENTUM, NETWORKS, NONE, NORM, RENORM, Plan, measure
from experiments.training import percent

COLOURS = {NORM: WITH, RENORM: THIRD, NONE: WITHOUT}


def accuracies(found: Found, setting: str, size: int, side: str) -> np.ndarray:
  """On test images, of each seed, in the end."""
  return looks(found, "test", setting=setting, batch_size=size, side=side)[:, -1]


def settings(found: Found) -> list[str]:
  return list(dict.fromkeys(row["setting"] for row in found["rows"]))


def sizes(found: Found) -> list[int]:
  return sorted({row["batch_size"] for row in found["rows"]})


def gain(found: Found, setting: str, size: int) -> str:
  """What renorm has more than batch norm, in points."""
  more = accuracies(found, setting, size, RENORM) - accuracies(found, setting, size, NORM)
  within = abs(more.mean()) <= more.std(ddof=1)
  return f"{100 * more.mean():+.1f}" + (" (within the spread)" if within else "")


def verdict(found: Found) -> str:
  least, most = sizes(found)[0], sizes(found)[-1]
  said = [
    f"{setting}, {gain(found, setting, least)} with {least} examples in a batch and "
    f"{gain(found, setting, most)} with {most}"
    for setting in settings(found)
  ]
  return f"batch renorm beside batch norm, in points of accuracy: {'; '.join(said)}."


def described() -> str:
  """The networks, in a sentence each."""
  return " ".join(
    f"The {kind} network: patches of "
    + ", ".join(f"{patch}x{patch} to {channels}" for patch, channels in layers)
    + " channels, then a mean over positions."
    for kind, layers in NETWORKS.items()
  )


def table(found: Found, setting: str) -> str:
  lines = [["examples per batch", "steps", *COLOURS]]
  for size in sizes(found):
    row = stored.of(found["rows"], kind="run", setting=setting, batch_size=size)[0]
    steps = row["every"] * (len(row["test"]) - 1)
    cells = [percent(accuracies(found, setting, size, side)) for side in COLOURS]
    lines.append([str(size), str(steps), *cells])
  return stored.table(lines, range(len(lines[0])))


def report(found: Found) -> list[str]:
  parts = [
    "scikit-learn's digits, by stochastic gradient descent with momentum "
    f"{MOMENTUM}; all see as many examples, so that small batches have more steps. Each layer is "
    f"normalized before its ReLU. {described()} r_max and d_max follow the paper's schedules, in "
    "shares of the training: 1 and 0 for 5 %, then up to 3 at 40 % and 5 at 25 %. Accuracy in % on "
    "the test set in evaluation, by the running statistics: mean ± standard deviation of "
    f"{seeds(found)}, each a dot in the figure.",
    "Each channel of the fully connected network has as many elements as a batch has examples. Of "
    "two, batch normalization makes 1 and -1, whatever they were, so that no gradient comes "
    "through to what is before it. In batch renormalization r and d give the output its size "
    "again, but they are constants to the derivative: that gradient is 0 there, too. Which is why "
    "no norm at all is best there. [synchronized.md](synchronized.md) has small parts of a large "
    "batch.",
  ]
  for setting in settings(found):
    parts += [f"**{setting.capitalize()}**", table(found, setting)]
  return [*parts, *rate_grid(found)]


def draw(found: Found, figure: Figure) -> None:
  (panels,) = figure.subplots(1, len(settings(found)), sharey=True, squeeze=False)
  for axes, setting in zip(panels, settings(found), strict=True):
    for side, colour in COLOURS.items():
      values = np.array([accuracies(found, setting, size, side) for size in sizes(found)])
      axes.plot(sizes(found), values.mean(1), color=colour, label=side)
      axes.plot(sizes(found), values, "o", color=colour, markersize=3)
    axes.set(title=setting, xlabel="examples per batch")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes(found), [str(size) for size in sizes(found)])
    axes.grid(alpha=0.25)
  panels[0].set_ylabel("test accuracy")
  panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  panels[-1].legend(frameon=False, loc="lower right")


EXPERIMENT = Experiment(
  name="renorm",
  title="Batch renormalization where batches are small",
  source="Ioffe 2017, sections 4.2 and 4.3, figures 2 and 3",
  claim="where sets of 4 examples are normalized, Inception-v3 comes to 76.5 % with batch renorm "
  "and to 74.2 % with batch norm, and to 78.3 % with sets of 32; and where the examples of a "
  "batch are of few classes, batch renorm learns as from others, and batch norm does not.",
  measure=measure,
  plan=Plan(),
  full=Plan(examples=61_440, seeds=10, rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
  verdict=verdict,
  report=report,
  draw=draw,
  size=(12, 4.2),
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
