"""Writes docs/benchmarks.md and its charts from benchmarks/results/*.json, and from nothing else.

  python -m benchmarks.report

No figure on that page is typed: each benchmark's module makes its chapter by `section(results)` and
its charts by `draw(results, folder)`.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from benchmarks import results as stored

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "benchmarks.md"
MODULES = ("compiled", "speed", "numerics")


def main() -> None:
  """Writes the page and the charts, and says what is left out."""
  console = Console()
  found = available()
  if not found:
    raise SystemExit("There are no results yet: run `make bench` first.")
  for name in MODULES:
    if name not in found:
      console.print(f"{name} is left out: benchmarks/results/{name}.json does not exist.")
  PAGE.write_text(page(found))
  written = [PAGE]
  for name, results in found.items():
    written += _module(name).draw(results, DOCS)
  console.print(f"Wrote {', '.join(str(path.relative_to(DOCS.parent)) for path in written)}.")


def available() -> dict[str, dict[str, Any]]:
  """The results that are there, by benchmark."""
  found = {name: stored.read(name) for name in MODULES}
  return {name: results for name, results in found.items() if results is not None}


def page(found: dict[str, dict[str, Any]]) -> str:
  """docs/benchmarks.md."""
  sections = [_module(name).section(results).strip() for name, results in found.items()]
  left_out = "\n".join(f"Not measured yet: {name}." for name in MODULES if name not in found)
  parts = [_HEAD, *_origins(found), left_out, *sections]
  return "\n\n".join(part for part in parts if part) + "\n"


_HEAD = """# Benchmarks

Made by `python -m benchmarks.report` from the files in benchmarks/results, which `make bench` and
`make bench-compiled` write. Nothing here is typed by hand."""


def _origins(found: dict[str, dict[str, Any]]) -> Iterator[str]:
  """Which command made what, when, on which machine, and with which versions."""
  lines = [["benchmark", "command", "date", "machine"]]
  for name, results in found.items():
    lines.append([name, f"`{results['command']}`", results["date"], _machine(results["machine"])])
  yield stored.table(lines)
  names = list(dict.fromkeys(key for results in found.values() for key in results["versions"]))
  lines = [["version of", *found]]
  for name in names:
    lines.append([name, *(results["versions"].get(name, "") for results in found.values())])
  yield stored.table(lines)


def _machine(machine: dict[str, Any]) -> str:
  """Whatever a benchmark says of its machine, most often a processor and its cores."""
  named = {"cpu": "{}", "cores": "{} cores"}
  return ", ".join(named.get(key, "{}").format(value) for key, value in machine.items())


def _module(name: str) -> Any:
  return importlib.import_module(f"benchmarks.{name}")


if __name__ == "__main__":
  main()
