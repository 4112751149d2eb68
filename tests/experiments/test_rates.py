"""Rates, depths and dropout: the networks that are compared, and what is made of accuracies."""

import json

import jax
import numpy as np
import pytest

from benchmarks import results as stored
from experiments import experiment, rates
from experiments.rates_runs import LARGER, NORMALIZED, PLAIN, Plan, Training, cases, trained
from experiments.training import highest

TRAINING = Training((0.1, 1.0), 20, 40, 20, "digits", 20, 2)
PLAN = Plan(TRAINING, TRAINING, TRAINING, 8, 1, (1, 2), (0.0, 0.5), 40)
CASES = list(cases(PLAN))
# By part and side: which networks these stand for, and how good they are.
ACCURACIES = {
  ("rates", PLAIN): 0.8,
  ("rates", NORMALIZED): 0.9,
  ("depth", PLAIN): 0.1,
  ("depth", NORMALIZED): 0.7,
  ("depth", LARGER): 0.6,
  ("dropout", PLAIN): 0.8,
  ("dropout", NORMALIZED): 0.9,
}


def made_up(case):
  """Rows as a training leaves them; half of dropout helps only without batch norm."""
  accuracy = ACCURACIES[case.part, case.side]
  if case.setting == 0.5:
    accuracy += 0.05 if case.side == PLAIN else -0.05
  head = {"side": case.side, "part": case.part, "setting": case.setting}
  for rate in (1.0, 3.0):
    good = rate == 1 or case.side == NORMALIZED
    yield {"kind": "grid", **head, "rate": rate, "validation": [accuracy if good else None] * 2}
  for seed in range(2):
    seen = {name: [0.1, accuracy] for name in ("test", "train", "validation")}
    yield {"kind": "run", **head, "rate": 1.0, "seed": seed, "every": 20, **seen}


@pytest.fixture(scope="module")
def found():
  return stored.made("rates", "a command", [row for case in CASES for row in made_up(case)])


def test_the_rows_are_those_of_a_training():
  case = next(c for c in CASES if c.part == "dropout" and c.setting and c.side == NORMALIZED)
  rows = json.loads(json.dumps(trained(PLAN, case), allow_nan=False))
  assert [row.keys() for row in rows] == [row.keys() for row in made_up(case)]
  ends = np.array([row["train"] for row in rows if row["kind"] == "run"])
  assert ends.shape == (2, 3)
  assert np.all(ends[:, -1] > ends[:, 0])


def test_the_sides_differ_in_nothing_else():
  plain, normalized, larger = (c for c in CASES if c.part == "depth" and c.setting == 2)
  x = np.ones((2, 64), np.float32)
  of = [c.model.init(jax.random.key(0), x, False)["params"] for c in (plain, normalized, larger)]
  for layer in ("Dense_0", "Dense_1", "Dense_2"):
    kernels = [params[layer]["kernel"] for params in of]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    np.testing.assert_allclose(4 * kernels[0], kernels[2], rtol=1e-6)
  assert "BatchNorm_1" in of[1]
  assert "BatchNorm_0" not in of[2]


def test_the_highest_rate_is_as_good_as_the_best_and_did_not_diverge():
  accuracies = np.array([[0.7, 0.7], [0.9, 0.9], [0.89, 0.88], [0.9, np.nan]])
  assert highest(np.array([1.0, 2.0, 3.0, 4.0]), accuracies) == 3


def test_the_page_and_the_figure_show_it(found, tmp_path):
  assert [highest(*rates.grid(found, side)) for side in rates.SIDES] == [1, 3]
  gains = [rates.gain(found, side) for side in rates.SIDES]
  np.testing.assert_allclose(gains, [[5, 5], [-5, -5]])
  experiment.show(rates.EXPERIMENT, found, tmp_path)
  page = (tmp_path / "rates.md").read_text()
  assert rates.verdict(found) in page
  assert "3 times as high" in rates.verdict(found)
  assert (tmp_path / "rates.png").stat().st_size > 10_000
