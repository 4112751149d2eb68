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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import results as stored
from benchmarks.frameworks import FRAMEWORKS, Layer, missing
from benchmarks.results import ROOT, Row, of, short

COMMAND = "python -m benchmarks.speed"
TWICE = "flax.linen twice"  # beside itself
# Theirs, and what of ours it is compared with: like with like.
PAIRS = {
  "flax.linen": "jaxbn.linen",
  "flax.nnx": "jaxbn.nnx",
  **dict.fromkeys(("haiku", "equinox", "keras", "torch"), "jaxbn"),
  TWICE: "flax.linen",
}
PROCESSES = 2  # for each pair
SHAPES = ((64, 32, 32, 64), (32, 56, 56, 64), (64, 8, 8, 512), (4096, 512), (256, 28, 28, 32))
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


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is timed, and how often at least."""

  shapes: tuple[tuple[int, ...], ...]
  repeats: int
  seconds: float


FULL = Plan(SHAPES, 21, SECONDS)
QUICK = Plan(((16, 8, 8, 32), (256, 64)), 3, 0.0)


def main() -> None:
  """Times everything that is installed, prints the chapter and writes the rows."""
  arguments = _arguments()
  if arguments.pair:
    plan = QUICK if arguments.quick else FULL
    for row in pair_rows(arguments.pair, dataclasses.replace(plan, repeats=arguments.repeats)):
      print(json.dumps(row), flush=True)
    return
  rows = run(arguments.quick, arguments.repeats)
  stored.conclude("speed", COMMAND, rows, parts, arguments.json)


def run(quick: bool, repeats: int) -> list[Row]:
  """The rows of every pair, each from a process of its own, and of the imports."""
  rows = []
  for theirs in track(PAIRS, "Pairs"):
    if sentence := missing(_library(theirs)):
      print(sentence)
    else:
      found = [_in_a_process(theirs, quick, repeats) for _ in range(PROCESSES)]
      rows += [together(same) for same in zip(*found, strict=True)]
  return rows + import_rows(2 if quick else IMPORT_REPEATS)


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
        row: Row = {"framework": theirs, "ours": ours, "shape": list(shape), "dtype": dtype}
        row |= {"kind": kind, "samples": len(ours_ms)}
        yield {**row, **_times("ours", ours_ms), **_times("theirs", theirs_ms)}


def together(rows: Sequence[Row]) -> Row:
  """One row of those that several processes found: the least, the median of medians, the ratios."""
  one: Row = {**rows[0], "samples": sum(row["samples"] for row in rows), "processes": len(rows)}
  for statistic, over_rows in (("min", min), ("median", statistics.median)):
    for whose in ("ours", "theirs"):
      key = f"{whose}_{statistic}_ms"
      one[key] = short(over_rows([row[key] for row in rows]))
    one[f"ratio_{statistic}"] = short(one[f"ours_{statistic}_ms"] / one[f"theirs_{statistic}_ms"])
  return one


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
      command = [sys.executable, "-c", code]
      done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
      times[statement].append(float(done.stdout))
  kind: Row = {"kind": "import", "samples": repeats}
  of_each = {statement: _times("ours", taken) for statement, taken in times.items()}
  return [{**kind, "statement": s, "after": IMPORTS[s], **of_each[s]} for s in IMPORTS]


def _arguments() -> argparse.Namespace:
  parser = stored.parser(__doc__, COMMAND)
  parser.add_argument("--repeats", type=int, help="of every call, at least (21; 3 if quick)")
  parser.add_argument("--pair", choices=PAIRS, help="time one pair here and print its rows")
  arguments = parser.parse_args()
  arguments.repeats = arguments.repeats or (QUICK if arguments.quick else FULL).repeats
  if not arguments.quick and arguments.repeats >= FULL.repeats:  # a look replaces no figures
    arguments.json = arguments.json or stored.FOLDER / "speed.json"
  return arguments


def _library(theirs: str) -> str:
  return PAIRS[TWICE] if theirs == TWICE else theirs


def _in_a_process(theirs: str, quick: bool, repeats: int) -> list[Row]:
  arguments = ["--pair", theirs, "--repeats", str(repeats), *["--quick"] * quick]
  # PyTorch's threads otherwise spin against whatever else runs on their processors, which costs
  # them many times what a call takes; where nothing else runs, its least times are the same.
  settings = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}
  lines = stored.in_a_process("speed", *arguments, **settings)
  return [json.loads(line) for line in lines if line.startswith("{")]  # a library may print too


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


def _times(whose: str, taken: list[float]) -> Row:
  median = statistics.median(taken)
  return {f"{whose}_min_ms": short(min(taken)), f"{whose}_median_ms": short(median)}


# What the rows say.


def parts(results: Row) -> Row:
  """What docs/templates/speed.md leaves open."""
  rows = results["rows"]
  timed = [row for row in rows if "framework" in row]
  return {
    "noise": f"{NOISE:.0%}",
    "left_out": stored.absent(
      [name for name in PAIRS if name not in (*frameworks_of(rows), TWICE)]
    ),
    "means": _means(timed),
    "losses": "\n".join(f"- {line}" for line in losses(rows)),
    "cases": _cases(timed),
    "imports": "\n".join(
      f"- `{row['statement']}` after `{row['after']}` takes {row['ours_min_ms']:.1f} ms "
      f"(the least of {row['samples']} fresh processes)."
      for row in of(rows, kind="import")
    ),
  }


def losses(rows: list[Row]) -> list[str]:
  """For each library, in a sentence, where it is faster than jaxbn."""
  found = []
  for framework in frameworks_of(rows):
    every = of(rows, framework=framework)
    lost = [row for row in every if row["ratio_min"] > 1 + NOISE]
    if framework == TWICE:
      continue
    if not lost:
      found.append(f"{framework} is faster in none of {len(every)} cases.")
      continue
    counts = [
      f"{len(of(lost, kind=kind))} of {len(of(every, kind=kind))} in {kind}"
      for kind in KINDS
      if of(lost, kind=kind)
    ]
    worst = _worst(lost)
    found.append(
      f"{framework} is faster in {len(lost)} of {len(every)} cases ({', '.join(counts)}), most in "
      f"{worst['kind']} of {_shape(worst)} in {worst['dtype']}, where "
      f"jaxbn takes {worst['ratio_min']:.2f} times as long."
    )
  return found


def frameworks_of(rows: list[Row]) -> list[str]:
  """The libraries that the rows are about, in PAIRS' order."""
  return [framework for framework in PAIRS if of(rows, framework=framework)]


