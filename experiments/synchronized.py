"""Statistics of each device, or of all: Peng et al. 2018, Ioffe 2017, Wu & He 2018.

python -m experiments.synchronized
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import results as stored
from experiments import experiment
from experiments.experiment import (
  THIRD,
  WITH,
  WITHOUT,
  Experiment,
  Found,
  looks,
  plan_of,
  rate_grid,
  seeds,
)
from experiments.synchronized_runs import LOCAL, RENORM, SHARED, Plan, measure
from experiments.training import percent

COLOURS = {LOCAL: WITHOUT, RENORM: THIRD, SHARED: WITH}
# Wu & He 2018, table 2: top-1 errors in %, by images per GPU.
PUBLISHED = {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7}
CLOSE = 0.01  # what counts as no loss


def accuracies(found: Found, side: str, elements: int) -> np.ndarray:
  """On test images, of each seed; the mean of the looks in the second half of the steps."""
  tests = looks(found, "test", side=side, elements=elements)
  return tests[:, tests.shape[1] // 2 :].mean(1)


def sizes(found: Found) -> list[int]:
  return sorted({row["elements"] for row in found["rows"]})


def shared(found: Found) -> np.ndarray:
  return accuracies(found, SHARED, sizes(found)[0])


def enough(found: Found, side: str) -> int | None:
  """From how many elements on a side is as good as synchronized statistics but for CLOSE."""
  good = shared(found).mean() - CLOSE
  worse = [size for size in sizes(found) if accuracies(found, side, size).mean() < good]
  return next((size for size in sizes(found) if size > max(worse, default=0)), None)


def verdict(found: Found) -> str:
  least = sizes(found)[0]
  at_least = {side: percent(accuracies(found, side, least)) for side in (LOCAL, RENORM)}
  said = []
  for side, name in ((LOCAL, "local statistics"), (RENORM, "batch renorm")):
    size = enough(found, side)
    said.append(f"{name} from {size} on" if size else f"{name} at none of these sizes")
  return (
    f"synchronized over all devices, {percent(shared(found))} %, however few examples each has. "
    f"With {least} examples per device, local statistics reach {at_least[LOCAL]} %, and batch "
    f"renorm {at_least[RENORM]} %. No more than a point below synchronized are "
    f"{' and '.join(said)}."
  )


def report(found: Found) -> list[str]:
  plan = plan_of(EXPERIMENT, found)
  heading = ["examples per device", LOCAL, RENORM, SHARED]
  lines = [heading]
  for size in sizes(found):
    cells = [percent(accuracies(found, side, size)) for side in (LOCAL, RENORM)]
    lines.append([str(size), *cells, percent(shared(found))])
  return [
    f"Fully connected networks of three layers of {plan.widths[0]} ReLUs learn Fashion-MNIST by "
    f"plain stochastic gradient descent. All see the same batches of {plan.batch_size} images, and "
    "all gradients are of the whole batch; what differs is whose statistics normalize: those of "
    f"the {plan.elements[0]} to {plan.elements[-1]} images that a device has, or of all "
    f"{plan.batch_size}. The devices are simulated by `jax.vmap(axis_name=...)`, which is to the "
    "layer what devices are. A channel has as many elements as there are images; in a "
    "convolutional network it has all positions of these, and the same happens at fewer images.",
    stored.table(lines, range(4)),
    f"Test accuracy in % in evaluation, mean ± standard deviation of {seeds(found)}; of each seed "
    "the mean of several looks, so that luck does not count. Evaluation is by the running "
    "statistics of all devices together. Synchronized statistics are the same for any "
    "number of devices: one training, of 64 devices, stands for all.",
    "Why local statistics fail: of two elements batch norm makes 1 and -1, whatever they were, so "
    "that no gradient comes through and only signs are left; and evaluation, by running "
    "statistics, is another function than the one that was trained. Batch renorm has the outputs "
    "of evaluation in training already (with r_max up to 3 and d_max up to 5, as in the paper, "
    "in shares of the training), but the gradient that is 0 stays 0. "
    "[renorm.md](renorm.md) has batches that are small themselves.",
    "The papers: Wu & He draw the error of ResNet-50 over images per GPU, whose statistics are "
    "local (left; their figure 1). Ioffe normalizes sets of 4 of 1,600 examples in Inception-v3: "
    "batch renorm learns faster and reaches more than batch norm, and both less than with sets of "
    "32 (figure 2). Peng et al. share statistics over GPUs with 2 images each, to train a "
    "detector with batches of 256 instead of 16; their gain is that this works at all, and takes 4 "
    "hours instead of 33. How batches that large train is not measured here.",
    *rate_grid(found),
  ]


def draw(found: Found, figure: Figure) -> None:
  left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
  left.plot(list(PUBLISHED), [1 - error / 100 for error in PUBLISHED.values()], "o-", color=WITHOUT)
  left.set(title="Wu & He 2018: ResNet-50, ImageNet", xlabel="images per GPU")
  for side in (LOCAL, RENORM):
    values = np.array([accuracies(found, side, size) for size in sizes(found)])
    right.plot(sizes(found), values.mean(1), color=COLOURS[side], label=side)
    right.plot(sizes(found), values, "o", color=COLOURS[side], markersize=3)
  right.axhline(shared(found).mean(), color=COLOURS[SHARED], label=SHARED)
  low, high = shared(found).min(), shared(found).max()
  right.axhspan(low, high, color=COLOURS[SHARED], alpha=0.2, linewidth=0)
  right.set(title="here: three layers, Fashion-MNIST", xlabel="examples per device")
  right.legend(frameon=False, loc="lower right")
  for axes, ticks in ((left, list(PUBLISHED)), (right, sizes(found))):
    powers_of_two(axes, ticks)


def powers_of_two(axes: Axes, ticks: list[int]) -> None:
  axes.set_xscale("log", base=2)
  axes.set_xticks(ticks, [str(tick) for tick in ticks])
  axes.set_ylabel("accuracy")
  axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  axes.grid(alpha=0.25)


EXPERIMENT = Experiment(
  name="synchronized",
  title="Synchronized statistics, local ones, and batch renorm",
  source="Peng et al. 2018 (MegDet); Ioffe 2017, figure 2; Wu & He 2018, figure 1 and table 2",
  claim="statistics of few examples cost accuracy: ResNet-50's error grows from 23.6 to 34.7 % "
  "from 32 to 2 images per GPU, each with statistics of its own; shared over GPUs, statistics "
  "make large batches possible that have few examples on each; and batch renorm gets back "
  "a part of what small sets lose.",
  measure=measure,
  plan=Plan(),
  full=Plan(steps=12_000, tuning_steps=4000, every=500, seeds=10, widths=(128, 128, 128)),
  verdict=verdict,
  report=report,
  draw=draw,
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
