"""Draws the charts of docs/benchmarks.md and docs/scaling.md from what is stored."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import compiled_report, numerics, scaling_report, speed
from benchmarks.interconnect import CHIPS, HOP, SLOW_HOP
from benchmarks.results import Row, of
from benchmarks.slices import GROUP, NETWORKS

RED = "#c8452c"


def draw(found: dict[str, Row], folder: pathlib.Path) -> list[pathlib.Path]:
  """The charts of the results by name, into a folder; the files that were written."""
  written = []
  for name in sorted(found.keys() & CHARTS.keys()):
    file, chart = CHARTS[name]
    if figure := chart(found[name]):
      figure.savefig(folder / file)
      written.append(folder / file)
  return written


def _figure(width: float, height: float, title: str) -> Figure:
  figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)  # no window system, no global state
  figure.suptitle(title)
  return figure


def _legend_below(figure: Figure, columns: int) -> None:
  """One legend for all panels."""
  entries: dict[str, Any] = {}
  for axes in figure.axes:
    handles, labels = axes.get_legend_handles_labels()
    entries |= dict(zip(labels, handles, strict=True))
  figure.legend(
    entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False
  )


# Compiled programs.

COLORS = {"flax": "#9bb8d3", "jaxbn": RED, "jaxbn, sum inside": "#e39a6c"}


def compiled(results: Row) -> Figure | None:
  """Every tax over its floor, a panel for each target and dtype; none if there are no programs."""
  rows = [row for row in of(results["rows"], kind="program") if row["norm"] != "none"]
  panels = list(dict.fromkeys((row["target"], row["dtype"]) for row in rows))
  if not panels:
    return None
  groups = [of(rows, target=target, dtype=dtype) for target, dtype in panels]
  widest = max(len(set(map(compiled_report.title, group))) for group in groups)
  title = "Bytes that a norm adds to a step, over the least it can add"
  figure = _figure(max(8.0, 1.75 * widest), 3.1 * len(panels), title)
  grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
  for axes, (target, dtype), group in zip(grid, panels, groups, strict=True):
    _bars(axes, group, widest)
    padded = " (padded layouts)" if target == "v5e" else ""
    axes.set_title(f"{compiled_report.TITLES[target]}, {dtype}{padded}", fontsize=10)
  _legend_below(figure, 4)
  return figure


def _bars(axes: Any, rows: list[Row], places: int) -> None:
  """A group of bars for each network, and the floor; room for so many networks."""
  names = list(dict.fromkeys(map(compiled_report.title, rows)))
  for at, name in enumerate(names):
    group = [row for row in rows if compiled_report.title(row) == name]
    for number, row in enumerate(group):
      x = at + 0.27 * (number - (len(group) - 1) / 2)
      tall = row["tax_over_floor"]
      axes.bar(x, tall, 0.25, color=COLORS[row["norm"]], label=row["norm"])
      style = {"fontsize": 7, "bbox": {"color": "white", "pad": 0.6}}  # over the floor's line
      axes.annotate(f"{tall:.2f}", (x, max(0, tall) + 0.03), ha="center", va="bottom", **style)
  axes.axhline(1, color="black", linewidth=1, linestyle="--", label="floor")
  axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
  axes.set(xlim=(-0.5, places - 0.5), ylabel="tax / floor")
  axes.margins(y=0.12)
  axes.spines[["top", "right"]].set_visible(False)


# Speed.

MARKERS: dict[str, dict[str, Any]] = {
  "jaxbn": {"marker": "o", "color": "black", "markersize": 9, "label": "jaxbn.linen"},
  "flax.nnx": {"marker": "s", "color": "tab:red"},
  "haiku": {"marker": "^", "color": "tab:orange"},
  "equinox": {"marker": "v", "color": "tab:green"},
  "keras": {"marker": "D", "color": "tab:purple"},
  "torch": {"marker": "X", "color": "tab:blue", "markersize": 8},
}


def times(results: Row) -> Figure:
  """Every library's time divided by Flax's, through jaxbn's."""
  title = "Time of one layer, divided by that of flax.linen (the line at 1); less is better"
  figure = _figure(13, 7, title)
  grid = figure.subplots(len(speed.DTYPES), len(speed.KINDS), sharex=True, sharey=True)
  for dtype, line in zip(speed.DTYPES, grid, strict=True):
    for kind, axes in zip(speed.KINDS, line, strict=True):
      _relative_times(axes, of(results["rows"], dtype=dtype, kind=kind))
      axes.set_title(f"{kind}, {dtype}")
    line[0].set_ylabel("time / time of flax.linen")
  _legend_below(figure, 6)
  return figure


