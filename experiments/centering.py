"""Statistics outside of the gradient make biases grow: Ioffe & Szegedy 2015, section 2.

python -m experiments.centering
"""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results as stored
from experiments import experiment
from experiments.centering_runs import CENTRED, CONSTANT_MEAN, CONSTANTS, NORM, SIDES, Plan, measure
from experiments.experiment import Experiment, Found, rate_grid
from experiments.training import highest, spread, tried

SHOWN = (0.03, 0.3, 3.0)  # of the rates, in the figure


def seen(found: Found, kind: str, side: str, rate: float, what: str) -> np.ndarray:
  """What was seen, (seeds, looks); NaN from where it was no longer finite."""
  rows = stored.of(found["rows"], kind=kind, side=side, rate=rate)
  return np.array([row[what] for row in rows], float)


def rates(found: Found) -> list[float]:
  return sorted({row["rate"] for row in stored.of(found["rows"], kind="alone")})


def alone_steps(found: Found) -> int:
  row = stored.of(found["rows"], kind="alone")[0]
  return int(row["every"] * (len(row["loss"]) - 1))


def highest_rate(found: Found, side: str) -> float:
  return highest(*tried(stored.of(found["rows"], kind="grid", side=side)))


def change(found: Found) -> float:
  """By how much the loss of the paper's layer changes at most, relative to what it is."""
  losses = np.concatenate(
    [seen(found, "alone", CONSTANT_MEAN, rate, "loss") for rate in rates(found)]
  )
  return float(np.max(np.abs(losses / losses[:, :1] - 1)))


def verdict(found: Found) -> str:
  top = rates(found)[-1]
  grown, still = (
    seen(found, "alone", side, top, "biases")[:, -1] for side in (CONSTANT_MEAN, CENTRED)
  )
  moved = change(found)
  loss = f"changes by up to {moved:.0e} of itself" if moved else "stays the same to five digits"
  by = {side: highest_rate(found, side) for side in SIDES}
  return (
    f"in the paper's layer alone, at a rate of {top:g}, the norm of b is {spread(grown, '.0f')} "
    f"after {alone_steps(found):,} steps, while the loss {loss}; with the mean "
    f"in the gradient, b gets to {still.max():.0e}, which is rounding. In networks of which "
    "everything learns, the highest rate that costs no more than 2 points is "
    f"{by[NORM]:g} with batch norm, and {by[CONSTANTS]:g} if its statistics are constants to the "
    f"gradient; where the layer only centres, {by[CENTRED]:g} and {by[CONSTANT_MEAN]:g}."
  )


