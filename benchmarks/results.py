"""Where a benchmark's figures are kept, with what they depend on: versions and the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

from benchmarks.frameworks import cores

FOLDER = pathlib.Path(__file__).resolve().parent / "results"
DISTRIBUTIONS = (
  "jaxbn",
  "jax",
  "jaxlib",
  "flax",
  "dm-haiku",
  "equinox",
  "keras",
  "torch",
  "numpy",
  "jax-cuda12-plugin",
  "libtpu",
)


def write(name: str, command: str, rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Rows with the command that made them, the date, the versions and the machine, as JSON.

  The rows are written one a line, so that two runs can be compared by diff.
  """
  head = {
    "name": name,
    "command": command,
    "date": datetime.date.today().isoformat(),
    "versions": versions(),
    "machine": machine(),
  }
  text = json.dumps(head, indent=2, allow_nan=False).removesuffix("\n}")
  lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'{text},\n  "rows": [\n{lines}\n  ]\n}}\n')


def read(name: str, folder: pathlib.Path = FOLDER) -> dict[str, Any] | None:
  """What `write` left in a folder; None if it has not been run."""
  path = folder / f"{name}.json"
  return json.loads(path.read_text()) if path.exists() else None


def versions() -> dict[str, str]:
  """Python's, and of the libraries those that are installed."""
  found = {"python": platform.python_version()}
  for distribution in DISTRIBUTIONS:
    try:
      found[distribution] = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def machine() -> dict[str, Any]:
  """The processor and the system, nothing that names the computer."""
  return {"cpu": _processor(), "cores": cores(), "system": platform.system()}


def _processor() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def table(lines: list[list[str]], right: Iterable[int] = ()) -> str:
  """Markdown of a heading and its rows, the columns in `right` set to the right."""
  rule = ["---:" if column in right else "---" for column in range(len(lines[0]))]
  return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
