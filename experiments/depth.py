"""Gradients explode with depth at the start: Yang et al. 2019, measured beside their theory.

python -m experiments.depth
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

import jaxbn.linen
from benchmarks import results as stored
from experiments import experiment, mean_field
from experiments.experiment import REFERENCE, THIRD, WITH, WITHOUT, Experiment, Found, Row, seeds
from experiments.splits import splits
from experiments.training import spread
from jaxbn.diagnostics import gradient_norms

RELU, LINEAR, SKIP = "ReLU", "linear", "ReLU, skip connections"
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  RELU: nn.relu,
  LINEAR: lambda x: x,
  SKIP: nn.relu,
}
COLOURS = {RELU: WITH, LINEAR: WITHOUT, SKIP: THIRD}
THEORY = {RELU: mean_field.relu, LINEAR: mean_field.linear}


class Plan(NamedTuple):
  """What is run: every kind at every batch size and the last width, ReLU at every width."""

  dataset: str = "fashion_mnist"
  depth: int = 24
  widths: tuple[int, ...] = (32, 128, 512)
  batch_sizes: tuple[int, ...] = (4, 8, 16, 64, 256)
  seeds: int = 3


class Deep(nn.Module):
  """Dense layers of one width, each with batch norm and activation, added to its input or not."""

  kind: str
  width: int
  depth: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Dense(self.width, use_bias=False)(x.reshape(len(x), -1))
    for _ in range(self.depth):
      y = nn.Dense(self.width, use_bias=False)(x)
      y = jaxbn.linen.BatchNorm(use_running_average=False)(y)
      y = ACTIVATIONS[self.kind](y)
      x = x + y if self.kind == SKIP else y
    return x


def measure(plan: Plan) -> list[Row]:
  """The squared norm of the gradient at the output of each batch norm, in their order."""
  *narrow, widest = plan.widths
  cases = [*itertools.product(COLOURS, [widest], plan.batch_sizes)]
  cases += itertools.product([RELU], narrow, plan.batch_sizes[-1:])
  images = splits(plan.dataset)["train"].images
  rows: list[Row] = []
  for (kind, width, size), seed in track([*itertools.product(cases, range(plan.seeds))]):
    model, batch = Deep(kind, width, plan.depth), images[size * seed : size * (seed + 1)]
    variables = model.init(jax.random.key(seed), batch)
    norms = gradient_norms(model, variables, batch).values()
    squares = [float(f"{norm**2:.5g}") for norm in norms]
    rows.append({"kind": kind, "width": width, "batch_size": size, "seed": seed, "of": squares})
  return rows


def rate(squares: list[float]) -> float:
  """The factor from a layer to the one before it, by least squares over the middle half."""
  logs = np.log(squares)
  quarter = len(logs) // 4
  slope, _ = np.polyfit(np.arange(len(logs))[quarter:-quarter], logs[quarter:-quarter], 1)
  return math.exp(-slope)


def rates(found: Found, **which: Any) -> list[float]:
  """Of each seed."""
  return [rate(row["of"]) for row in stored.of(found["rows"], **which)]


def sizes(found: Found, what: str) -> list[int]:
  return sorted({row[what] for row in found["rows"]})


def verdict(found: Found) -> str:
  width, size = sizes(found, "width")[-1], sizes(found, "batch_size")[-1]
  plain, skip = (rates(found, kind=k, width=width, batch_size=size) for k in (RELU, SKIP))
  return (
    f"{width} units, {size} examples: the squared gradient grows by {spread(plain, '.3f')} per "
    f"layer, where theory has {mean_field.relu(size):.3f}; with skip connections by "
    f"{spread(skip, '.3f')}."
  )


def report(found: Found) -> list[str]:
  widest = sizes(found, "width")[-1]
  by_size = [["examples", "linear", "theory", "ReLU", "theory", SKIP]]
  for size in sizes(found, "batch_size"):
    linear, relu, skip = (
      spread(rates(found, kind=k, width=widest, batch_size=size), ".3f")
      for k in (LINEAR, RELU, SKIP)
    )
    of_linear, of_relu = (f"{THEORY[k](size):.3f}" for k in (LINEAR, RELU))
    by_size.append([str(size), linear, of_linear, relu, of_relu, skip])
  largest = sizes(found, "batch_size")[-1]
  by_width = [["units", "ReLU"]] + [
    [str(width), spread(rates(found, kind=RELU, width=width, batch_size=largest), ".3f")]
    for width in sizes(found, "width")
  ]
  depth = len(found["rows"][0]["of"])
  return [
    f"{depth} dense layers with random kernels, each followed by batch norm and its activation, on "
    "a batch of Fashion-MNIST, before any training. The loss is a random sum of the outputs. "
    "Counted is the squared norm of its gradient at the output of each batch norm: the factor from "
    "one layer to the one before it, over the middle half of the layers, by least squares. Mean ± "
    f"standard deviation of {seeds(found)}.",
    "Why it grows: a ReLU lets half of the squared gradient through. But of what it gives, whose "
    "mean square is 1/2, batch norm takes the mean away, and divides by a variance of 1/2 - 1/(2 "
    "pi) only. The factor is the ratio, pi / (pi - 1). Without an activation there is nothing but "
    "the noise of the variance: n examples give (n - 2) / (n - 3).",
    stored.table(by_size, range(6)),
    f"Widths, at {largest} examples:",
    stored.table(by_width, range(2)),
    "Small batches explode faster. The theory of ReLU is the paper's for large batches; for each "
    "number of examples it is worked out in experiments/mean_field.py.",
    "Where it does not hold: theory is of layers that are wide beside the batch, which "
    f"{widest} units are not at {largest} examples. And it is of the start: the paper says, too, "
    "that after one step of training gradients differ far less.",
  ]


def draw(found: Found, figure: Figure) -> None:
  left, right = figure.subplots(1, 2)
  width, of_sizes = sizes(found, "width")[-1], sizes(found, "batch_size")
  largest = of_sizes[-1]
  for kind, colour in COLOURS.items():
    for row in stored.of(found["rows"], kind=kind, width=width, batch_size=largest):
      squares = np.array(row["of"])
      layers = np.arange(1, len(squares) + 1)
      left.plot(layers, squares / squares[-1], color=colour, linewidth=1.2)
    left.plot([], [], color=colour, label=kind)
    measured = [rates(found, kind=kind, width=width, batch_size=n) for n in of_sizes]
    right.plot(of_sizes, measured, "o", color=colour, markersize=4)
  growth = mean_field.relu(largest) ** (layers[-1] - layers)
  left.plot(layers, growth, "--", color=REFERENCE, label="theory")
  left.set(yscale="log", xlabel="layer, from the input", title="squared gradient, of the last's")
  left.legend(frameon=False)
  smooth = np.geomspace(of_sizes[0], largest, 100)
  for factor in THEORY.values():
    right.plot(smooth, [factor(n) for n in smooth], "--", color=REFERENCE, zorder=1)
  right.axhline(mean_field.RELU_LIMIT, color=REFERENCE, linestyle=":")
  right.text(
    largest, mean_field.RELU_LIMIT - 0.06, "pi / (pi - 1)", ha="right", va="top", color="0.35"
  )
  right.text(9, 1.23, "(n - 2) / (n - 3)", color="0.35")
  right.set(xscale="log", xlabel="examples in the batch, n", title="factor per layer")
  right.set_xticks(of_sizes, map(str, of_sizes))
  right.minorticks_off()
  for axes in (left, right):
    axes.grid(alpha=0.25)


EXPERIMENT = Experiment(
  name="depth",
  title="Gradients explode with depth",
  source='Yang et al. 2019, "A mean field theory of batch normalization"',
  claim="at the start of training, gradients in deep networks with batch norm grow from layer to "
  "layer, whatever the scale of the kernels, and by a factor of pi / (pi - 1), 1.467, in square "
  "with ReLU and large batches; without skip connections very deep ones are not trainable.",
  measure=measure,
  plan=Plan(),
  full=Plan(depth=50, widths=(32, 128, 512, 2048), batch_sizes=(4, 8, 16, 64, 256, 1024), seeds=10),
  verdict=verdict,
  report=report,
  draw=draw,
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
