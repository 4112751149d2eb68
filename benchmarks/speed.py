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

import itertools
import json
import operator
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import results as stored
from benchmarks.frameworks import FRAMEWORKS, TWICE, Layer, missing
from benchmarks.results import Row, of, short

COMMAND = "python -m benchmarks.speed"
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
RATIO = operator.itemgetter("ratio_min")


class Plan(NamedTuple):
  """What is timed, and how often at least."""

  shapes: tuple[tuple[int, ...], ...]
  repeats: int
  seconds: float


FULL = Plan(SHAPES, 21, SECONDS)
QUICK = Plan(((16, 8, 8, 32), (256, 64)), 3, 0.0)


def main() -> None:
  parser = stored.parser(__doc__, COMMAND)
  parser.add_argument("--repeats", type=int, help="of every call, at least (21; 3 if quick)")
  parser.add_argument("--pair", choices=PAIRS, help="time one pair here and print its rows")
  arguments = parser.parse_args()
  plan = QUICK if arguments.quick else FULL
  plan = plan._replace(repeats=arguments.repeats or plan.repeats)
  if arguments.pair:
    for row in pair_rows(arguments.pair, plan):
      print(json.dumps(row), flush=True)
    return
  rows: list[Row] = []
  for theirs in track(PAIRS, "Pairs"):
    if sentence := missing(theirs):
      print(sentence)
    else:
      found = [_in_a_process(theirs, arguments.quick, plan.repeats) for _ in range(PROCESSES)]
      rows += [together(same) for same in zip(*found, strict=True)]
  rows += import_rows(2 if arguments.quick else IMPORT_REPEATS)
  whole = plan.repeats >= FULL.repeats  # a look replaces no figures
  stored.conclude("speed", COMMAND, rows, parts, arguments, whole)


def pair_rows(theirs: str, plan: Plan) -> Iterator[Row]:
  """Every shape, dtype and kind of one pair, timed here."""
  ours = PAIRS[theirs]
  for shape in plan.shapes:
    for dtype in DTYPES:
      layers = [FRAMEWORKS[name](shape, jnp.dtype(dtype)) for name in (ours, theirs)]
      calls = [_calls(layer, shape, dtype) for layer in layers]
      for kind in KINDS:
        ours_ms, theirs_ms = in_turns([call[kind] for call in calls], plan)
        row: Row = {"framework": theirs, "ours": ours, "shape": list(shape), "dtype": dtype}
        row |= {"kind": kind, "samples": len(ours_ms)}
        row |= stored.min_and_median(ours_ms, "ours_")
        yield row | stored.min_and_median(theirs_ms, "theirs_")


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


def import_rows(repeats: int) -> Iterator[Row]:
  """What importing jaxbn adds for someone who has imported JAX, and Flax for the layers."""
  for statement, before in IMPORTS.items():
    code = f"{before}, time; start = time.perf_counter(); {statement}; "
    command = [sys.executable, "-c", code + "print(1e3 * (time.perf_counter() - start))"]
    options: Any = {"cwd": stored.ROOT, "check": True, "capture_output": True}
    taken = [float(subprocess.run(command, **options).stdout) for _ in range(repeats)]
    row = {"kind": "import", "samples": repeats, "statement": statement, "after": before}
    yield row | stored.min_and_median(taken, "ours_")


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


# What the rows say.


def parts(results: Row) -> Row:
  rows = results["rows"]
  timed = [row for row in rows if "framework" in row]
  return {
    "noise": f"{NOISE:.0%}",
    "left_out": stored.absent([n for n in PAIRS if n not in (*frameworks_of(rows), TWICE)]),
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
      f"{len(lost_of)} of {len(of(every, kind=kind))} in {kind}"
      for kind in KINDS
      if (lost_of := of(lost, kind=kind))
    ]
    worst = max(lost, key=RATIO)
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
  return statistics.geometric_mean(row[key] for row in rows)


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


def _means(rows: list[Row]) -> str:
  lines = [["beside", "dtype", *KINDS, "worst"]]
  for framework, dtype in itertools.product(frameworks_of(rows), DTYPES):
    cases = of(rows, framework=framework, dtype=dtype)
    of_kinds = [of(cases, kind=kind) for kind in KINDS]
    means = [f"{geometric_mean(c):.2f} ({geometric_mean(c, 'ratio_median'):.2f})" for c in of_kinds]
    worst = max(cases, key=RATIO)
    text = f"{worst['ratio_min']:.2f}: {worst['kind']}, {_shape(worst)}"
    lines.append([framework, dtype, *means, text])
  return stored.table(lines, right=range(2, 2 + len(KINDS)))


def _cases(rows: list[Row]) -> str:
  names = frameworks_of(rows)
  lines = [["dtype", "kind", "shape", "ms", *names]]
  shapes = dict.fromkeys(map(_shape, rows))
  for dtype, kind, shape in itertools.product(DTYPES, KINDS, shapes):
    same = [row for row in of(rows, dtype=dtype, kind=kind) if _shape(row) == shape]
    if cell := {row["framework"]: row for row in same}:
      ratios = [f"{cell[name]['ratio_min']:.2f}" if name in cell else "" for name in names]
      first = next(cell[name] for name in names if name in cell)
      lines.append([dtype, kind, shape, f"{first['ours_min_ms']:.3g}", *ratios])
  return stored.table(lines, right=range(3, 4 + len(names)))


if __name__ == "__main__":
  main()
