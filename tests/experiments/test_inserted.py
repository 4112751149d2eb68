"""Batch norm enters a trained VGG: the experiment in little, and its page."""

import json

import numpy as np
import pytest

from benchmarks import results as stored
from examples import insert
from experiments import experiment, inserted
from experiments.inserted_runs import INSERTED, PLAIN, RESET, Plan, measure

PLAN = Plan("digits", (8,), (1,), 2, (0.01,))


@pytest.fixture(scope="module")
def found():
  with pytest.MonkeyPatch.context() as patch:
    for name, value in {"STEPS": 10, "TEST_EVERY": 5, "LAST": 2, "BEFORE": 0.03}.items():
      patch.setattr(insert, name, value)
    rows = json.loads(json.dumps(measure(PLAN), allow_nan=False))
  return stored.made("inserted", "a command", rows)


def test_all_go_on_from_what_was_trained_but_those_that_are_not_set(found):
  plain, normed, reset = (inserted.runs(found, side)[1] for side in (PLAIN, INSERTED, RESET))
  np.testing.assert_array_equal(plain[:, 0], normed[:, 0])
  assert len(set(plain[:, 0])) == 2  # a network for each seed
  assert np.all(reset[:, 0] != plain[:, 0])
  assert inserted.largest(found, "evaluation") < 1e-4 < inserted.largest(found, "training")


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(inserted.EXPERIMENT, found, tmp_path)
  page = (tmp_path / "inserted.md").read_text()
  assert inserted.verdict(found) in page
  assert (tmp_path / "inserted.png").stat().st_size > 10_000
