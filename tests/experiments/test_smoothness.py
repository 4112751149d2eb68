"""Smoothness, shift and speed, in little."""

import json

import numpy as np
import pytest

from benchmarks import results as stored
from experiments import experiment, landscape, smoothness

PLAN = smoothness.Plan("digits", 2, 8, 20, 20, 10, 10, 2, (0.1,))


@pytest.fixture(scope="module")
def found():
  """Rows as `measure` makes them: of one side they are real, and stand for the others, too."""
  model = landscape.Network(landscape.SHIFTED, PLAN.layers, PLAN.width)
  rows = json.loads(json.dumps(smoothness.measures(model, PLAN), allow_nan=False))
  runs = [{"kind": "run", "rate": 0.1, "test": [0.1, 0.5 + row["seed"] / 10]} for row in rows]
  grid = {"kind": "grid", "rate": 0.1, "validation": [0.5, 0.6]}
  sides = [{**row, "side": s} for row in [*runs, grid, *rows] for s in smoothness.COLOURS]
  return stored.made("smoothness", "a command", sides)


def test_each_network_has_a_shift_and_an_angle(found):
  assert (experiment.looks(found, "shift", "measured", side=landscape.SHIFTED) > 0).all()
  angles = experiment.looks(found, "angle", "measured", side=landscape.SHIFTED)
  assert ((angles > 0) & (angles < np.pi)).all()


def test_agreement_counts_clear_pairs_in_which_the_faster_is_smoother():
  def agreement(what, noise):
    rows = []
    for i, side in enumerate(smoothness.COLOURS):
      rows += [{"kind": "run", "side": side, "test": [0, i / 4 + n]} for n in (-noise, noise)]
      rows.append({"kind": "measured", "side": side, "beta": [0, -i], "shift": [0, i]})
    return smoothness.agreement({"rows": rows}, what)

  assert agreement("beta", 0.01) == 6
  assert agreement("shift", 0.01) == 0
  assert agreement("beta", 1.0) == 0


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(smoothness.EXPERIMENT, found, tmp_path)
  assert smoothness.verdict(found) in (tmp_path / "smoothness.md").read_text()
  assert (tmp_path / "smoothness.png").stat().st_size > 10_000
