"""The experiments' frame, by the first of them in little."""

import itertools
import json

import numpy as np
import pytest

from benchmarks import results as stored
from experiments import experiment, faster
from experiments.training import best

PLAN = faster.Plan("digits", 8, 20, 100, 20, 20, 2, (0.1, 1.0))


@pytest.fixture(scope="module")
def found():
  rows = json.loads(json.dumps(faster.measure(PLAN), allow_nan=False))
  return stored.made("faster", "a command", rows)


def test_both_sides_try_the_same_rates_and_keep_the_best(found):
  grid = stored.of(found["rows"], kind="grid")
  tried = [(row["start"], row["side"], row["rate"]) for row in grid]
  assert tried == list(itertools.product(faster.STARTS, faster.SIDES, PLAN.rates))
  for start, side in itertools.product(faster.STARTS, faster.SIDES):
    who = {"start": start, "side": side}
    means = {r["rate"]: np.mean(r["validation"]) for r in stored.of(grid, **who)}
    runs = stored.of(found["rows"], kind="run", **who)
    assert {r["rate"] for r in runs} == {max(means, key=means.get)}
    assert [len(r["test"]) for r in runs] == [6, 6]


def test_a_run_that_diverged_is_never_the_best():
  assert best(np.array([[np.nan, np.nan], [0.2, 0.1], [0.9, np.nan]])) == 2


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(faster.EXPERIMENT, found, tmp_path)
  page = (tmp_path / "faster.md").read_text()
  assert faster.verdict(found) in page
  assert "a command" in page
  assert (tmp_path / "faster.png").stat().st_size > 10_000


def test_the_factor_counts_from_the_first_look_as_good():
  def run(side, test):
    head = {"kind": "run", "start": faster.PAPER, "side": side, "every": 10, "rate": 1}
    return {**head, "test": [0.1, 0.1, 0.1, 0.1, *test]}

  rows = [
    run("without", [0.1, 0.5, 0.7, 0.6]),
    run("without", [0.1, 0.5, 0.7, 0.6]),
    run("with batch norm", [0.9, 0.9, 0.6, 0.9]),
    run("with batch norm", [0.1, 0.1, 0.1, 0.1]),
  ]
  when, as_good = faster.sooner({"rows": rows}, faster.PAPER)
  assert when.tolist() == [70, 70]
  assert as_good.tolist() == [50, np.inf]
