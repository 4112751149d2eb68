"""Writes docs/benchmarks.md and its charts from benchmarks/results/*.json and docs/templates.

  python -m benchmarks.report

No figure on that page is typed: each benchmark has a text in docs/templates, and a function `parts`
that gives what the text leaves open.
"""

from __future__ import annotations

from typing import Any

from benchmarks import charts, compiled_report, fold, numerics, speed, step, trained
from benchmarks import results as stored

DOCS = stored.ROOT / "docs"
PAGE = DOCS / "benchmarks.md"
CHAPTERS = {
  "compiled": compiled_report.parts,
  "trained": trained.parts,
  "fold": fold.parts,
  "step": step.parts,
  "speed": speed.parts,
  "numerics": numerics.parts,
}


def main() -> None:
  found = available()
  if not found:
    raise SystemExit("There are no results yet: run `make bench` first.")
  for name in CHAPTERS.keys() - found.keys():
    print(f"{name} is left out: benchmarks/results/{name}.json does not exist.")
  PAGE.write_text(page(found))
  written = [PAGE, *(path for path in charts.draw(found, DOCS))]
  print(f"Wrote {', '.join(str(path.relative_to(DOCS.parent)) for path in written)}.")


def available() -> dict[str, dict[str, Any]]:
  found = {name: stored.read(name) for name in CHAPTERS}
  return {name: results for name, results in found.items() if results is not None}


def page(found: dict[str, dict[str, Any]]) -> str:
  origins = [["benchmark", "command", "date", "machine"]]
  for name, results in found.items():
    machine = "{cpu}, {cores} cores, {system}".format_map(results["machine"])
    origins.append([name, f"`{results['command']}`", results["date"], machine])
  names = dict.fromkeys(name for results in found.values() for name in results["versions"])
  versions = [
    [name, *(results["versions"].get(name, "") for results in found.values())] for name in names
  ]
  parts = {
    "origins": stored.table(origins),
    "versions": stored.table([["version of", *found], *versions]),
    "left_out": "\n".join(f"Not measured yet: {n}." for n in CHAPTERS if n not in found),
    "chapters": "\n".join(section(name, results) for name, results in found.items()).strip(),
  }
  return stored.fill("benchmarks", parts)


def section(name: str, results: dict[str, Any]) -> str:
  return stored.fill(name, CHAPTERS[name](results))


if __name__ == "__main__":
  main()
