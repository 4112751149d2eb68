"""Puts what `experiments.norms` found into docs/choosing.md and draws docs/norms.png.

  python -m experiments.norms_report

The advice on that page is written by hand; its tables, between the two marks, and the figure are
made from experiments/results/norms.json, and from nothing else.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import results as stored
from experiments.norms import FOLDER

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
PAGE, FIGURE = DOCS / "choosing.md", DOCS / "norms.png"
BEGIN, END = "<!-- made by make compare-norms -->", "<!-- end -->"
REFERENCE = "batch"


def main() -> None:
  """Prints the tables, draws the figure, and puts both into the page."""
  results = stored.read("norms", FOLDER)
  if results is None:
    raise SystemExit("There are no results yet: run `make compare-norms` first.")
  tables = section(results)
  console = Console()
  console.print(Markdown(tables))
  PAGE.write_text(spliced(PAGE.read_text(), tables))
  draw(results, FIGURE)
  console.print(f"Wrote {PAGE.relative_to(DOCS.parent)}, {FIGURE.relative_to(DOCS.parent)}.")


def spliced(page: str, tables: str) -> str:
  """The page with these tables in the place of those between the marks."""
  before, rest = page.split(BEGIN)
  _, after = rest.split(END)
  return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def section(results: dict[str, Any]) -> str:
  """What stands between the marks, as Markdown."""
  training, times = of_kind(results, "training"), of_kind(results, "time")
  sizes = sorted({r["batch_size"] for r in training})
  base = _base(training)
  by_size = [["norm", "rate", *(f"batch {n}" for n in sizes)]]
  depths = sorted({(r["depth"], r["skip"]) for r in training}, key=lambda d: (not d[1], d[0]))
  by_depth = [
    ["norm", *(f"{_layers(d)} layers{'' if skip else ', no skip'}" for d, skip in depths)]
  ]
  for norm in norms(training):
    mine = [r for r in training if r["norm"] == norm]
    by_size.append([norm, str(mine[0]["rate"]), *(_cell(mine, base, batch_size=n) for n in sizes)])
    by_depth.append([norm, *(_cell(mine, base, depth=d, skip=skip) for d, skip in depths)])
  return "\n\n".join([_conditions(results, training, base), stored.table(by_size, range(1, 9)),
    "Depths, at a batch of {batch_size}:".format(**base), stored.table(by_depth, range(1, 9)),
    "The time of a training step, as a multiple of batch normalization's (minimum; median):",
    stored.table(_time_table(times), range(1, 9))])  # fmt: skip


def _conditions(results: dict[str, Any], training: list[dict[str, Any]], base: Any) -> str:
  seeds = len({r["seed"] for r in training})
  examples = training[0]["examples"]
  return (
    f"`{results['command']}`, {results['date']}, jax {results['versions']['jax']}, "
    f"{results['machine']['cpu']}: test accuracy in percent after {examples:,} training images, "
    + ("one run each" if seeds == 1 else f"mean of {seeds} seeds ± their standard deviation")
    + f", at {_layers(base['depth'])} layers with skip connections unless said otherwise. "
    f"Each norm has the best of three learning rates for {base['batch_size']} images. (n): of the "
    "runs, n diverged, that is, had a loss that was not finite, or an accuracy below twice chance."
  )


def of_kind(results: dict[str, Any], kind: str) -> list[dict[str, Any]]:
  return [row for row in results["rows"] if row["kind"] == kind]


def norms(rows: Iterable[dict[str, Any]]) -> list[str]:
  """Their names, in the order in which they were run."""
  return list(dict.fromkeys(row["norm"] for row in rows))


def _base(training: list[dict[str, Any]]) -> dict[str, Any]:
  """The setting from which batch sizes and depths depart: the one that occurs in both."""
  shallow = min(r["depth"] for r in training)
  deep = next(r for r in training if r["depth"] > shallow)
  return {"batch_size": deep["batch_size"], "depth": shallow, "skip": True}


def chosen(rows: list[dict[str, Any]], base: dict[str, Any], **changes: Any) -> list[Any]:
  """The rows of a setting that differs from the base in this."""
  wanted = base | changes
  return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def _cell(rows: list[dict[str, Any]], base: dict[str, Any], **changes: Any) -> str:
  runs = chosen(rows, base, **changes)
  if not runs:
    return ""
  accuracies = [100 * r["accuracy"] for r in runs]
  text = f"{statistics.mean(accuracies):.1f}"
  if len(runs) > 1:
    text += f" ± {statistics.stdev(accuracies):.1f}"
  diverged = sum(r["diverged"] for r in runs)
  return f"{text} ({diverged})" if diverged else text


def _layers(depth: int) -> int:
  """Layers with weights on the longest path: the first, two in a block of two stages, the last."""
  return 2 + 4 * depth


def _time_table(times: list[dict[str, Any]]) -> list[list[str]]:
  sizes = sorted({r["batch_size"] for r in times})
  lines = [["norm", *(f"batch {n}" for n in sizes)]]
  found = {(r["norm"], r["batch_size"]): r for r in times}
  for norm in norms(times):
    cells = []
    for size in sizes:
      mine, reference = found[norm, size], found[REFERENCE, size]
      ratios = (mine[k] / reference[k] for k in ("minimum_ms", "median_ms"))
      cells.append("; ".join(f"{ratio:.2f}" for ratio in ratios))
    lines.append([norm, *cells])
  return lines


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Accuracy over batch sizes, and over depths with skip connections and without."""
  matplotlib.use("Agg")
  training = of_kind(results, "training")
  base = _base(training)
  sizes = sorted({r["batch_size"] for r in training})
  depths = sorted({r["depth"] for r in training})
  panels: list[tuple[str, str, list[int], Any]] = [
    ("batch size", "examples in a batch", sizes, lambda n: {"batch_size": n}),
    ("depth, with skip connections", "layers", depths, lambda d: {"depth": d}),
    ("depth, without", "layers", depths, lambda d: {"depth": d, "skip": False}),
  ]
  figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True, layout="constrained")
  styles = dict(zip(norms(training), _styles(), strict=False))
  for ax, (title, label, values, changes) in zip(axes, panels, strict=True):
    for norm, style in styles.items():
      mine = [r for r in training if r["norm"] == norm]
      runs = [[100 * r["accuracy"] for r in chosen(mine, base, **changes(v))] for v in values]
      places = [v if label.startswith("examples") else _layers(v) for v in values]
      there = [(p, r) for p, r in zip(places, runs, strict=True) if r]
      ax.plot([p for p, _ in there], [statistics.mean(r) for _, r in there], label=norm, **style)
    ax.set(title=title, xlabel=label)
    if label.startswith("examples"):
      ax.set_xscale("log", base=2)
    ax.grid(alpha=0.3)
  axes[0].set_ylabel("test accuracy, %")
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _styles() -> Iterable[dict[str, Any]]:
  colors = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
  for line, marker in (("-", "o"), ("--", "s"), (":", "^")):
    for color in colors:
      yield {"color": color, "linestyle": line, "marker": marker, "markersize": 4}


if __name__ == "__main__":
  main()
