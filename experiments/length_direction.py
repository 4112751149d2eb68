"""Length and direction apart: GDNP on two problems, and a network's gradients (Kohler et al. 2019).

python -m experiments.length_direction
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import results as stored
from experiments import experiment
from experiments.classification import kept, recipe, tuned
from experiments.descents import BOUND, COLOURS, diabetes, gaps, halfspace, steps_until_near
from experiments.directions import WeightNormed, by_direction
from experiments.experiment import (
  REFERENCE,
  THIRD,
  WITH,
  WITHOUT,
  Experiment,
  Found,
  Row,
  chosen_rate,
  curves,
  looks,
  seeds,
)
from experiments.networks import Perceptron
from experiments.training import percent, spread

SIDES = {"plain": WITHOUT, "weight norm": THIRD, "batch norm": WITH}


class Plan(NamedTuple):
  """What is run."""

  descent_steps: int = 2000
  drawn_every: int = 10
  dataset: str = "fashion_mnist"
  widths: tuple[int, ...] = (50,) * 4
  batch_size: int = 1000
  steps: int = 1000
  tuning_steps: int = 250
  every: int = 25
  seeds: int = 3
  rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)


def measure(plan: Plan) -> list[Row]:
  """The two problems, and a network plain, with weight norm, and with batch norm."""
  rows: list[Row] = []
  with jax.enable_x64(True):
    for task in (diabetes(), halfspace()):
      for method, gap in gaps(task, plan.descent_steps).items():
        row = {"kind": "gap", "task": task.title, "method": method, "every": plan.drawn_every}
        seen = {"near": steps_until_near(gap), "gap": kept(gap[:: plan.drawn_every])}
        rows.append({**row, "steps": plan.descent_steps, **seen})
  models: dict[str, nn.Module] = {
    "plain": Perceptron(plan.widths, norm="none", activation=nn.tanh),
    "weight norm": WeightNormed(plan.widths),
    "batch norm": Perceptron(plan.widths, norm="before", activation=nn.tanh),
  }
  for side, model in models.items():
    look = by_direction(model, plan.dataset, plan.widths, plan.batch_size)
    rows += tuned(recipe(model, plan.dataset, look=look), plan, side)
  return rows


def at_last(found: Found, side: str) -> np.ndarray:
  """By seed: the training loss, mean over the last quarter of the training."""
  losses = curves(found, "loss", side=side)[1]
  return losses[:, -(losses.shape[1] // 4) :].mean(1)


def goes_on(found: Found, side: str) -> np.ndarray:
  """By seed: the derivative by direction over the second half of the training, per the first's."""
  first, second = np.array_split(curves(found, "direction", side=side)[1][:, 1:], 2, axis=1)
  return second.mean(1) / first.mean(1)


def verdict(found: Found) -> str:
  gap = {(r["task"], r["method"]): r["near"] for r in stored.of(found["rows"], kind="gap")}
  said = []
  for task in dict.fromkeys(task for task, _ in gap):
    near, plain = gap[task, "GDNP"], gap[task, "gradient descent"]
    descent = f"more than {found['rows'][0]['steps']}" if plain is None else str(plain)
    said.append(f"{task.split(':')[0].lower()}: GDNP {near} steps, gradient descent {descent}")
  losses = ", ".join(f"{side} {spread(at_last(found, side), '.3f')}" for side in SIDES)
  ratios = ", ".join(f"{side} {spread(goes_on(found, side), '.2f')}" for side in SIDES)
  return (
    f"until the loss is within a millionth of the first gap to the least: {'; '.join(said)}. "
    f"In a network, the training loss over the last quarter of the steps: {losses}. The derivative "
    f"by direction over the second half, as a multiple of that over the first: {ratios}."
  )


