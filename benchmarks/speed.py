"""How long batch normalization takes on the CPU: jaxbn beside each of the others.

  python -m benchmarks.speed            some minutes; writes benchmarks/results/speed.json
  python -m benchmarks.speed --quick    a look, written nowhere

Two libraries are timed in one process and in turns, theirs and ours, so that whatever else the
machine does meets both alike; each pair has processes of its own, since where a process's memory
comes to lie favours one or the other. Every timed call comes after an untimed one of the same
function: else it would find the other's data in the caches, and the other's threads, which wait for
work by spinning for some milliseconds, on the processors. Flax's layer beside itself shows what of
all this remains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks import results as stored
from benchmarks.frameworks import FRAMEWORKS, Layer, missing

COMMAND = "python -m benchmarks.speed"
ROOT = pathlib.Path(__file__).resolve().parents[1]
TWICE = "flax.linen twice"  # beside itself
# Theirs, and what of ours it is compared with: like with like.
PAIRS = {
  "flax.linen": "jaxbn.linen",
  "flax.nnx": "jaxbn.nnx",
  "haiku": "jaxbn",
  "equinox": "jaxbn",
  "keras": "jaxbn",
  "torch": "jaxbn",
  TWICE: "flax.linen",
}
PROCESSES = 2  # for each pair
SHAPES = (
  (64, 32, 32, 64),
  (32, 56, 56, 64),
  (64, 8, 8, 512),
  (4096, 512),
  (256, 28, 28, 32),
)
DTYPES = ("float32", "bfloat16")
KINDS = ("evaluation", "forward", "forward and backward")
# What is imported, and what its user has imported anyway.
IMPORTS = {
  "import jaxbn": "import jax",
  "from jaxbn.linen import BatchNorm": "import jax, flax.linen",
}
IMPORT_REPEATS = 7
# A short call is timed more often than a long one: until this long or this often.
SECONDS = 0.15
MOST = 400
# Ratios nearer to 1 than this are called level.
NOISE = 0.05
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is timed, and how often at least."""

  shapes: tuple[tuple[int, ...], ...]
  repeats: int
  seconds: float


FULL = Plan(SHAPES, 21, SECONDS)
QUICK = Plan(((16, 8, 8, 32), (256, 64)), 3, 0.0)


def main() -> None:
  """Times everything that is installed, prints the summary and writes the rows."""
  arguments = _arguments()
  if arguments.pair:
    plan = dataclasses.replace(_plan(arguments.quick), repeats=arguments.repeats)
    for row in pair_rows(arguments.pair, plan):
      print(json.dumps(row), flush=True)
    return
  rows = run(arguments.quick, arguments.repeats)
  console = Console()
  for line in summary(rows):
    console.print(line, markup=False)
  if arguments.json:
    stored.write("speed", COMMAND, rows, arguments.json)
    console.print(f"Wrote {os.path.relpath(arguments.json)}.")


def run(quick: bool, repeats: int) -> list[Row]:
  """The rows of every pair, each from a process of its own, and of the imports."""
  rows = []
  plan = _plan(quick)
  cells = len(plan.shapes) * len(DTYPES) * len(KINDS)
  columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
  with Progress(*columns) as progress:
    for theirs, ours in PAIRS.items():
      if sentence := missing(_library(theirs)):
        progress.console.print(sentence)
        continue
      task = progress.add_task(f"{ours} and {theirs}", total=cells * PROCESSES)
      found: list[list[Row]] = [[] for _ in range(PROCESSES)]
      for one in found:
        for row in _in_a_process(theirs, quick, repeats):
          one.append(row)
          progress.advance(task)
      rows += [together(same) for same in zip(*found, strict=True)]
    task = progress.add_task("imports", total=1)
    rows += import_rows(2 if quick else IMPORT_REPEATS)
    progress.advance(task)
  return rows


def pair_rows(theirs: str, plan: Plan) -> Iterator[Row]:
  """Every shape, dtype and kind of one pair, timed here."""
  ours = PAIRS[theirs]
  for shape in plan.shapes:
    for dtype in DTYPES:
      names = ours, _library(theirs)
      layers = [FRAMEWORKS[name].build(shape, jnp.dtype(dtype)) for name in names]
      calls = [_calls(layer, shape, dtype) for layer in layers]
      for kind in KINDS:
        ours_ms, theirs_ms = in_turns([call[kind] for call in calls], plan)
        yield {
          "framework": theirs,
          "ours": ours,
          "shape": list(shape),
          "dtype": dtype,
          "kind": kind,
          "samples": len(ours_ms),
          **_statistics("ours", ours_ms),
          **_statistics("theirs", theirs_ms),
        }


