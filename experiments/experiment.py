"""What an experiment is: measured once, kept as JSON, and shown as a page with a figure.

`python -m experiments` runs them all and makes the gallery; `python -m experiments.NAME` runs one.
Either takes `--full` (longer, for accelerators) and `--redraw` (only pages and figures, from what
was kept).
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import results as stored

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = ROOT / "docs" / "experiments"
# The same meaning has the same colour in every figure.
WITH, WITHOUT, THIRD, REFERENCE = "#c8452c", "#3b6ea5", "#5a9e6f", "0.55"
Row = dict[str, Any]
Found = dict[str, Any]  # rows, with the command, date, versions and machine


class Experiment(NamedTuple):
  """A published claim, and what is done about it.

  Attributes:
    name: of its file here, its page, its figure and its results.
    title: its heading.
    source: authors, year and place, as in "Ioffe & Szegedy 2015, figure 1".
    claim: what was published, with its figure, in a sentence or two.
    measure: a plan, to rows that JSON can hold.
    plan: the default, minutes on two cores.
    full: for accelerators.
    verdict: the published figure beside ours, in a sentence, for the gallery.
    report: the paragraphs and tables of the page, as Markdown: what was done, what came out, the
      grid of learning rates, and where the claim does not hold.
    draw: onto an empty figure.
    size: of the figure, in inches.
  """

  name: str
  title: str
  source: str
  claim: str
  measure: Callable[[Any], list[Row]]
  plan: Any
  full: Any
  verdict: Callable[[Found], str]
  report: Callable[[Found], Sequence[str]]
  draw: Callable[[Found, Figure], None]
  size: tuple[float, float] = (11, 4.2)


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
  """Runs an experiment from the command line; prints and writes what came out."""
  options = parser(experiment.title).parse_args(arguments)
  found = run(experiment, options.full, options.redraw)
  Console().print(Markdown("\n\n".join([experiment.claim, experiment.verdict(found)])))


def parser(description: str) -> argparse.ArgumentParser:
  made = argparse.ArgumentParser(description=description)
  made.add_argument("--full", action="store_true", help="longer, for accelerators")
  made.add_argument("--redraw", action="store_true", help="pages and figures only, without running")
  return made


def run(experiment: Experiment, full: bool = False, redraw: bool = False) -> Found:
  """Measures, unless it is only redrawn; writes the results, the page and the figure."""
  if not redraw:
    rows = experiment.measure(experiment.full if full else experiment.plan)
    command = f"python -m experiments.{experiment.name}" + (" --full" if full else "")
    stored.write(experiment.name, command, rows, RESULTS / f"{experiment.name}.json")
  found = stored.read(experiment.name, RESULTS)
  if found is None:
    raise SystemExit(f"error: {experiment.name} has not been run: leave out --redraw.")
  show(experiment, found, PAGES)
  return found


def show(experiment: Experiment, found: Found, folder: pathlib.Path) -> None:
  """Writes the page and the figure."""
  folder.mkdir(exist_ok=True)
  (folder / f"{experiment.name}.md").write_text(page(experiment, found))
  figure = Figure(figsize=experiment.size, dpi=130, layout="constrained")
  FigureCanvasAgg(figure)  # no window system, no global state
  experiment.draw(found, figure)
  for axes in figure.axes:
    axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(folder / f"{experiment.name}.png")


def looks(found: Found, what: str, kind: str = "run", **which: Any) -> np.ndarray:
  """What the runs of one kind saw, (seeds, looks, ...); NaN where it was not finite."""
  return np.array([row[what] for row in stored.of(found["rows"], kind=kind, **which)], float)


def curves(found: Found, what: str, **which: Any) -> tuple[np.ndarray, np.ndarray]:
  """The steps at which was looked, and what was seen, (seeds, looks, ...)."""
  values = looks(found, what, **which)
  every = stored.of(found["rows"], kind="run", **which)[0]["every"]
  return every * np.arange(values.shape[1]), values


def chosen_rate(found: Found, **which: Any) -> float:
  """The learning rate at which these runs are."""
  return float(stored.of(found["rows"], kind="run", **which)[0]["rate"])


def seeds(found: Found) -> str:
  """How many there are, as in "three seeds"."""
  number = len({row["seed"] for row in found["rows"] if "seed" in row})
  return f"{'three' if number == 3 else number} seeds"


def plan_of(experiment: Experiment, found: Found) -> Any:
  """What was run, by the command that ran it."""
  return experiment.full if found["command"].endswith("--full") else experiment.plan


def rate_grid(found: Found) -> list[str]:
  """The learning rates that were tried on each side, as Markdown; `side` and what else differs."""
  grid = stored.of(found["rows"], kind="grid")
  rates = sorted({row["rate"] for row in grid})
  named = [key for key in grid[0] if key not in ("kind", "rate", "validation")]
  cells: dict[tuple[Any, ...], dict[float, str]] = {}
  for row in grid:
    accuracies = [np.nan if v is None else v for v in row["validation"]]
    cell = "diverged" if np.isnan(accuracies).all() else f"{100 * np.nanmean(accuracies):.1f}"
    cells.setdefault(tuple(row[key] for key in named), {})[row["rate"]] = cell
  heading = ["", *named[1:], *map(str, rates)]
  lines = [[*map(str, who), *(of.get(r, "") for r in rates)] for who, of in cells.items()]
  return [
    "The learning rates that were tried: accuracy in % on the images held out, mean of the seeds. "
    "Each side has its best.",
    stored.table([heading, *lines], range(1, len(heading))),
  ]


def page(experiment: Experiment, found: Found) -> str:
  """The page, as Markdown."""
  versions, machine = found["versions"], found["machine"]
  return "\n\n".join([
    f"# {experiment.title}",
    f"**Published** ({experiment.source}): {experiment.claim}",
    f"**Here:** {experiment.verdict(found)}",
    f"![{experiment.title}]({experiment.name}.png)",
    *experiment.report(found),
    f"Made by `{found['command']}` on {found['date']}, with jax {versions['jax']} and flax "
    f"{versions['flax']}; {machine['cpu']}, {machine['cores']} core{'s'[machine['cores'] == 1 :]}. "
    "Nothing here is typed by hand: `--redraw` makes the page and the figure again from "
    f"experiments/results/{experiment.name}.json.",
  ]) + "\n"  # fmt: skip