def report(found: Found) -> list[str]:
  gaps_of = stored.of(found["rows"], kind="gap")
  problems = list(dict.fromkeys(row["task"] for row in gaps_of))
  lines = [["", *problems]]
  for method in COLOURS:
    near = [r["near"] for r in stored.of(gaps_of, method=method)]
    more = f"more than {gaps_of[0]['steps']}"
    lines.append([method, *(more if steps is None else str(steps) for steps in near)])
  trained = [["", "learning rate", "training loss, last quarter", "test accuracy in the end, %",
              "derivative by direction, second half / first"]]  # fmt: skip
  for side in SIDES:
    rate = chosen_rate(found, side=side)
    loss, ratio = spread(at_last(found, side), ".3f"), spread(goes_on(found, side), ".2f")
    tests = percent(looks(found, "test", side=side)[:, -1])
    trained.append([side, str(rate), loss, tests, ratio])
  steps = curves(found, "loss", side="plain")[0][-1]
  return [
    "Steps until the loss stays within a millionth of the first gap to the least:",
    stored.table(lines, range(1, 3)),
    "Least squares is of scikit-learn's diabetes study; the halfspace is between two Gaussians "
    "that lie well apart, where the logistic loss is flat. Both are exact, from one start. The "
    "dashed line is the paper's bound for GDNP's direction. Where the claim ends: accelerated "
    "gradient descent (Nesterov's) is faster than GDNP on least squares, which is convex.",
    "A network is not one unit, and GDNP's best length is not known for it; the paper's proof for "
    "networks is of one hidden layer, Gaussian inputs, and units that are trained one after the "
    "other. What is left of it for a real one is to learn length and direction apart: by "
    "the norm of the weights (weight norm), or by that of the data (batch norm). Here: hidden "
    f"layers of hyperbolic tangents on Fashion-MNIST, {steps:,} steps of gradient descent on "
    "batches of 1,000. The network with weight norm starts as the plain one. Mean ± standard "
    f"deviation of {seeds(found)}; the loss is of the first 1,000 training images, normalized by "
    "their own statistics.",
    stored.table(trained, range(1, 5)),
    "The derivative by direction is that of the loss by w / |w|, of the weights w of each hidden "
    "unit, all taken together: what descent on the direction alone would see. If the theory held "
    "here, it would fall by a factor in every step; at the rate that is best, it falls in the "
    "first steps and then does what the last column says. Where batch norm helps a network, it "
    "is not by lengths that are learned apart alone, for weight norm does that as well: compare "
    "the two. Each line in the figure is a seed.",
    *experiment.rate_grid(found),
  ]


def draw(found: Found, figure: Figure) -> None:
  panels = figure.subplots(1, 4)
  gaps_of = stored.of(found["rows"], kind="gap")
  for axes, task in zip(panels, dict.fromkeys(row["task"] for row in gaps_of), strict=False):
    for row in stored.of(gaps_of, task=task):
      steps = row["every"] * np.arange(len(row["gap"]))
      bound = row["method"] == BOUND
      style: Any = {"color": REFERENCE, "linestyle": "--"} if bound else {}
      style = style or {"color": COLOURS[row["method"]], "linewidth": 1.8}
      label = "$(1 - \\mu/L)^{2t}$" if bound else row["method"]
      axes.plot(steps, row["gap"], label=label, **style)
    axes.set(title=task, xlabel="steps", yscale="log", ylim=(1e-12, 3))
  panels[0].set_ylabel("loss above the least, share of the first")
  panels[1].legend(frameon=False, fontsize=8, loc="lower right")
  for axes, what, title, ticks in (
    (panels[2], "loss", "Network: training loss", (0.25, 0.5, 1, 2)),
    (panels[3], "direction", "Network: derivative by direction", (0.5, 1, 2, 4)),
  ):
    for side, colour in SIDES.items():
      steps, values = curves(found, what, side=side)
      axes.plot(steps, values.T, color=colour, linewidth=1)
      axes.plot([], [], color=colour, label=side)
    axes.set(title=title, xlabel="steps", yscale="log")
    axes.set_yticks(ticks, map(str, ticks))
    axes.tick_params(axis="y", which="minor", labelleft=False)
  panels[2].legend(frameon=False)
  for axes in panels:
    axes.grid(alpha=0.25)


EXPERIMENT = Experiment(
  name="length_direction",
  title="Length and direction apart",
  source="Kohler et al. 2019",
  claim="batch norm lets descent learn the length and the direction of weights apart; with the "
  "best length for each direction (GDNP) the error falls linearly, as (1 - μ/L)² per step, μ and L "
  "the extreme eigenvalues of the inputs' second moment, for least squares and for "
  "halfspaces with Gaussian inputs, which are not convex in these parameters; and in networks of "
  "one hidden layer, trained unit by unit.",
  measure=measure,
  plan=Plan(),
  full=Plan(steps=10_000, tuning_steps=2_500, every=100, seeds=10),
  verdict=verdict,
  report=report,
  draw=draw,
  size=(15, 4.2),
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