def together(rows: Sequence[Row]) -> Row:
  """One row of those that several processes found: the least, the median of medians, the ratios."""
  times = {}
  for whose in ("ours", "theirs"):
    times[f"{whose}_min_ms"] = min(row[f"{whose}_min_ms"] for row in rows)
    medians = [row[f"{whose}_median_ms"] for row in rows]
    times[f"{whose}_median_ms"] = _short(statistics.median(medians))
  return {
    **rows[0],
    "samples": sum(row["samples"] for row in rows),
    "processes": len(rows),
    **times,
    "ratio_min": _short(times["ours_min_ms"] / times["theirs_min_ms"]),
    "ratio_median": _short(times["ours_median_ms"] / times["theirs_median_ms"]),
  }


def in_turns(calls: list[Callable[[], None]], plan: Plan) -> list[list[float]]:
  """Milliseconds of each function's calls, taken in turns."""
  for call in calls:  # compiled here
    call()
  times: list[list[float]] = [[] for _ in calls]
  end = time.perf_counter() + plan.seconds * len(calls)
  while len(times[0]) < plan.repeats or (time.perf_counter() < end and len(times[0]) < MOST):
    for call, taken in zip(calls, times, strict=True):
      call()
      start = time.perf_counter()
      call()
      taken.append(1e3 * (time.perf_counter() - start))
  return times


def import_rows(repeats: int) -> list[Row]:
  """What importing jaxbn adds for someone who has imported JAX, and Flax for the layers."""
  times: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
  for _ in range(repeats):
    for statement, before in IMPORTS.items():
      code = (
        f"{before}, time; start = time.perf_counter(); {statement}; "
        "print(1e3 * (time.perf_counter() - start))"
      )
      done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
      )
      times[statement].append(float(done.stdout))
  return [
    {
      "kind": "import",
      "statement": statement,
      "after": IMPORTS[statement],
      "samples": repeats,
      **_statistics("ours", taken),
    }
    for statement, taken in times.items()
  ]


def summary(rows: list[Row]) -> Iterator[str]:
  """Lines for the terminal: the means, the worst, and where another library is faster."""
  for framework in frameworks_of(rows):
    means = ", ".join(
      f"{kind} {geometric_mean(_of(rows, framework, kind=kind)):.2f}" for kind in KINDS
    )
    yield f"{PAIRS[framework]}/{framework}: {means}; worst {_case(_worst(rows, framework))}"
  yield from losses(rows)
  for row in _imports(rows):
    yield f"`{row['statement']}` adds {row['ours_min_ms']:.1f} ms to `{row['after']}`"


def losses(rows: list[Row]) -> list[str]:
  """For each library, in a sentence, where it is faster than jaxbn."""
  return [
    _losses_to(framework, _of(rows, framework))
    for framework in frameworks_of(rows)
    if framework != TWICE
  ]


def frameworks_of(rows: list[Row]) -> list[str]:
  """The libraries that the rows are about, in PAIRS' order."""
  present = {row.get("framework") for row in rows}
  return [framework for framework in PAIRS if framework in present]


def geometric_mean(rows: list[Row], key: str = "ratio_min") -> float:
  """Of our time divided by theirs."""
  return math.exp(statistics.fmean(math.log(row[key]) for row in rows))


def section(results: dict[str, Any]) -> str:
  """The chapter of docs/benchmarks.md."""
  rows = results["rows"]
  parts = [_INTRODUCTION, "![Time relative to Flax](benchmarks-speed.png)", _notes(rows)]
  parts += [_MEANS, _table_of_means(rows), _WINS, "\n".join(f"- {line}" for line in losses(rows))]
  parts += ["### Every case", _CASES, _table_of_cases(rows), "### Import", _imports_text(rows)]
  return "\n\n".join(part for part in parts if part) + "\n"


