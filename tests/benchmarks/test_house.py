"""What the design page says of how far a reader goes is what the command finds."""

import platform
import subprocess
import sys

import jax
import pytest

from benchmarks import house


def test_the_page_says_what_is_measured():
  page = house.PAGE.read_text().split(house.START)[1].split(house.END)[0].strip()
  if f"Python {platform.python_version()[:4]}, jax {jax.__version__} " not in page:
    pytest.skip("the page is of other versions")
  # In a process of its own, where nothing has been traced.
  code = "from benchmarks import house; print(house.table())"
  found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert found.stdout.strip() == page


def test_lines_are_counted_without_comments_and_docstrings(tmp_path):
  path = tmp_path / "one.py"
  docstrings, comment = '"""Of two\n\nlines."""\n', "# why\n\n"
  path.write_text(docstrings + comment + 'x = """a\nb"""\ndef f():\n  """Doc."""\n  return x\n')
  assert house.code_lines(path) == 4
