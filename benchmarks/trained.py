"""What a norm adds on a TPU in networks as wide as they are trained, read off compiled programs.

  python -m benchmarks.trained                      an hour; writes benchmarks/results/trained.json
  python -m benchmarks.trained --networks vgg,unet --forms none,flax
  python -m benchmarks.trained --targets v4 --minutes 9

No TPU is needed, as for `benchmarks.compiled`, but libtpu is. A network here has the resolution,
the batch and the kinds of layers of one that is trained, and few of each kind, since compiling
takes minutes. Each program is stored when it is done, and not compiled again by the same compiler:
a run that was interrupted, or out of `--minutes`, goes on where it was. Bytes are those of device
memory (`benchmarks.hbm`); beside them stands the compiler's own count, which takes the chip's
memory for it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import compiled, floor, hbm, hlo, networks
from benchmarks import results as stored
from benchmarks.networks import TRAINED
from benchmarks.results import Row

COMMAND = "python -m benchmarks.trained"
FORMS: dict[str, networks.Norm] = {
  "none": networks.none,
  "flax": networks.flax,
  "jaxbn": networks.jaxbn,
}
KEY = ("target", "network", "dtype", "norm")
FIGURES = {
  "moves": "{MB:,.0f} MB",
  "tax": "{tax_MB:,.0f} MB",
  "of Flax's": "{of_flax:.2f}",
  "of the floor": "{of_floor:.2f}",
  "tax by the compiler's count": "{count_tax_MB:,.0f} MB",
  "memory over no norm": "{memory_MB:,.0f} MB",
}


def main() -> None:
  parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
  parser.add_argument("--targets", type=compiled.names_of(compiled.TPUS), default=["v5e"])
  parser.add_argument("--networks", type=compiled.names_of(TRAINED), default=list(TRAINED))
  parser.add_argument("--forms", type=compiled.names_of(FORMS), default=list(FORMS))
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after")
  arguments = parser.parse_args()
  there = stored.read("trained") or {"rows": []}
  rows = {tuple(row[k] for k in KEY): row for row in there["rows"]}
  compiled.prepare()
  if why := compiled.missing("v5e"):
    raise SystemExit(why)
  chosen = arguments.targets, arguments.networks, [arguments.dtype], arguments.forms
  fill(rows, list(itertools.product(*chosen)), time.monotonic() + 60 * arguments.minutes)
  Console().print(Markdown(table(list(rows.values()))))


def fill(rows: dict[Any, Row], wanted: list[Any], until: float) -> None:
  """Compiles what is wanted and not there yet, and stores each as soon as it is done."""
  for number, key in enumerate(wanted, 1):
    title = f"{number}/{len(wanted)} {', '.join(key)}"
    if rows.get(key, {}).get("compiler") == _compiler():
      print(f"{title}: as before", flush=True)
      continue
    if time.monotonic() > until:
      print(f"{title} and what follows: left for the next run", flush=True)
      return
    rows[key] = row_of(*key)
    stored.write("trained", COMMAND, list(rows.values()), stored.FOLDER / "trained.json")
    print(f"{title}: {rows[key]['compile_s']:.0f} s", flush=True)


def row_of(target: str, name: str, dtype: str, form: str) -> Row:
  """A step of training, compiled for one chip of the target."""
  network = TRAINED[name]
  model = network.model(functools.partial(FORMS[form], activation=nn.relu), jnp.dtype(dtype))
  start = time.perf_counter()
  arguments = networks.step_arguments(network, model)
  program = compiled.compile_for(target, networks.train_step(model), *arguments)
  text, memory = program.as_text() or "", program.memory_analysis()
  row: Row = dict(zip(KEY, (target, name, dtype, form), strict=True))
  row |= {"compiler": _compiler(), "MB": hbm.moved(text) / 1e6}
  row |= {"count_MB": compiled.counted(program) / 1e6}
  row |= {"temp_MB": memory.temp_size_in_bytes / 1e6, "kernels": len(hlo.parse(text).kernels)}
  least = floor.fused_layers(network, jnp.dtype(dtype))
  row["floor_MB"] = sum(size for _, size in least) / 1e6
  return {**row, "compile_s": round(time.perf_counter() - start)}


def parts(results: Row) -> Row:
  libraries = [f"{name} {results['versions'][name]}" for name in ("jax", "flax", "libtpu")]
  origin = f"`{results['command']}`, {results['date']}: {', '.join(libraries)}."
  return {"origin": origin, "table": table(results["rows"])}


def table(rows: list[Row]) -> str:
  """Every norm over none, and over Flax's, and the geometric means of that."""
  by = {tuple(row[k] for k in KEY): row for row in rows}
  lines: list[Row] = []
  ratios: dict[str, list[float]] = {}
  for row in rows:
    none, flax = (by.get((*(row[k] for k in KEY[:-1]), norm)) for norm in ("none", "flax"))
    if none is None or flax is None or row is none:
      continue
    tax = row["MB"] - none["MB"]
    line = {**row, "title": TRAINED[row["network"]].title, "tax_MB": tax}
    line |= {"of_floor": tax / row["floor_MB"], "of_flax": tax / (flax["MB"] - none["MB"])}
    line["count_tax_MB"] = row["count_MB"] - none["count_MB"]
    lines.append({**line, "memory_MB": row["temp_MB"] - none["temp_MB"]})
    ratios.setdefault(f"{row['target']}, {row['dtype']}, {row['norm']}", []).append(line["of_flax"])
  words = {"target": "{target}", "dtype": "{dtype}", "network": "{title}", "norm": "{norm}"}
  means = [f"{of}: {statistics.geometric_mean(ratios[of]):.2f}" for of in ratios]
  shown = stored.tabulate(lines, words, FIGURES)
  return f"{shown}\n\nOf Flax's tax in the geometric mean: {'; '.join(means)}."


def _compiler() -> str:
  return f"libtpu {stored.version('libtpu')}"


if __name__ == "__main__":
  main()
