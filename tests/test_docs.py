"""The guides in docs/, whose code `make wheel` runs: blocks check something, the index is whole."""

import ast
import pathlib
import re

import pytest

from tests.bare import blocks

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = {p.name: p.read_text() for p in sorted(DOCS.glob("*.md"))}
GUIDES = [name for name, text in PAGES.items() if "```python" in text]


@pytest.mark.parametrize("page", GUIDES)
def test_every_block_of_a_guide_ends_in_what_it_checks(page):
  for block in blocks(PAGES[page]):
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block).body[-1]))


def test_the_index_has_every_page():
  linked = re.findall(r"\]\(([^)/]+\.md)\)", PAGES["README.md"])
  assert sorted(linked) == sorted(PAGES.keys() - {"README.md"})
  assert set(linked[: len(GUIDES)]) == set(GUIDES)  # they come first
