"""What a training step costs each of 4 to 1024 TPU chips, and what synchronization adds.

  python -m benchmarks.scaling                 half an hour; writes benchmarks/results/scaling.json
  python -m benchmarks.scaling --only v5e:2x2  the programs whose name has that in it
  python -m benchmarks.scaling --only weak     what is measured and not compiled

No TPU is needed: XLA compiles for a described slice, and what the program for one of its chips
moves, keeps and sends is then a fact about that program. Each program is compiled in a process of
its own and stored as soon as it is done. A later run traces all of them and compiles those that the
same compiler has not compiled yet as they are now (`--fresh`: all), so that it goes on where it was
interrupted. Then the same step runs on this machine, in one process and in two (`benchmarks.weak`).

`benchmarks.scaling_report` makes docs/scaling.md of it.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import time
from typing import Any

from benchmarks import compiled, hlo, weak
from benchmarks import results as stored
from benchmarks.results import Row
from benchmarks.slices import NETWORKS, Program, devices_of, layers, lower, programs

COMMAND = "python -m benchmarks.scaling"


def main() -> None:
  parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
  parser.add_argument("--only", metavar="TEXT", help="programs whose name has this in it")
  parser.add_argument("--fresh", action="store_true", help="compile again what is stored")
  parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  compiled.prepare()
  if arguments.one:
    name, known = arguments.one
    print(json.dumps(row_of(Program(*name.split("/")), known)))
    return
  if why := compiled.missing("v5e"):
    raise SystemExit(why)
  rows = {row["name"]: row for row in (stored.read("scaling") or {"rows": []})["rows"]}
  wanted = [p for p in programs() if not arguments.only or arguments.only in str(p)]
  for number, program in enumerate(wanted, 1):
    known = "" if arguments.fresh else known_trace(rows.get(str(program)))
    row = json.loads(stored.in_a_process("scaling", "--one", str(program), known)[-1])
    done = f"compiled in {row['compile_s']:.0f} s" if row else "as before"
    print(f"{number}/{len(wanted)} {program}: {done}", flush=True)
    if row:
      rows[str(program)] = row
      write(rows)
  if arguments.only in (None, "weak"):
    rows |= {row["name"]: row for row in weak.measure()}
    write(rows)
  print("benchmarks/results/scaling.json is up to date.")


def known_trace(row: Row | None) -> str:
  """The digest of a stored program as traced; empty if another compiler would compile it now."""
  return row.get("trace", "") if row and row["compiler"] == _compiler() else ""


def write(rows: dict[str, Row]) -> None:
  """All rows, in the order of the programs."""
  order = {str(program): number for number, program in enumerate(programs())}
  ordered = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
  stored.write("scaling", COMMAND, ordered, stored.FOLDER / "scaling.json")


def _compiler() -> str:
  return f"libtpu {stored.version('libtpu')}"


def row_of(program: Program, known: str) -> Row | None:
  """Compiles a program and reads off what one chip does in it; None if its trace is the known."""
  devices = devices_of(program.target)
  lowered = lower(program, devices)
  trace = digest(lowered)
  if trace == known:
    return None
  start = time.perf_counter()
  executable = lowered.compile()
  seconds = time.perf_counter() - start
  costs, (temp, peak) = executable.cost_analysis() or {}, hlo.memory_bytes(executable)
  found = hlo.collectives(executable.as_text() or "", len(devices))
  return {
    "kind": "program",
    "name": str(program),
    **program._asdict(),
    "chips": len(devices),
    "batch": NETWORKS[program.network].batch,
    "layers": layers(program.network),
    "flops": costs["flops"],
    "bytes": costs["bytes accessed"],
    "temp_bytes": temp,
    "memory_bytes": peak,
    "traced_all_reduces": lowered.as_text().count("stablehlo.all_reduce"),
    "collectives": summary(found),
    "compile_s": seconds,
    "compiler": _compiler(),
    "trace": trace,
  }


def digest(lowered: Any) -> str:
  """Of a program as traced: the same compiler makes the same of it."""
  return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12]


def summary(found: list[hlo.Collective]) -> list[list[Any]]:
  """Equal collectives once: operation, bytes, members, algorithm and how many there are."""
  return [[*one, count] for one, count in sorted(collections.Counter(found).items())]


if __name__ == "__main__":
  main()