def geometric_mean(rows: list[Row], key: str = "ratio_min") -> float:
  """Of our time divided by theirs."""
  return math.exp(statistics.fmean(math.log(row[key]) for row in rows))


def relative_to_flax(rows: list[Row]) -> dict[str, dict[str, float]]:
  """By library and shape: its time over jaxbn's, times jaxbn's over Flax's.

  Both were measured side by side, which the libraries' own times, minutes apart, were not.
  """
  base = {_shape(row): row["ratio_min"] for row in of(rows, framework="flax.linen")}
  relative: dict[str, dict[str, float]] = {"jaxbn": dict(base)}
  for row in rows:
    if _shape(row) in base and row["framework"] != TWICE:
      shapes = relative.setdefault(row["framework"], {})
      shapes[_shape(row)] = base[_shape(row)] / row["ratio_min"]
  return relative


def _shape(row: Row) -> str:
  return "x".join(map(str, row["shape"]))


def _worst(rows: list[Row]) -> Row:
  return max(rows, key=lambda row: row["ratio_min"])


def _means(rows: list[Row]) -> str:
  lines = [["beside", "dtype", *KINDS, "worst"]]
  for framework in frameworks_of(rows):
    for dtype in DTYPES:
      cases = of(rows, framework=framework, dtype=dtype)
      of_kinds = [of(cases, kind=kind) for kind in KINDS]
      means = [
        f"{geometric_mean(c):.2f} ({geometric_mean(c, 'ratio_median'):.2f})" for c in of_kinds
      ]
      worst = _worst(cases)
      text = f"{worst['ratio_min']:.2f}: {worst['kind']}, {_shape(worst)}"
      lines.append([framework, dtype, *means, text])
  return stored.table(lines, right=range(2, 2 + len(KINDS)))


def _cases(rows: list[Row]) -> str:
  names = frameworks_of(rows)
  cells: dict[tuple[str, str, str], dict[str, Row]] = {}
  for row in rows:
    cells.setdefault((row["dtype"], row["kind"], _shape(row)), {})[row["framework"]] = row
  lines = [["dtype", "kind", "shape", "ms", *names]]
  for case in sorted(cells, key=lambda c: (DTYPES.index(c[0]), KINDS.index(c[1]))):
    cell = cells[case]
    first = next(cell[name] for name in names if name in cell)
    ratios = [f"{cell[name]['ratio_min']:.2f}" if name in cell else "" for name in names]
    lines.append([*case, f"{first['ours_min_ms']:.3g}", *ratios])
  return stored.table(lines, right=range(3, 4 + len(names)))


if __name__ == "__main__":
  main()