def draw(results: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
  """benchmarks-speed.png: every library's time divided by Flax's, through jaxbn's."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  rows = results["rows"]
  figure, axes = plt.subplots(
    len(DTYPES), len(KINDS), figsize=(13, 7), sharex=True, sharey=True, layout="constrained"
  )
  for i, dtype in enumerate(DTYPES):
    for j, kind in enumerate(KINDS):
      _draw_panel(
        axes[i, j], [r for r in _timings(rows) if (r["dtype"], r["kind"]) == (dtype, kind)]
      )
      axes[i, j].set_title(f"{kind}, {dtype}")
    axes[i, 0].set_ylabel("time / time of flax.linen")
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
  figure.suptitle(
    "Time of one layer, divided by that of flax.linen (the line at 1); less is better"
  )
  path = folder / "benchmarks-speed.png"
  figure.savefig(path, dpi=110)
  plt.close(figure)
  return [path]


def relative_to_flax(rows: list[Row]) -> dict[str, dict[str, float]]:
  """By library and shape: its time over jaxbn's, times jaxbn's over Flax's.

  Both were measured side by side, which the libraries' own times, minutes apart, were not.
  """
  base = {_shape(row): row["ratio_min"] for row in rows if row["framework"] == "flax.linen"}
  relative: dict[str, dict[str, float]] = {"jaxbn": dict(base)}
  for row in rows:
    if _shape(row) in base and row["framework"] != TWICE:
      shapes = relative.setdefault(row["framework"], {})
      shapes[_shape(row)] = base[_shape(row)] / row["ratio_min"]
  return relative


_INTRODUCTION = """## Speed

Wall time on the CPU of one layer: in evaluation (running statistics), forward in training (result
and new statistics), and forward and backward (the same, and the gradients of x, scale and bias).
Functions in JAX are compiled. jaxbn's Linen layer is timed beside Flax's, its NNX layer beside
Flax's, and `jaxbn.batch_norm` beside the rest, in one process and in turns, in two processes. A
ratio is jaxbn's time divided by theirs, from the least of at least 42 times each: below 1, jaxbn is
faster. "flax.linen twice" is Flax's layer beside itself: as far as that is from 1, so far may every
ratio be from what it would be on a machine at rest."""
_MEANS = "Geometric means over the shapes (in parentheses by medians), and the worst case:"
_WINS = f"Where another library is faster, by more than {NOISE:.0%}:"
_CASES = (
  "jaxbn's time divided by each library's; the milliseconds are those of jaxbn's Linen layer."
)
_MARKERS: dict[str, dict[str, Any]] = {
  "jaxbn": {"marker": "o", "color": "black", "markersize": 9, "label": "jaxbn.linen"},
  "flax.nnx": {"marker": "s", "color": "tab:red"},
  "haiku": {"marker": "^", "color": "tab:orange"},
  "equinox": {"marker": "v", "color": "tab:green"},
  "keras": {"marker": "D", "color": "tab:purple"},
  "torch": {"marker": "X", "color": "tab:blue", "markersize": 8},
}


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
  parser.add_argument("--quick", action="store_true", help="small shapes, few repeats")
  parser.add_argument("--repeats", type=int, help="of every call, at least (21; 3 if quick)")
  parser.add_argument("--json", type=pathlib.Path, help="where to write the rows")
  parser.add_argument("--pair", choices=PAIRS, help="time one pair here and print its rows")
  arguments = parser.parse_args()
  arguments.repeats = arguments.repeats or _plan(arguments.quick).repeats
  whole = not arguments.quick and arguments.repeats >= FULL.repeats
  if arguments.json is None and whole:  # a look replaces no figures
    arguments.json = stored.FOLDER / "speed.json"
  return arguments


def _library(theirs: str) -> str:
  return PAIRS[TWICE] if theirs == TWICE else theirs


def _plan(quick: bool) -> Plan:
  return QUICK if quick else FULL


def _in_a_process(theirs: str, quick: bool, repeats: int) -> Iterator[Row]:
  command = [sys.executable, "-m", "benchmarks.speed", "--pair", theirs]
  command += ["--repeats", str(repeats)]
  # PyTorch's threads otherwise spin against whatever else runs on their processors, which costs
  # them many times what a call takes; where nothing else runs, its least times are the same.
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}
  with subprocess.Popen(
    command + ["--quick"] * quick, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    for line in process.stdout:
      if line.startswith("{"):  # a library may print too
        yield json.loads(line)
  if process.returncode:
    raise SystemExit(f"Timing {theirs} failed with exit status {process.returncode}; see above.")


def _calls(layer: Layer, shape: tuple[int, ...], dtype: str) -> dict[str, Callable[[], None]]:
  """One kind of work each, on data that are ready, done when they return."""
  rng = np.random.default_rng(0)
  x, cotangent = (
    layer.put(rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(dtype))) for _ in range(2)
  )
  layer.wait((x, cotangent))
  return {
    "evaluation": lambda: layer.wait(layer.evaluate(x)),
    "forward": lambda: layer.wait(layer.train(x)),
    "forward and backward": lambda: layer.wait(layer.gradients(x, cotangent)),
  }


def _statistics(whose: str, milliseconds: list[float]) -> Row:
  return {
    f"{whose}_min_ms": _short(min(milliseconds)),
    f"{whose}_median_ms": _short(statistics.median(milliseconds)),
  }


def _short(value: float) -> float:
  """To four digits, which is more than a time has."""
  return float(f"{value:.4g}")


def _timings(rows: list[Row]) -> list[Row]:
  return [row for row in rows if "framework" in row]


def _imports(rows: list[Row]) -> list[Row]:
  return [row for row in rows if row["kind"] == "import"]


def _of(rows: list[Row], framework: str, **where: Any) -> list[Row]:
  return [
    row
    for row in _timings(rows)
    if row["framework"] == framework and all(row[key] == value for key, value in where.items())
  ]


def _worst(rows: list[Row], framework: str) -> Row:
  return max(_of(rows, framework), key=lambda row: row["ratio_min"])


def _shape(row: Row) -> str:
  return "x".join(str(size) for size in row["shape"])


def _case(row: Row) -> str:
  return f"{row['ratio_min']:.2f} ({row['kind']}, {_shape(row)}, {row['dtype']})"


def _losses_to(framework: str, rows: list[Row]) -> str:
  lost = [row for row in rows if row["ratio_min"] > 1 + NOISE]
  if not lost:
    return f"{framework} is faster in none of {len(rows)} cases."
  counts = ", ".join(
    f"{sum(row['kind'] == kind for row in lost)} of {sum(row['kind'] == kind for row in rows)} "
    f"in {kind}"
    for kind in KINDS
    if any(row["kind"] == kind for row in lost)
  )
  worst = max(lost, key=lambda row: row["ratio_min"])
  return (
    f"{framework} is faster in {len(lost)} of {len(rows)} cases ({counts}), most in "
    f"{worst['kind']} of {_shape(worst)} in {worst['dtype']}, where "
    f"jaxbn takes {worst['ratio_min']:.2f} times as long."
  )


def _notes(rows: list[Row]) -> str:
  names = frameworks_of(rows)
  notes = [note for name in names if (note := FRAMEWORKS[_library(name)].note)]
  left_out = [name for name in PAIRS if name not in (*names, TWICE)]
  if left_out:
    notes.append(f"Not installed where this was measured: {', '.join(left_out)}.")
  return " ".join(notes)


def _table_of_means(rows: list[Row]) -> str:
  lines = [["beside", "dtype", *KINDS, "worst"]]
  for framework in frameworks_of(rows):
    for dtype in DTYPES:
      of_dtype = _of(rows, framework, dtype=dtype)
      means = []
      for kind in KINDS:
        cases = [row for row in of_dtype if row["kind"] == kind]
        means.append(f"{geometric_mean(cases):.2f} ({geometric_mean(cases, 'ratio_median'):.2f})")
      worst = max(of_dtype, key=lambda row: row["ratio_min"])
      text = f"{worst['ratio_min']:.2f}: {worst['kind']}, {_shape(worst)}"
      lines.append([framework, dtype, *means, text])
  return stored.table(lines, right=range(2, 2 + len(KINDS)))


def _table_of_cases(rows: list[Row]) -> str:
  names = frameworks_of(rows)
  ratios: dict[tuple[str, str, str], dict[str, Row]] = {}
  for row in _timings(rows):
    cell = ratios.setdefault((row["dtype"], row["kind"], _shape(row)), {})
    cell[row["framework"]] = row
  lines = [["dtype", "kind", "shape", "ms", *names]]
  order = sorted(ratios, key=lambda case: (DTYPES.index(case[0]), KINDS.index(case[1])))
  for case in order:
    cell = ratios[case]
    first = cell[names[0]] if names[0] in cell else next(iter(cell.values()))
    values = [f"{cell[name]['ratio_min']:.2f}" if name in cell else "" for name in names]
    lines.append([*case, f"{first['ours_min_ms']:.3g}", *values])
  return stored.table(lines, right=range(3, 4 + len(names)))


def _imports_text(rows: list[Row]) -> str:
  return "\n".join(
    f"- `{row['statement']}` after `{row['after']}` takes {row['ours_min_ms']:.1f} ms "
    f"(the least of {row['samples']} fresh processes)."
    for row in _imports(rows)
  )


def _draw_panel(axis: Any, rows: list[Row]) -> None:
  shapes = list(dict.fromkeys(_shape(row) for row in rows))
  relative = relative_to_flax(rows)
  names = [name for name in _MARKERS if name in relative]
  axis.axhline(1, color="black", linewidth=1)
  for k, name in enumerate(names):
    offset = 0.11 * (k - (len(names) - 1) / 2)
    xs = [shapes.index(shape) + offset for shape in relative[name]]
    ys = list(relative[name].values())
    axis.plot(xs, ys, **{"label": name, "linestyle": "", "zorder": 3, **_MARKERS[name]})
  for between in range(1, len(shapes)):
    axis.axvline(between - 0.5, color="grey", linewidth=0.5, alpha=0.5)
  axis.set_yscale("log", base=2)
  axis.yaxis.set_major_formatter("{x:g}")
  axis.grid(axis="y", alpha=0.25)
  axis.set_xticks(range(len(shapes)), shapes, rotation=20, fontsize="small")


if __name__ == "__main__":
  main()
