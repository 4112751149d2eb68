"""Where a benchmark's figures are kept, with what they depend on, and how they become pages."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import string
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.frameworks import cores

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
TEMPLATES = ROOT / "docs" / "templates"
DISTRIBUTIONS = (
  *("jaxbn", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch", "numpy"),
  *("jax-cuda12-plugin", "libtpu"),
)
LIMIT = 1800  # seconds that a process may take
Row = dict[str, Any]
Columns = Mapping[str, str]  # by heading: how a row is written there, as in "{seconds:.1f} s"


def made(name: str, command: str, rows: list[Row]) -> dict[str, Any]:
  """Rows with the command that made them, the date, the versions and the machine."""
  return {
    "name": name,
    "command": command,
    "date": datetime.date.today().isoformat(),
    "versions": versions(),
    "machine": machine(),
    "rows": rows,
  }


def write(name: str, command: str, rows: list[Row], path: pathlib.Path) -> None:
  """What was made, as JSON, a row to a line, so that two runs can be compared by diff."""
  head = made(name, command, rows)
  del head["rows"]
  text = json.dumps(head, indent=2, allow_nan=False).removesuffix("\n}")
  lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'{text},\n  "rows": [\n{lines}\n  ]\n}}\n')


def read(name: str, folder: pathlib.Path | None = None) -> dict[str, Any] | None:
  """What `write` left in a folder, by default FOLDER; None if it has not been run."""
  path = (folder or FOLDER) / f"{name}.json"
  return json.loads(path.read_text()) if path.exists() else None


def versions() -> dict[str, str]:
  """Python's, and of the libraries those that are installed."""
  found = {name: installed for name in DISTRIBUTIONS if (installed := version(name))}
  return {"python": platform.python_version(), **found}


def version(distribution: str) -> str | None:
  """None where it is not installed."""
  try:
    return importlib.metadata.version(distribution)
  except importlib.metadata.PackageNotFoundError:
    return None


def machine() -> dict[str, Any]:
  """The processor and the system, nothing that names the computer."""
  linux = pathlib.Path("/proc/cpuinfo")
  named = re.search(r"model name\s*: *(.+)", linux.read_text()) if linux.exists() else None
  cpu = named[1].strip() if named else platform.processor() or platform.machine()
  return {"cpu": cpu, "cores": cores(), "system": platform.system()}


def in_a_process(module: str, *arguments: str, **environment: str) -> list[str]:
  """The lines that a benchmark prints when it runs with these arguments in a process of its own."""
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{module}", *arguments],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=LIMIT,
  )
  if done.returncode:
    raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
  return done.stdout.splitlines()


def parser(doc: str, command: str) -> argparse.ArgumentParser:
  """Of a benchmark's command line: a look, which is written nowhere, and where to write."""
  made = argparse.ArgumentParser(
    prog=command, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("--quick", action="store_true", help="a look, written nowhere")
  made.add_argument("--json", type=pathlib.Path, help="where to write the rows")
  return made


def of(rows: Iterable[Row], **where: Any) -> list[Row]:
  """The rows that have these values."""
  return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def short(value: float) -> float:
  """To four digits, which is more than a time has."""
  return float(f"{value:.4g}")


def min_and_median(milliseconds: list[float], whose: str = "") -> Row:
  median = statistics.median(milliseconds)
  return {f"{whose}min_ms": short(min(milliseconds)), f"{whose}median_ms": short(median)}


def table(lines: list[list[str]], right: Iterable[int] = ()) -> str:
  """Markdown of a heading and its rows, the columns in `right` set to the right."""
  rule = ["---:" if column in right else "---" for column in range(len(lines[0]))]
  return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def tabulate(rows: Iterable[Row], words: Columns, figures: Columns) -> str:
  """Markdown with a line for each row: first the words, and then the figures, set to the right."""
  columns = {**words, **figures}
  lines = [[form.format_map(row) for form in columns.values()] for row in rows]
  return table([list(columns), *lines], range(len(words), len(columns)))


def absent(names: list[str]) -> str:
  """A sentence, if there are any."""
  return f"Not installed where this was measured: {', '.join(names)}." if names else ""


def fill(template: str, parts: Mapping[str, Any]) -> str:
  """A text of docs/templates with its $names replaced; a part may be empty."""
  text = string.Template((TEMPLATES / f"{template}.md").read_text()).substitute(parts)
  return re.sub(r" +\n", "\n", re.sub(r"\n{3,}", "\n\n", text))


def conclude(
  name: str,
  command: str,
  rows: list[Row],
  parts: Callable[[Row], Row],
  arguments: argparse.Namespace,
  whole: bool = True,
) -> None:
  """Prints the chapter that the rows make, and writes them if they are whole or a path is given."""
  console = Console()
  console.print(Markdown(fill(name, parts(made(name, command, rows)))))
  path = FOLDER / f"{name}.json" if whole and not arguments.quick else None
  if path := arguments.json or path:
    write(name, command, rows, path)
    console.print(f"Wrote {os.path.relpath(path)}.")