def in_networks(found: Found) -> str:
  """What holds of the claim where everything learns."""
  low, high = rates(found)[0], rates(found)[-1]
  final = lambda side, rate, what: seen(found, "run", side, rate, what)[:, -1].mean()  # noqa: E731
  biases = seen(found, "run", CONSTANTS, low, "biases").mean(0)
  half = biases[len(biases) // 2]
  second = (biases[-1] - half) / half
  pairs = ((NORM, CONSTANTS), (CENTRED, CONSTANT_MEAN))
  lost = [100 * (final(a, low, "held_out") - final(b, low, "held_out")) for a, b in pairs]
  factors = [highest_rate(found, a) / highest_rate(found, b) for a, b in pairs]
  at = [tried(stored.of(found["rows"], kind="grid", side=side))[1] for _, side in pairs]
  diverged = [int(np.isnan(accuracies).any(1).sum()) for accuracies in at]
  worse = "more than" if factors[0] > 1.5 * factors[1] else "no more than"
  return (
    "**What holds in networks.** Biases grow with statistics as constants, and not at all in batch "
    "norm. But the loss does not stay, since the layers above and the kernels learn all the same; "
    f"and as they do, the biases slow down: at a rate of {low:g} they grow in the second half of "
    f"the steps by {second:.2f} of what they grew in the first. What it costs is speed and high "
    f"rates. That scaling makes it worse shows at small rates: at {low:g}, constants cost "
    f"{lost[0]:.1f} points where the layer centres and scales, and {lost[1]:.1f} where it only "
    f"centres. Of the highest rate it takes {worse} centring does: a factor of {factors[0]:.0f}, "
    f"and {factors[1]:.0f}. And networks diverge with constants at {diverged[0]} of the "
    f"{len(rates(found))} rates where the layer scales, and at {diverged[1]} where it does not. "
    "Scaling shows in the kernels: behind them, a batch norm whose gradient is whole leaves no "
    "gradient along a kernel, whose length does not matter; with constants there is one, the "
    "kernel follows it, and the next standard deviation undoes the step. At a rate of "
    f"{high:g} the norm of the kernels ends at {final(CONSTANTS, high, 'kernels'):.0f}, and with "
    f"batch norm at {final(NORM, high, 'kernels'):.0f}."
  )


def in_the_end(found: Found, rate: float) -> str:
  """Networks at a rate: a line for each side."""
  heading = ["", "held-out accuracy, %", "loss", "norm of the biases", "of the kernels"]
  lines = [heading]
  for side in SIDES:
    cells = []
    for what, form in (("held_out", ".1f"), ("loss", ".2f"), ("biases", ".2g"), ("kernels", ".1f")):
      values = seen(found, "run", side, rate, what)[:, -1] * (100 if what == "held_out" else 1)
      alive = np.isfinite(seen(found, "run", side, rate, "loss")[:, -1])
      cells.append(spread(values, form) if alive.all() else "diverged")
    lines.append([side, *cells])
  return stored.table(lines, range(1, len(heading)))


def report(found: Found) -> list[str]:
  return [
    "**The paper's layer alone** (left column). x = u + b is centred, passed through ReLU, and "
    "read by a fixed last layer; u are 100 fixed combinations of the pixels of 2,000 images of "
    "Fashion-MNIST, all of which are in every step. Only b learns. If the gradient takes the mean "
    "for a constant, it asks b to move, and the next mean undoes the move: the output, the loss "
    "and the gradient stay what they were, and b goes on at constant speed.",
    "**Networks** (the other columns) have two hidden layers of 100 ReLUs, each with its bias and "
    "then the norm, without a scale and bias behind it, as in the paper's section 2. Everything "
    "learns, by plain stochastic gradient descent with 60 images to a batch. Loss and accuracy "
    "are of 2,000 images by their own statistics, as in training, the latter of images held out. "
    "Each line is a seed; a cross is where it was last seen before it diverged.",
    in_networks(found),
    *(
      part
      for rate in SHOWN
      for part in (f"At a learning rate of {rate:g}, in the end:", in_the_end(found, rate))
    ),
    *rate_grid(found),
  ]


def draw(found: Found, figure: Figure) -> None:
  grid = figure.subplots(3, 1 + len(SHOWN), sharex="col", sharey="row")
  names = {"loss": "training loss", "biases": "norm of biases", "kernels": "norm of kernels"}
  limits = {"loss": (0.1, 20), "biases": (1e-9, 1e4), "kernels": (10, 1e3)}
  for row, (what, name) in zip(grid, names.items(), strict=True):
    for axes, rate in zip(row, (None, *SHOWN), strict=True):
      draw_sides(axes, found, what, rate)
      axes.set(yscale="log", ylim=limits[what])
      axes.grid(alpha=0.25)
    first = row[int(what == "kernels")]
    first.set(ylabel=name)
    first.tick_params(labelleft=True)
  grid[0, 0].set(title="the paper's layer alone")
  for axes, rate in zip(grid[0, 1:], SHOWN, strict=True):
    axes.set(title=f"networks, rate {rate:g}")
  for axes in (grid[1, 0], *grid[2, 1:]):
    axes.set(xlabel="steps")
    axes.tick_params(labelbottom=True)
  for rate, side in itertools.product(SHOWN, (CENTRED, CONSTANT_MEAN)):
    end = seen(found, "alone", side, rate, "biases")[:, -1].mean()
    grid[1, 0].text(1.02 * alone_steps(found), end, f"rate {rate:g}", va="center", fontsize=8)
  key = grid[2, 0]
  for side, (_, colour, line) in SIDES.items():
    key.plot([], [], line, color=colour, label=side)
  key.plot([], [], "x", color="0.3", label="diverged")
  key.legend(frameon=False, loc="center", fontsize="small")
  key.axis("off")


def draw_sides(axes: Axes, found: Found, what: str, rate: float | None) -> None:
  """All sides of networks at a rate; or without one, of the layer alone, at all that are shown."""
  kind = "alone" if rate is None else "run"
  for side, (_, colour, line) in SIDES.items():
    for row in stored.of(found["rows"], kind=kind, side=side):
      if row["rate"] not in (SHOWN if rate is None else (rate,)) or what not in row:
        continue
      values = np.array(row[what], float)
      values[~np.isfinite(np.array(row["loss"], float))] = np.nan
      steps = row["every"] * np.arange(len(values))
      axes.plot(steps, np.where(values > 0, values, np.nan), line, color=colour, linewidth=1)
      if rate is not None and np.isnan(values[-1]):
        end = np.flatnonzero(np.isfinite(values))[-1]
        axes.plot(steps[end], values[end], "x", color=colour)


EXPERIMENT = Experiment(
  name="centering",
  title="Why the statistics are part of the gradient",
  source="Ioffe & Szegedy 2015, section 2",
  claim="if a layer adds a bias b and subtracts the mean, and the gradient takes that mean for a "
  'constant, then "b will grow indefinitely while the loss remains fixed"; scaling as well can '
  "make it worse, and in first trials such a model blew up.",
  measure=measure,
  plan=Plan(),
  full=Plan(steps=30_000, every=1000, seeds=10, rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
  verdict=verdict,
  report=report,
  draw=draw,
  size=(12, 7.5),
)

if __name__ == "__main__":
  experiment.main(EXPERIMENT)
