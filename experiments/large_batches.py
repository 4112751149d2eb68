"""Large batches without batch norm, with and without adaptive clipping (Brock et al. 2021).

python -m experiments.large_batches
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import results as stored
from examples.optimizers import adaptive_clip
from experiments import experiment
from experiments.classification import Training, recipe, tuned
from experiments.experiment import (
  THIRD,
  WITH,
  WITHOUT,
  Experiment,
  Found,
  Row,
  chosen_rate,
  looks,
  plan_of,
  rate_grid,
  seeds,
)
from experiments.residual import Residual
from experiments.training import percent
from jaxbn.alternatives import normalizer_free

# By side: the threshold of clipping, and how it is drawn.
SIDES: dict[str, tuple[float | None, dict[str, Any]]] = {
  "batch norm": (None, {"color": WITH}),
  "normalizer-free": (None, {"color": WITHOUT}),
  "clipped at 0.1": (0.1, {"color": THIRD}),
  "clipped at 0.02": (0.02, {"color": THIRD, "linestyle": "--"}),
}


class Plan(NamedTuple):
  """What is run."""

  dataset: str = "fashion_mnist"
  width: int = 64
  blocks: int = 4
  batch_sizes: tuple[int, ...] = (64, 256, 1024, 2048)
  images: int = 98_304  # that a network is trained on, two epochs; a multiple of all batch sizes
  tuning_images: int = 49_152
  seeds: int = 3
  rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
  momentum: float = 0.9


def measure(plan: Plan) -> list[Row]:
  """Each side at each batch size, all on as many images."""
  rows: list[Row] = []
  for side, (threshold, _) in SIDES.items():
    normalized = side == "batch norm"
    relu = nn.relu if normalized else normalizer_free.scaled_activation(nn.relu)
    model = Residual(plan.width, plan.blocks, normalized, relu)
    clip = None if threshold is None else adaptive_clip(threshold)
    descent = recipe(model, plan.dataset, plan.momentum, clip=clip)
    for size in plan.batch_sizes:
      steps, tuning = plan.images // size, plan.tuning_images // size
      at_size = Training(plan.rates, tuning, steps, steps, plan.dataset, size, plan.seeds)
      rows += tuned(descent, at_size, side, batch=size)
  return rows


def last(found: Found, side: str, batch: int) -> np.ndarray:
  """Test accuracies in the end, of the seeds; NaN where one diverged."""
  return looks(found, "test", side=side, batch=batch)[:, -1]


def batches(found: Found) -> list[int]:
  return sorted({row["batch"] for row in found["rows"]})


def verdict(found: Found) -> str:
  small, *_, large = batches(found)
  said = [
    f"{side} {percent(last(found, side, small))} and {percent(last(found, side, large))}"
    for side in SIDES
  ]
  return (
    f"test accuracy in % with batches of {small} and of {large:,}, all on as many images and each "
    f"at its best rate: {'; '.join(said)}."
  )


def report(found: Found) -> list[str]:
  plan = plan_of(EXPERIMENT, found)
  sizes = batches(found)
  lines = [["batch size", *map("{:,}".format, sizes)]]
  rates = [["batch size", *map("{:,}".format, sizes)]]
  for side in SIDES:
    lines.append([side, *(percent(last(found, side, size)) for size in sizes)])
    chosen = [chosen_rate(found, side=side, batch=n) for n in sizes]
    rates.append([side, *map(str, chosen)])
  return [
    f"A residual network of dense layers on Fashion-MNIST: {plan.blocks} blocks of two layers, "
    f"{plan.width} wide, by descent with momentum {plan.momentum}, on {plan.images:,} images "
    "whatever the batch size, so that a batch four times as large has a fourth of the steps. Test "
    f"accuracy in %, mean ± standard deviation of {seeds(found)}:",
    stored.table(lines, range(1, len(sizes) + 1)),
    "The rates that were chosen for it:",
    stored.table(rates, range(1, len(sizes) + 1)),
    "The normalizer-free network has standardized kernels, scaled ReLUs and SkipInit "
    "(`jaxbn.alternatives.normalizer_free`). Clipping (`optax.adaptive_grad_clip`) lets the "
    "gradient of a unit's weights be at most 0.1 or 0.02 times as long as they are; the last "
    "layer is left out. The paper chooses the threshold for each batch size, as the figure here "
    "does not: both are shown.",
    "What is not as in the paper: its networks are convolutional, as deep as 50 and 200 layers, "
    "and trained on ImageNet for 90 epochs with a rate that is scaled with the batch size and "
    "falls; here the network is small, the rate is tuned at each batch size and constant, and "
    f"training is short. The rate is chosen after {plan.tuning_images:,} images. "
    f"{at_an_end(found)}",
    *rate_grid(found),
  ]


def at_an_end(found: Found) -> str:
  """A sentence on the rates that were chosen at an end of what was tried, if there are any."""
  grid = [row["rate"] for row in stored.of(found["rows"], kind="grid")]
  runs = stored.of(found["rows"], kind="run", seed=0)
  ends = [f"{r['side']} at {r['batch']}" for r in runs if r["rate"] in (min(grid), max(grid))]
  return f"At an end of the rates that were tried are {', '.join(ends)}." if ends else ""


def draw(found: Found, figure: Figure) -> None:
  left, right = figure.subplots(1, 2)
  sizes = batches(found)
  for side, (_, style) in SIDES.items():
    tests = np.array([last(found, side, size) for size in sizes])
    error = tests.std(1, ddof=1)
    left.errorbar(sizes, tests.mean(1), error, marker="o", capsize=3, label=side, **style)
    grid = stored.of(found["rows"], kind="grid", side=side, batch=sizes[-1])
    accuracies = np.array([row["validation"] for row in grid], float)
    tried = [row["rate"] for row in grid]
    right.plot(tried, accuracies.mean(1), marker="o", **style)
    diverged = [
      rate for rate, seeds in zip(tried, accuracies, strict=True) if np.isnan(seeds).any()
    ]
    right.plot(diverged, [0.1] * len(diverged), "x", color=style["color"])
  left.set_xscale("log", base=2)
  left.set_xticks(sizes, map("{:,}".format, sizes))
  left.set(title="test accuracy at the best rate", xlabel="batch size")
  left.legend(frameon=False, loc="lower left")
  right.plot([], [], "x", color="black", label="a seed diverged")
  right.legend(frameon=False, loc="lower left")
  right.set(
    title=f"batches of {sizes[-1]:,}: accuracy on images held out, by rate",
    xlabel="learning rate",
    xscale="log",
    ylim=(0, 0.95),
  )
  for axes in (left, right):
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    axes.grid(alpha=0.25)


EXPERIMENT = Experiment(
  name="large_batches",
  title="Large batches without batch norm",
  source="Brock et al. 2021, section 4.1 and figure 2",
  claim="on ImageNet normalizer-free residual networks with adaptive gradient clipping keep up "
  "with those with batch norm, or are better, at batch sizes from 256 to 4,096; without it they "
  "fall behind at the large ones; at small ones clipping matters less.",
  measure=measure,
  plan=Plan(),
  full=Plan(images=983_040, tuning_images=98_304, seeds=10),
  verdict=verdict,
  report=report,
  draw=draw,
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
