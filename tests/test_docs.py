"""The code of the guides in docs/ runs as a reader pastes it, on several devices and on one."""

import ast
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import traceback

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = {p.name: p.read_text() for p in sorted(DOCS.glob("*.md"))}
GUIDES = [name for name, text in PAGES.items() if "```python" in text]
# A page that does not ask how many there are uses one in either case.
RUNS = [(page, 4) for page in GUIDES]
RUNS += [(page, 1) for page in GUIDES if "device_count" in PAGES[page]]


def blocks(page):
  """The page's Python, each block where it is in the page, for tracebacks to say the line."""
  for found in re.finditer(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
    yield PAGES[page].count("\n", 0, found.start(1)) * "\n" + found[1]


def failure(page):
  """What a reader sees who pastes the page's code; empty where all goes well."""
  names = {}
  try:
    for block in blocks(page):
      exec(compile(block, DOCS / page, "exec"), names)
  except Exception:
    return traceback.format_exc()
  return ""


@functools.cache
def failures(devices):
  """Page by page, in a process that has so many devices and takes warnings for errors."""
  pages = [page for page, number in RUNS if number == devices]
  warnings = ["-Werror", "-Wignore:Error reading persistent compilation cache entry:UserWarning"]
  command = [sys.executable, *warnings, "-m", "tests.test_docs", *pages]
  env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
  run = subprocess.run(command, env=env, cwd=DOCS.parent, check=True, stdout=subprocess.PIPE)
  return json.loads(run.stdout)


@pytest.mark.parametrize(("page", "devices"), RUNS)
def test_a_guide_s_code_runs(page, devices):
  assert not failures(devices)[page], failures(devices)[page]


@pytest.mark.parametrize("page", GUIDES)
def test_every_block_of_a_guide_ends_in_what_it_checks(page):
  for block in blocks(page):
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block).body[-1]))


def test_the_index_has_every_page():
  linked = re.findall(r"\]\(([^)/]+\.md)\)", PAGES["README.md"])
  assert sorted(linked) == sorted(PAGES.keys() - {"README.md"})
  assert set(linked[: len(GUIDES)]) == set(GUIDES)  # they come first


if __name__ == "__main__":
  json.dump({page: failure(page) for page in sys.argv[1:]}, sys.stdout)
