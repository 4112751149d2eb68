"""Batch norm before or after the activation, and which activations need it.

python -m experiments.placement
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import results as stored
from experiments import experiment
from experiments.activations import inside
from experiments.classification import recipe, tuned
from experiments.experiment import (
  REFERENCE,
  THIRD,
  WITH,
  WITHOUT,
  Experiment,
  Found,
  Row,
  looks,
  seeds,
)
from experiments.networks import Perceptron
from experiments.training import percent

SIDES = {"without": ("none", WITHOUT), "before": ("before", WITH), "after": ("after", THIRD)}
ACTIVATIONS = {"sigmoid": nn.sigmoid, "tanh": nn.tanh, "ReLU": nn.relu}
SHADES = ("#f0a08c", WITH, "#6b1d10")  # of the activations
LABELS = ("without", "batch norm before", "after")
STEEPEST = {"sigmoid": 0.25, "tanh": 1.0, "ReLU": 1.0}
# Of a standard normal z, the share of its variance that is linear in max(z, 0).
RECOVERED_OF_NORMAL = 0.5 / (1 - 1 / np.pi)


class Plan(NamedTuple):
  """What is run."""

  dataset: str = "fashion_mnist"
  widths: tuple[int, ...] = (100, 100, 100)
  batch_size: int = 60
  steps: int = 6_000
  tuning_steps: int = 1_000
  every: int = 1_000
  seeds: int = 3
  rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
  read: int = 2_000  # images held out to which linear readouts are fitted, and test images


def measure(plan: Plan) -> list[Row]:
  """Each activation, without batch norm, with it before and with it after."""
  rows: list[Row] = []
  for name, activation in ACTIVATIONS.items():
    for side, (norm, _) in SIDES.items():
      model = Perceptron(
        plan.widths, norm=norm, activation=activation, kernel_init=nn.initializers.he_normal()
      )
      look = inside(model, plan.dataset, plan.read, STEEPEST[name])
      rows += tuned(recipe(model, plan.dataset, look=look), plan, side, activation=name)
  return rows


def last(found: Found, activation: str, side: str, what: str) -> np.ndarray:
  """What was seen in the end, (seeds, ...)."""
  return looks(found, what, activation=activation, side=side)[:, -1]


def gain(found: Found, activation: str, over: str, side: str) -> str:
  """How many points of test accuracy a side has more than another, in words."""
  points = 100 * (last(found, activation, side, "test") - last(found, activation, over, "test"))
  return f"{activation} {points.mean():+.1f} ± {points.std(ddof=1):.1f}"


def verdict(found: Found) -> str:
  after, before = (
    ", ".join(gain(found, activation, over, side) for activation in ACTIVATIONS)
    for over, side in (("before", "after"), ("without", "before"))
  )
  of_relu = functools.partial(last, found, "ReLU", "before")
  zeros, read, lost = (of_relu(w).mean(-1) for w in ("asleep", "read_after", "read_before"))
  return (
    f"after instead of before the activation, in points of test accuracy: {after}; before instead "
    f"of not at all: {before}. Of what batch norm gives to ReLUs {percent(zeros)} % become zero, "
    f"but a linear readout of a hidden layer is right on {percent(read)} % of the images behind "
    f"them and on {percent(lost)} % in front of them."
  )


def report(found: Found) -> list[str]:
  accuracies = [["", *(f"{a}: test accuracy, %" for a in ACTIVATIONS),
                 *(f"{a}: asleep, %" for a in ACTIVATIONS)]]  # fmt: skip
  for side in SIDES:
    tests = [percent(last(found, a, side, "test")) for a in ACTIVATIONS]
    asleep = [percent(last(found, a, side, "asleep").mean(-1)) for a in ACTIVATIONS]
    accuracies.append([side, *tests, *asleep])
  layers = [["ReLU", "layer", "zeros, %", "dead units, %", "linear in the output, %",
             "read in front, %", "read behind, %"]]  # fmt: skip
  for side in SIDES:
    seen = [
      last(found, "ReLU", side, what)
      for what in ("asleep", "dead", "recovered", "read_before", "read_after")
    ]
    layers += [
      [side, str(layer + 1), *(percent(values[:, layer]) for values in seen)]
      for layer in range(seen[0].shape[1])
    ]
  steps = stored.of(found["rows"], kind="run")[0]
  total = steps["every"] * (len(steps["test"]) - 1)
  return [
    f"Three hidden layers of 100 units on Fashion-MNIST, 60 examples to a batch, {total:,} steps "
    "of plain gradient descent; kernels start as He et al. have them. Mean ± standard deviation "
    f"of {seeds(found)}.",
    stored.table(accuracies, range(1, 7)),
    "A unit is asleep on an image if the activation's slope there is below a tenth of its "
    "greatest, so that little gradient comes through: for a ReLU, where it is zero. Batch norm "
    "after the activation does not look at what goes into it, and leaves it to the weights.",
    "**What a standardized input to ReLU loses.** Half of its elements, and of a single normal "
    f"input {100 * RECOVERED_OF_NORMAL:.0f} % of the variance is still linear in the output. But "
    "the units of a layer lean on each other: the table says how much of the variance of all "
    "inputs of a layer is linear in all its outputs, and on how many test images a linear readout "
    "is right, fitted by least squares to 2,000 images held out, in front of the ReLU and behind "
    "it. Zeros are how a ReLU computes, not what it loses. A unit is dead if it is asleep on all "
    "4,000 images that are looked at.",
    stored.table(layers, range(1, 7)),
    "**What scale and bias learn.** The median over the units of a layer, and in brackets between "
    "which values nine of ten lie, with batch norm before the activation, mean of the seeds; "
    "they start at 1 and 0. A standardized input keeps a sigmoid where it is nearly linear, "
    "as Ioffe and Szegedy say themselves, and scale is there to undo it:",
    stored.table(learned(found), (1, 2, 3, 4)),
    "What this does not show: the network is a small perceptron, not the convolutional one of the "
    f"published table; {total:,} steps are few (faster.md has 50,000, of sigmoids); and the rate "
    "is chosen early, where several are nearly as good.",
    *experiment.rate_grid(found),
  ]


def learned(found: Found) -> list[list[str]]:
  """Scale and bias in the end, and how many elements sleep at the start and in the end."""
  lines = [["activation", "layer", "scale", "bias", "asleep at first, then, %"]]
  for activation in ACTIVATIONS:
    of = {n: last(found, activation, "before", n).mean(0) for n in ("scale", "bias", "asleep")}
    rows = stored.of(found["rows"], kind="run", activation=activation, side="before")
    first = np.mean([row["asleep"][0] for row in rows], 0)
    for layer, (scale, bias, asleep) in enumerate(zip(*of.values(), strict=True)):
      quantiles = (f"{m:.2f} ({low:.2f} to {high:.2f})" for low, _, m, _, high in (scale, bias))
      asleep_said = f"{100 * first[layer]:.1f}, {100 * asleep:.1f}"
      lines.append([activation, str(layer + 1), *quantiles, asleep_said])
  return lines


def draw(found: Found, figure: Figure) -> None:
  left, middle, *right = figure.subplots(1, 4, width_ratios=(1.5, 1.2, 1, 1))
  for i, (side, (_, colour)) in enumerate(SIDES.items()):
    for j, activation in enumerate(ACTIVATIONS):
      tests = last(found, activation, side, "test")
      at = j + 0.22 * (i - 1)
      left.bar(at, tests.mean(), 0.2, color=colour, alpha=0.35, label=LABELS[i] if j == 0 else None)
      left.plot([at] * len(tests), tests, ".", color=colour)
  every = [v for a in ACTIVATIONS for s in SIDES for v in last(found, a, s, "test")]
  left.set(title="test accuracy", ylim=(min(every) - 0.02, max(every) + 0.01))
  left.set_xticks(range(len(ACTIVATIONS)), ACTIVATIONS)
  left.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
  left.legend(frameon=False, ncols=3, fontsize=8, loc="upper left")
  for what, colour, label in (
    ("read_before", REFERENCE, "in front of the ReLU"),
    ("read_after", WITH, "behind it"),
  ):
    values = last(found, "ReLU", "before", what)
    layers = 1 + np.arange(values.shape[1])
    error = values.std(0, ddof=1)
    middle.errorbar(layers, values.mean(0), error, fmt="o-", color=colour, label=label)
    middle.set_xticks(layers)
  middle.set(title="linear readout, batch norm before", xlabel="layer")
  middle.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
  middle.legend(frameon=False, loc="lower right")
  for axes, name in zip(right, ("scale", "bias"), strict=True):
    for i, (activation, shade) in enumerate(zip(ACTIVATIONS, SHADES, strict=False)):
      low, median, high = last(found, activation, "before", name).mean(0).T[[0, 2, 4]]
      places = 1 + np.arange(len(median)) + 0.2 * (i - 1)
      around = (median - low, high - median)
      axes.errorbar(places, median, around, fmt="o", color=shade, linewidth=2, label=activation)
    axes.set(title=f"{name}, batch norm before", xlabel="layer", xticks=layers)
    axes.axhline(float(name == "scale"), color=REFERENCE, linewidth=1, linestyle="--")
  right[0].legend(frameon=False, loc="upper left")
  for axes in (left, middle, *right):
    axes.grid(alpha=0.25)


EXPERIMENT = Experiment(
  name="placement",
  title="Before or after the activation, and of which",
  source="Ioffe & Szegedy 2015, section 3.2; D. Mishkin, caffenet-benchmark, batchnorm.md",
  claim="batch norm goes before the activation, says the paper that brought it. On ImageNet at 128 "
  "pixels CaffeNet with ReLU, without scale and bias, has 47.4 % with it before and 49.9 % after "
  "(47.8 % and 49.3 % with scale and bias), 47.1 % without; but GoogLeNet 60.7 % before, 59.6 % "
  "after, 61.9 % without. With sigmoids CaffeNet has 47.5 %.",
  measure=measure,
  plan=Plan(),
  full=Plan(steps=50_000, tuning_steps=10_000, every=5_000, seeds=10),
  verdict=verdict,
  report=report,
  draw=draw,
  size=(15, 4.2),
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
