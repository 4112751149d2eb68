"""Loss and accuracy over the steps of a run, as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

TRAIN, TEST = "#9bb8d3", "#c8452c"


def draw(rows: list[dict[str, Any]], file: Path, title: str) -> None:
  """Writes a PNG of the training's and the test's loss and accuracy.

  Args:
    rows: as in metrics.jsonl.
    file: where the picture goes.
    title: above both.
  """
  figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)  # no window system, no global state
  figure.suptitle(title)
  loss, accuracy = figure.subplots(1, 2)
  for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
    _line(axes, rows, f"train/{quantity}", color=TRAIN, label="training")
    _line(axes, rows, f"test/{quantity}", color=TEST, marker="o", markersize=4, label="test")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  loss.set_title("Loss")
  loss.set_ylabel("cross entropy per example (nats, log scale)")
  if any("train/loss" in row for row in rows):  # nothing has no logarithm
    loss.set_yscale("log")
    accuracy.legend(loc="lower right", frameon=False)
  accuracy.set_title("Accuracy")
  accuracy.set_ylabel("examples classified correctly")
  accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
  figure.savefig(file)


def _line(axes: Any, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
  points = [(row["step"], row[key]) for row in rows if key in row]
  if points:
    axes.plot(*zip(*points, strict=True), linewidth=1.8, **style)
