"""What the README shows runs, and the figures in it are those that its command prints."""

import math
import pathlib
import re

import pytest

from benchmarks import exactness

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ROW = r"\| (.+?) +\| +(\S+) +\| +(\S+) +\|"


@pytest.mark.parametrize("block", BLOCKS, ids=["plain JAX", "Flax", "groups", "a variant"])
def test_its_examples_run(block):
  names = {}
  exec(block, names)
  y = names["y"]
  assert abs(float(y.mean())) < 1
  assert y.shape[:-1] == names["x"].shape[:-1]


def test_its_table_is_what_the_command_prints():
  printed = {case: (flax, ours) for case, flax, ours in exactness.rows()}
  shown = {m[0]: m[1:] for m in re.findall(ROW, README) if m[0] in printed}
  assert shown.keys() == printed.keys()
  for case, figures in shown.items():
    for said, measured in zip(map(float, figures), printed[case], strict=True):
      # Rounding errors differ between processors; their size does not.
      same = math.isnan(said) and math.isnan(measured)
      assert same or measured / 3 <= said <= 3 * measured, case
