"""Recurrent batch normalization (Cooijmans et al. 2016) beside a plain LSTM and layer norm.

python -m experiments.recurrent
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks import results as stored
from experiments import experiment, recurrent_cost
from experiments.experiment import (
  THIRD,
  WITH,
  WITHOUT,
  Experiment,
  Found,
  chosen_rate,
  looks,
  plan_of,
  rate_grid,
  seeds,
)
from experiments.recurrent_runs import (
  CLIP,
  GAIN_ONE,
  GAIN_SMALL,
  LAYER,
  NOISE,
  PERMUTED,
  PIXELS,
  PLAIN,
  ROWS,
  Plan,
  measure,
)
from experiments.training import percent

COLOURS = {PLAIN: WITHOUT, LAYER: THIRD, GAIN_SMALL: WITH, GAIN_ONE: "#e5a99c"}
# Test accuracy in % of the plain LSTM and the normalized one, in the paper's table of this.
PAPER = {PIXELS: (98.9, 99.0), PERMUTED: (90.2, 95.4)}


def accuracies(found: Found, task: str, method: str) -> np.ndarray:
  """On test images, (seeds, looks) after the start."""
  return looks(found, "test", task=task, side=method)[:, 1:]


def last(of: np.ndarray) -> np.ndarray:
  """In the end, in percent."""
  return np.asarray(100 * of[:, -1])


def throughout(of: np.ndarray) -> np.ndarray:
  """The mean over the training, in percent: larger is sooner."""
  return np.asarray(100 * of.mean(1))


def gain(
  found: Found, task: str, a: str, b: str, of: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, bool]:
  """How much better a is than b in the mean, in points, and whether that is within the spread."""
  ours, theirs = of(accuracies(found, task, a)), of(accuracies(found, task, b))
  by = float(ours.mean() - theirs.mean())
  return by, bool(abs(by) <= ours.std(ddof=1) + theirs.std(ddof=1))


def difference(
  found: Found, task: str, a: str, b: str, of: Callable[[np.ndarray], np.ndarray]
) -> str:
  by, within = gain(found, task, a, b, of)
  return f"{by:+.1f}" + (" (within the spread)" if within else "")


def tasks(found: Found) -> list[str]:
  return list(dict.fromkeys(row["task"] for row in found["rows"]))


def verdict(found: Found) -> str:
  said = [
    f"{task}, {difference(found, task, GAIN_SMALL, PLAIN, last)} beside a plain LSTM and "
    f"{difference(found, task, GAIN_SMALL, LAYER, last)} beside layer norm"
    for task in tasks(found)
  ]
  gains = {task: gain(found, task, GAIN_SMALL, PLAIN, throughout) for task in tasks(found)}
  sooner = [task for task, (by, within) in gains.items() if by > 0 and not within]
  return (
    f"points of accuracy that recurrent batch norm gains in the end: {'; '.join(said)}. Sooner "
    f"than a plain LSTM it learns {' and '.join(sooner) or 'none of these'}."
  )


def verdicts(found: Found) -> list[str]:
  """What the figures say of each claim, task by task."""
  claims = [
    ("Recurrent batch norm beside the plain LSTM", GAIN_SMALL, PLAIN),
    ("Recurrent batch norm beside layer norm", GAIN_SMALL, LAYER),
    ("A first gain of 0.1 beside 1", GAIN_SMALL, GAIN_ONE),
  ]
  return [
    f"{claim}, in points of accuracy: "
    + "; ".join(
      f"{task} {difference(found, task, a, b, last)} in the end and "
      f"{difference(found, task, a, b, throughout)} over the training"
      for task in tasks(found)
    )
    + "."
    for claim, a, b in claims
  ]


def lines(found: Found) -> list[list[str]]:
  made = [["task", "", "learning rate", "in the end", "mean over training", "the paper's"]]
  for task in tasks(found):
    paper = dict(zip((PLAIN, GAIN_SMALL), PAPER.get(task, ("", "")), strict=True))
    for method in COLOURS:
      rate = chosen_rate(found, task=task, side=method)
      of = accuracies(found, task, method)
      cells = [percent(of[:, -1]), percent(of.mean(1)), str(paper.get(method, ""))]
      made.append([task, method, f"{rate:g}", *cells])
  return made


def report(found: Found) -> list[str]:
  plan = plan_of(EXPERIMENT, found)
  rows = stored.of(found["rows"], kind="run")
  steps = rows[0]["every"] * (len(rows[0]["test"]) - 1)
  tuned = stored.of(found["rows"], kind="grid")
  return [
    f"An LSTM of {plan.units} units reads scikit-learn's 8x8 digits {ROWS} (8 steps of 8 "
    f"numbers), {PIXELS} (64 steps of 1), or pixel by pixel in a random order that is the same for "
    "all, and says from its last hidden state which digit it was. Beside the plain LSTM: one with "
    "layer normalization in the same places (gain 1, Flax's), and `jaxbn.linen.LSTMCell` with a "
    "first gain of 0.1, as the paper has it, and of 1. Everything else is the same for all: "
    f"forget gates that start at 1, noise of standard deviation {NOISE} for the first hidden state "
    "(the paper's mend for pixels that are equal in all images), "
    f"{steps} steps of Adam with batches of {plan.batch_size} and gradients clipped at norm "
    f"{CLIP:g}. For evaluation the statistics of each step are averaged over the training set with "
    "the parameters as they are then, as in the paper.",
    f"Test accuracy in %, mean ± standard deviation of {seeds(found)}; in the figure, their mean "
    "and range. The mean over training says how soon it was learned. The paper has 784 steps of "
    "MNIST, 100 units and far longer training.",
    stored.table(lines(found), range(2, 6)),
    "\n".join(f"- {said}" for said in verdicts(found)),
    *(rate_grid(found) if tuned else [ungridded()]),
    stored.fill("recurrent", {}).strip(),
    *recurrent_cost.chapter(),
  ]


def ungridded() -> str:
  rates = " and ".join(map(str, Plan().rates))
  return (
    f"Each has the better of the learning rates {rates} on images held out; how good the other "
    "was is not kept of this run."
  )


def draw(found: Found, figure: Figure) -> None:
  (panels,) = figure.subplots(1, len(tasks(found)), sharey=True, squeeze=False)
  every = stored.of(found["rows"], kind="run")[0]["every"]
  for axes, task in zip(panels, tasks(found), strict=True):
    for method, colour in COLOURS.items():
      of = accuracies(found, task, method)
      steps = every * np.arange(1, of.shape[1] + 1)
      axes.plot(steps, of.mean(0), color=colour, linewidth=1.8, label=method)
      axes.fill_between(steps, of.min(0), of.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set(title=task, xlabel="steps")
    axes.grid(alpha=0.25)
  panels[0].set_ylabel("test accuracy")
  panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  panels[0].legend(frameon=False, loc="lower right")


EXPERIMENT = Experiment(
  name="recurrent",
  title="Recurrent batch normalization, layer norm, batch-normalized RNN",
  source="Cooijmans et al. 2016, section 5.1",
  claim="an LSTM whose hidden state is batch-normalized too, with a first gain of 0.1, learns "
  "MNIST pixel by pixel sooner than a plain one; in the end it has "
  f"{PAPER[PIXELS][1]} and {PAPER[PIXELS][0]} % of the digits, and with the pixels permuted "
  f"{PAPER[PERMUTED][1]} and {PAPER[PERMUTED][0]} %.",
  measure=measure,
  plan=Plan(),
  full=Plan(steps=6000, tuning_steps=6000, every=500, units=100, seeds=10),
  verdict=verdict,
  report=report,
  draw=draw,
  size=(12, 4.2),
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