def _relative_times(axes: Any, rows: list[Row]) -> None:
  relative = speed.relative_to_flax(rows)
  shapes = list(dict.fromkeys(shape for times in relative.values() for shape in times))
  names = [name for name in MARKERS if name in relative]
  axes.axhline(1, color="black", linewidth=1)
  for k, name in enumerate(names):
    xs = [shapes.index(shape) + 0.11 * (k - (len(names) - 1) / 2) for shape in relative[name]]
    style = {"label": name, "linestyle": "", "zorder": 3, **MARKERS[name]}
    axes.plot(xs, list(relative[name].values()), **style)
  for between in range(1, len(shapes)):
    axes.axvline(between - 0.5, color="grey", linewidth=0.5, alpha=0.5)
  axes.set_yscale("log", base=2)
  axes.grid(axis="y", alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  axes.yaxis.set_major_formatter("{x:g}")
  axes.set_xticks(range(len(shapes)), shapes, rotation=20, fontsize="small")


# Exactness.

STYLES: dict[str, dict[str, Any]] = {
  "jaxbn": {"color": "black", "linewidth": 2.5, "zorder": 3},
  "jaxbn without state": {"color": "black", "linestyle": ":", "linewidth": 2.5, "zorder": 3},
  "flax.linen": {"color": "tab:red", "linewidth": 3.5, "alpha": 0.5},
  "flax.linen two-pass": {"color": "tab:red", "linestyle": "--"},
  "haiku": {"color": "tab:orange"},
  "equinox": {"color": "tab:green", "linewidth": 3.5, "alpha": 0.5},
  "keras": {"color": "tab:purple", "linestyle": ":", "linewidth": 2.5},
  "torch": {"color": "tab:blue"},
  "torch channels-first": {"color": "tab:blue", "linestyle": "--"},
  "torch SyncBatchNorm": {"color": "tab:blue", "linestyle": "-."},
  numerics.RESULT_FLOOR: {"color": "grey", "linewidth": 1},
  numerics.MEAN_FLOOR: {"color": "grey", "linewidth": 1, "linestyle": "--"},
}


def errors(results: Row) -> Figure:
  """The largest errors, a panel for each sweep, quantity and dtype."""
  rows = results["rows"]
  left_out = ("gradient", numerics.SIZE_RATIOS[1])
  panels = [p for p in numerics.panels_of(rows) if (p.quantity, p.ratio) != left_out]
  title = "On the lower edge: no error, or too small to show. On the upper: not finite."
  figure = _figure(15, 13, title)
  grid = figure.subplots(-(-len(panels) // 3), 3, squeeze=False).flat
  for axes, panel in zip(grid, panels, strict=False):
    _errors_of(axes, panel, numerics.along(rows, panel))
  for axes in list(figure.axes)[len(panels) :]:
    axes.set_axis_off()
  _legend_below(figure, len(STYLES) // 2)
  return figure


def _errors_of(axes: Any, panel: numerics.Panel, found: dict[float, dict[str, Row]]) -> None:
  """Between limits that the libraries set: what is beyond them is drawn on the edge."""
  rows = [row for cell in found.values() for name, row in cell.items() if name in numerics.COMPARED]
  drawable = [row["largest"] for row in rows if row["largest"]] or [4e-9, 0.25]
  low, high = max(min(drawable) / 4, 1e-8), max(drawable) * 4
  for name, style in STYLES.items():
    xs = [at for at, cell in found.items() if name in cell]
    ys = [numerics.finite(found[at][name]["largest"]) for at in xs]
    if xs:
      axes.plot(xs, np.clip(ys, low, high), label=name, **style)
  of_sizes = panel.sweep == "size"
  axes.set_xscale("log", base=2 if of_sizes else 10)
  axes.set(title=str(panel), yscale="log", ylim=(low, high))
  axes.set_xlabel("elements" if of_sizes else "mean, in standard deviations")
  axes.set_ylabel("largest error" + (", relative" if panel.quantity == "gradient" else ""))
  axes.grid(alpha=0.25)


# Many chips.

COLORS_OF_SHARING = dict(
  zip(scaling_report.SHARING, ("#8a8a8a", "#4c86b8", "#7fb069", RED), strict=True)
)


def chips(results: Row) -> Figure:
  """Efficiency over chips of each kind, and a group's cost over its size."""
  hops = f"{1e6 * HOP:.0f} (line) to {1e6 * SLOW_HOP:.1f} µs a hop"
  batch = NETWORKS["resnet50"].batch
  figure = _figure(12, 4.4, f"Predicted: ResNet-50, {batch} images on each chip, {hops}")
  *efficiencies, cost = figure.subplots(1, 3)
  for axes, name in zip(efficiencies, CHIPS, strict=True):
    _efficiencies(axes, results["rows"], name)
  efficiencies[0].legend(frameon=False, fontsize=8, loc="lower left")
  _group_costs(cost, results["rows"])
  return figure


def _efficiencies(axes: Any, rows: list[Row], name: str) -> None:
  counts = [n for n in scaling_report.CHIP_COUNTS if n >= GROUP]
  steps = {n: [scaling_report.steps(rows, name, n, hop) for hop in (HOP, SLOW_HOP)] for n in counts}
  for sharing, color in COLORS_OF_SHARING.items():
    at = [n for n in counts if sharing in steps[n][0]]
    quick, slow = ([100 * steps[n][k][sharing].efficiency for n in at] for k in (0, 1))
    _band(axes, at, quick, slow, color=color, label=sharing)
  if CHIPS[name].pod < max(counts):
    axes.axvline(CHIPS[name].pod, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("one pod ", (CHIPS[name].pod, 3), ha="right", fontsize=8)
  _chip_axis(axes, counts, "chips")
  axes.set(ylabel="weak-scaling efficiency, %", ylim=(0, 102))
  axes.set_title(CHIPS[name].title, fontsize=10)


def _group_costs(axes: Any, rows: list[Row]) -> None:
  groups, cost = [*scaling_report.GROUPS, 1024], scaling_report.group_cost
  colors = ("#7a1f10", "#2f4b6e")
  for (name, chips), color in zip(scaling_report.WHERE.items(), colors, strict=True):
    at = [n for n in groups if n <= chips]
    quick, slow = ([1e3 * cost(rows, name, chips, n, h) for n in at] for h in (HOP, SLOW_HOP))
    _band(axes, at, quick, slow, color=color, label=f"{chips:,} {CHIPS[name].title}")
  _chip_axis(axes, groups, "chips in a group")
  axes.set(ylabel="added to a step, ms", ylim=(0, None))
  axes.set_title("What a group costs", fontsize=10)
  axes.legend(frameon=False, fontsize=8, loc="upper left")


def _band(axes: Any, at: list[int], quick: list[float], slow: list[float], **style: Any) -> None:
  """A line where a hop is quick, and what a slow one makes of it."""
  axes.plot(at, quick, marker="o", markersize=3, **style)
  axes.fill_between(at, quick, slow, color=style["color"], alpha=0.15, linewidth=0)


def _chip_axis(axes: Any, counts: Iterable[int], label: str) -> None:
  axes.set_xscale("log", base=2)
  axes.set_xticks(list(counts), [str(n) for n in counts], fontsize=8, rotation=45)
  axes.minorticks_off()
  axes.set_xlabel(label)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)


CHARTS: dict[str, tuple[str, Callable[[Row], Figure | None]]] = {
  "compiled": ("benchmarks-compiled.png", compiled),
  "speed": ("benchmarks-speed.png", times),
  "numerics": ("benchmarks-numerics.png", errors),
  "scaling": ("scaling.png", chips),
}
