"""What a step of recurrent batch normalization costs on the CPU, beside the plain cell's.

  python -m experiments.recurrent_cost            a minute; writes results/recurrent_cost.json
  python -m experiments.recurrent_cost --quick    a look, written nowhere

The cells of jaxbn.linen and of flax.linen (OptimizedLSTMCell, GRUCell) run under nn.RNN, compiled,
in one process and in turns, as in benchmarks.speed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxbn.linen
from benchmarks import results as stored
from benchmarks.speed import Plan, in_turns

NAME = "recurrent_cost"
COMMAND = f"python -m experiments.{NAME}"
FOLDER = pathlib.Path(__file__).resolve().parent / "results"
GOAL = 1.6  # times the plain cell's time
KINDS = ("forward", "forward and backward")
Row = dict[str, Any]


class Size(NamedTuple):
  """What runs: a batch of sequences of inputs, through so many units."""

  batch: int = 64
  steps: int = 64
  inputs: int = 128
  units: int = 128


class Cell(NamedTuple):
  """A cell of ours and the plain one that it is compared with."""

  ours: Callable[[Size], nn.RNNCellBase]
  plain: Callable[[Size], nn.RNNCellBase]


CELLS = {
  "LSTM": Cell(
    lambda size: jaxbn.linen.LSTMCell(size.units, size.steps, use_running_average=False),
    lambda size: nn.OptimizedLSTMCell(size.units),
  ),
  "GRU": Cell(
    lambda size: jaxbn.linen.GRUCell(size.units, size.steps, use_running_average=False),
    lambda size: nn.GRUCell(size.units),
  ),
}
SIZES = (Size(), Size(inputs=8))
FULL = Plan((), 21, 1.0)
QUICK = Plan((), 3, 0.0)


def main() -> None:
  """Times every cell and size, prints the table and writes the rows."""
  parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
  parser.add_argument("--quick", action="store_true", help="a small size, few repeats")
  quick = parser.parse_args().quick
  rows = list(run((Size(8, 4, 8, 8),), QUICK) if quick else run(SIZES, FULL))
  console = Console()
  console.print(table(rows))
  if not quick:
    path = FOLDER / f"{NAME}.json"
    stored.write(NAME, COMMAND, rows, path)
    console.print(f"Wrote {os.path.relpath(path)}.")


def run(sizes: tuple[Size, ...], plan: Plan) -> Iterator[Row]:
  """The rows of every cell, size and kind of work."""
  for size in sizes:
    for name, cell in CELLS.items():
      calls = [work(make(size), size) for make in cell]
      for kind in KINDS:
        ours, plain = in_turns([call[kind] for call in calls], plan)
        yield {
          "cell": name,
          **size._asdict(),
          "kind": kind,
          "samples": len(ours),
          **{f"{who}_min_us": _per_step(min(ms), size) for who, ms in _both(ours, plain)},
          **{
            f"{who}_median_us": _per_step(statistics.median(ms), size)
            for who, ms in _both(ours, plain)
          },
          "ratio_min": round(min(ours) / min(plain), 3),
          "ratio_median": round(statistics.median(ours) / statistics.median(plain), 3),
        }


def work(cell: nn.RNNCellBase, size: Size) -> dict[str, Callable[[], None]]:
  """Functions that run the cell over the sequences, done when they return."""
  model = nn.RNN(cell, variable_carry="batch_stats")
  x = jax.random.normal(jax.random.key(0), (size.batch, size.steps, size.inputs))
  variables = model.init(jax.random.key(1), x)
  stats = variables.get("batch_stats", {})

  @jax.jit
  def forward(params: Any, stats: Any) -> Any:
    return model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

  @jax.jit
  @jax.grad
  def backward(params: Any, stats: Any) -> jax.Array:
    return jnp.sum(jnp.square(forward(params, stats)[0]))

  arguments = jax.block_until_ready((variables["params"], stats))
  return {
    KINDS[0]: lambda: jax.block_until_ready(forward(*arguments)),
    KINDS[1]: lambda: jax.block_until_ready(backward(*arguments)),
  }


def table(rows: list[Row]) -> Table:
  """The rows, for the terminal."""
  of = f"{rows[0]['units']} units, batches of {rows[0]['batch']}, {rows[0]['steps']} steps"
  shown = Table(title=f"Microseconds per step on the CPU: {of} (goal: at most {GOAL} times)")
  for heading in ("cell", "inputs", "kind"):
    shown.add_column(heading, no_wrap=True)
  for heading in ("plain", "normalized", "ratio", "by medians"):
    shown.add_column(heading, justify="right")
  for row in rows:
    shown.add_row(*_cells(row), style="red" if row["ratio_min"] > GOAL else None)
  return shown


def markdown(rows: list[Row]) -> str:
  """The same for a page."""
  lines = [["cell", "inputs", "kind", "plain, µs", "normalized, µs", "ratio", "by medians"]]
  return stored.table(lines + [_cells(row) for row in rows], right=range(3, 7))


def chapter() -> list[str]:
  """Of a page: what was found when it was last run, if it was."""
  found = stored.read(NAME, FOLDER)
  if not found:
    return []
  rows, machine = found["rows"], found["machine"]
  return [
    f"**What it costs.** Microseconds per step of {rows[0]['units']} units on the CPU "
    f"({machine['cpu']}, {machine['cores']} cores; jax {found['versions']['jax']}), for batches of "
    f"{rows[0]['batch']} and {rows[0]['steps']} steps: the cells of jaxbn.linen and Flax's plain "
    "ones (OptimizedLSTMCell, GRUCell) under `nn.RNN`, in turns, the least of at least "
    f"{min(row['samples'] for row in rows)} times each (`{found['command']}`). The goal is at most "
    f"{GOAL} times; the most here is {max(row['ratio_min'] for row in rows):.2f}.",
    markdown(rows),
  ]


def _cells(row: Row) -> list[str]:
  names = ("cell", "inputs", "kind", "plain_min_us", "ours_min_us")
  ratios = [f"{row[name]:.2f}" for name in ("ratio_min", "ratio_median")]
  return [*(str(row[name]) for name in names), *ratios]


def _both(ours: list[float], plain: list[float]) -> list[tuple[str, list[float]]]:
  return [("ours", ours), ("plain", plain)]


def _per_step(milliseconds: float, size: Size) -> float:
  return float(f"{1e3 * milliseconds / size.steps:.3g}")


if __name__ == "__main__":
  main()
