"""What folding the batch norms of a network saves in evaluation: kernels, bytes, and time on a CPU.

  python -m benchmarks.fold            minutes; writes benchmarks/results/fold.json
  python -m benchmarks.fold --quick    a look at one network, written nowhere

Programs are compiled for an H100 and a TPU v5e, neither of which need be there, as in
`benchmarks.compiled`, at the sizes at which networks are used; and for this CPU at small ones,
where both take turns, so that what else the machine does meets both. Each in a process of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import compiled, hlo, networks
from benchmarks import results as stored
from benchmarks.compiled_report import TITLES
from benchmarks.networks import SMALL_RESNET, WHOLE
from benchmarks.results import Row, of, short, tabulate
from benchmarks.speed import Plan, in_turns
from jaxbn.surgery import fold

COMMAND = "python -m benchmarks.fold"
DTYPES = {"h100": "bfloat16", "v5e": "bfloat16", "cpu": "float32"}
NETWORKS = {"basic": SMALL_RESNET, **{name: WHOLE[name] for name in ("resnet50", "mobilenet")}}
CPU_SIDE, CPU_BATCH, ROUNDS = 64, 8, 21
# A fold is checked on the CPU, where jaxlib 0.12.0 in bfloat16 gives NaN for a convolution that is
# fused with a mean, in Flax's evaluation too and not each time, unless this is off.
NO_YNN = "--xla_cpu_experimental_ynn_fusion_type="


def main() -> None:
  parser = stored.parser(__doc__, COMMAND)
  parser.add_argument("--target", choices=TITLES, help="one target here, of one network")
  parser.add_argument("--network", choices=NETWORKS, default="basic")
  arguments = parser.parse_args()
  if arguments.target:
    compiled.prepare()
    print(json.dumps(folded_row(arguments.target, arguments.network, arguments.quick)))
    return
  names = ["basic"] if arguments.quick else list(NETWORKS)
  rows = []
  for target, name in track(list(itertools.product(TITLES, names)), "Folding and compiling"):
    given = ["--target", target, "--network", name, *["--quick"] * arguments.quick]
    flags = "" if target == "cpu" else NO_YNN
    rows.append(json.loads(stored.in_a_process("fold", *given, XLA_FLAGS=flags)[-1]))
  stored.conclude("fold", COMMAND, rows, parts, arguments)


def evaluated(*inputs: Any, dtype: Any, **options: Any) -> jax.Array:
  """Flax's norm in evaluation."""
  layer = nn.BatchNorm(use_running_average=True, dtype=dtype)
  return networks.outside(layer, *inputs, **options)


def folded_row(target: str, name: str, quick: bool) -> Row:
  """A network as it is and with its norms folded, for one device of the target."""
  if why := compiled.missing(target):
    return {"kind": "skipped", "target": target, "why": why}
  network = NETWORKS[name]
  small = dataclasses.replace(
    network, batch=CPU_BATCH, shape=(min(CPU_SIDE, network.shape[0]),) * 2 + network.shape[2:]
  )
  network = small if target == "cpu" else network
  model = network.model(evaluated, jnp.dtype(DTYPES[target]))
  x = np.random.default_rng(0).normal(size=(CPU_BATCH, *small.shape)).astype(np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  folded = fold(model.apply, variables, x)
  row: Row = {"kind": "fold", "target": target, "dtype": DTYPES[target], "network": name}
  row |= {"batch": network.batch, "shape": list(network.shape)}
  row |= {"norms": len(folded.report.folded), "left": len(folded.report.left)}
  calls = []
  for whose, function, given in (
    ("", model.apply, variables),
    ("folded_", folded.function, folded.variables),
  ):
    shapes = jax.eval_shape(lambda v: v, given)
    program = compiled.compile_for(target, function, shapes, network.inputs())
    row[f"{whose}kernels"] = len(hlo.parse(program.as_text()).kernels)
    row[f"{whose}MB"] = compiled.moved(target, program) / 1e6
    calls.append((whose, program, given))
  if target != "cpu":
    return row
  run: list[Callable[[], None]] = [
    functools.partial(_finish, program, given, x) for _, program, given in calls
  ]
  times = in_turns(run, Plan((), 3 if quick else ROUNDS, 0.0))
  for (whose, *_), taken in zip(calls, times, strict=True):
    row |= stored.min_and_median(taken, whose)
  ratios = {n: row[f"folded_{n}_ms"] / row[f"{n}_ms"] for n in ("min", "median")}
  return row | {f"{n}_ratio": short(ratio) for n, ratio in ratios.items()}


def _finish(program: Any, given: Any, x: Any) -> None:
  program(given, x).block_until_ready()


# What the rows say.

COUNTS = {
  "norms": "{norms}",
  "kernels": "{kernels}",
  "folded": "{folded_kernels}",
  "moves": "{MB:,.1f} MB",
  "folded ": "{folded_MB:,.1f} MB",
}
TIMES = {
  "median": "{median_ms:.1f} ms",
  "folded": "{folded_median_ms:.1f} ms",
  "ratio": "{median_ratio:.2f}",
  "least": "{min_ms:.1f} ms",
  "folded ": "{folded_min_ms:.1f} ms",
  "ratio ": "{min_ratio:.2f}",
}


def parts(results: Row) -> Row:
  rows = [
    {
      **row,
      "on": TITLES[row["target"]],
      "title": NETWORKS[row["network"]].title,
      "size": "x".join(map(str, row["shape"])),
    }
    for row in of(results["rows"], kind="fold")
  ]
  words = {"target": "{on}, {dtype}", "network": "{title}", "batch": "{batch} of {size}"}
  times = {key: words[key] for key in ("network", "batch")}
  return {
    "counts": tabulate(rows, words, COUNTS),
    "times": tabulate(of(rows, target="cpu"), times, TIMES),
    "skipped": "\n\n".join(dict.fromkeys(r["why"] for r in of(results["rows"], kind="skipped"))),
  }


if __name__ == "__main__":
  main()
