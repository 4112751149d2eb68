"""Which top-level folders import which: one way, no circle."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ALLOWED = {
  "jaxbn": set(),
  "benchmarks": {"jaxbn"},
  "examples": {"jaxbn"},
  "configs": {"examples"},
  "experiments": {"jaxbn", "benchmarks", "examples"},
}


def imported(path):
  """The top-level packages that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: imports are absolute here"
      yield node.module.split(".")[0]
    elif isinstance(node, ast.Import):
      yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_it_may(folder):
  found = {name for path in (ROOT / folder).rglob("*.py") for name in imported(path)}
  assert found & ({*ALLOWED, "tests"} - {folder}) <= ALLOWED[folder]


def test_every_package_has_its_rule():
  assert ALLOWED.keys() == {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
