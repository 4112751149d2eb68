"""How far a reader of the core has to go: `python -m benchmarks.house`, into docs/design.md.

Of one training call in float32 on the CPU, with options off and nothing in a cache: how many of our
functions are entered, how deep, and in which files between x and y.
"""

from __future__ import annotations

import ast
import pathlib
import platform
import sys
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp

import jaxbn

ROOT = pathlib.Path(jaxbn.__file__).parent
PAGE = ROOT.parent / "docs" / "design.md"
START, END = "<!-- house -->", "<!-- /house -->"
# What a reader may skip: the words of refusal, and what is said to the compiler.
ASIDE = {"_checks.py", "_names.py", "_xla.py"}


def code_lines(path: pathlib.Path) -> int:
  """Lines that are neither blank, nor a comment, nor of a docstring."""
  text = path.read_text()
  lines = {
    n for n, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"
  }
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.end_lineno:
      lines -= set(range(node.lineno, node.end_lineno + 1))
  return len(lines)


def entered() -> tuple[set[tuple[str, int]], int]:
  """Our functions in a training call, each as its file and first line, and how deep they go."""
  x, scale, state = jnp.ones((4, 3)), jnp.ones(3), jaxbn.init(3)
  functions, depth, deepest = set(), 0, 0

  def profile(frame: FrameType, event: str, arg: Any) -> None:
    nonlocal depth, deepest
    path = pathlib.Path(frame.f_code.co_filename)
    if path.parent == ROOT and event in ("call", "return"):
      depth += 1 if event == "call" else -1
      deepest = max(deepest, depth)
      functions.add((path.name, frame.f_code.co_firstlineno))

  sys.setprofile(profile)
  try:
    jaxbn.batch_norm(x, scale, scale, state, use_running_average=False)
  finally:
    sys.setprofile(None)
  return functions, deepest


def table() -> str:
  functions, depth = entered()
  aside = sum(name in ASIDE for name, _ in functions)
  read = sorted({name for name, _ in functions} - ASIDE - {"_track.py"})
  core = sorted(ROOT.glob("_[a-z]*.py"))
  rows = {
    "functions entered": f"{len(functions)}, of these {aside} in {', '.join(sorted(ASIDE))}",
    "depth": depth,
    "files from x to y": f"{len(read)}: {', '.join(read)}",
    "lines of code in the core": f"{sum(map(code_lines, core))}, in {len(core)} files",
  }
  versions = f"Python {platform.python_version()[:4]}, jax {jax.__version__}"
  lines = (f"| {name} | {value} |" for name, value in rows.items())
  return "\n".join([f"| | {versions} |", "| --- | --- |", *lines])


def main() -> None:
  (before, rest), found = PAGE.read_text().split(START), table()
  PAGE.write_text(f"{before}{START}\n{found}\n{END}{rest.split(END)[1]}")
  print(found)


if __name__ == "__main__":
  main()
