"""The factors of exploding gradients, in little."""

import json

import numpy as np
import pytest

from benchmarks import results as stored
from experiments import depth, experiment, mean_field

PLAN = depth.Plan("digits", 10, (96,), (48,), 2)


@pytest.fixture(scope="module")
def found():
  rows = json.loads(json.dumps(depth.measure(PLAN), allow_nan=False))
  return stored.made("depth", "a command", rows)


def test_a_rate_is_the_factor_to_the_layer_before():
  assert depth.rate([3.0**-i for i in range(12)]) == pytest.approx(3)


def test_relu_explodes_and_skip_connections_tame_it(found):
  relu, skip, linear = (
    np.mean(depth.rates(found, kind=kind, width=96, batch_size=48))
    for kind in (depth.RELU, depth.SKIP, depth.LINEAR)
  )
  assert abs(relu - mean_field.RELU_LIMIT) < 0.2
  assert skip < 1.3 < relu
  assert abs(linear - mean_field.linear(48)) < 0.15


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(depth.EXPERIMENT, found, tmp_path)
  assert depth.verdict(found) in (tmp_path / "depth.md").read_text()
  assert (tmp_path / "depth.png").stat().st_size > 10_000
