"""What the README shows trains, and the figures in it are those that its command prints."""

import math
import pathlib
import re

import jax
import numpy as np
import pytest

from benchmarks import exactness
from tests.bare import blocks

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROW = r"\| (.+?) +\| +(\S+) +\| +(\S+) +\|"


@pytest.fixture(scope="module")
def results():
  """What the blocks leave behind, each run where those before it were."""
  names, results = {}, []
  for block in blocks(README):
    exec(block, names)
    results.append(
      {k: names.get(k) for k in ("value", "accuracy", "params", "state", "losses", "y")}
    )
  return results


def test_its_networks_learn(results):
  for block in results[:2]:
    assert block["accuracy"] > 0.95
    assert block["value"] < 0.2


def test_its_three_loops_on_all_devices_end_alike(results):
  pmap, *others = results[2:5]
  assert pmap["losses"][-1] < 0.95 * pmap["losses"][0]
  for other in others:
    # A hundred steps of rounding.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
      [pmap[k] for k in ("losses", "params", "state")],
      [other[k] for k in ("losses", "params", "state")],
    )


def test_its_other_loops_track(results):
  for block in results[5:7]:
    np.testing.assert_allclose(block["y"].mean(0), 0, atol=0.3)
    assert block["state"].mean.shape == (16,)


def test_its_surgery_leaves_no_norm_and_the_same_output(results):
  assert results[7]["y"].shape == (32 * jax.device_count(), 1)
  assert len(results) == 8


def test_its_links_lead_to_files():
  home = r"https://(?:raw\.githubusercontent|github)\.com/jaxbn/jaxbn/(?:blob/)?main/"
  links = re.findall(home + r"([^)]+)\)", README)
  assert links
  for link in links:
    assert (ROOT / link).exists(), link


def test_its_table_is_what_the_command_prints():
  printed = {case: (flax, ours) for case, flax, ours in exactness.rows()}
  shown = {m[0]: m[1:] for m in re.findall(ROW, README) if m[0] in printed}
  assert shown.keys() == printed.keys()
  for case, figures in shown.items():
    for said, measured in zip(map(float, figures), printed[case], strict=True):
      # Rounding errors differ between processors; their size does not.
      same = math.isnan(said) and math.isnan(measured)
      assert same or measured / 3 <= said <= 3 * measured, case
