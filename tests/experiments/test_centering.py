"""The bias that grows, in little: by the paper's layer alone, and in networks."""

import json

import numpy as np
import pytest

from benchmarks import results as stored
from experiments import centering, experiment
from experiments.centering_runs import CENTRED, CONSTANT_MEAN, CONSTANTS, NORM, Plan, measure

PLAN = Plan("digits", 4, 1, 20, 20, 10, 2, centering.SHOWN, 50, 20, 10)


@pytest.fixture(scope="module")
def found():
  rows = json.loads(json.dumps(measure(PLAN), allow_nan=False))
  return stored.made("centering", "a command", rows)


@pytest.mark.parametrize("rate", PLAN.rates)
def test_the_bias_grows_at_constant_speed_and_the_loss_stays(found, rate):
  seen = lambda side, what: centering.seen(found, "alone", side, rate, what)  # noqa: E731
  grown = seen(CONSTANT_MEAN, "biases")
  assert np.all(grown[:, -1] > 0.1 * rate)
  np.testing.assert_allclose(grown[:, 2], 2 * grown[:, 1], rtol=1e-3)
  assert np.all(seen(CENTRED, "biases") < 1e-4 * grown[:, -1:])
  for side in (CENTRED, CONSTANT_MEAN):
    losses = seen(side, "loss")
    np.testing.assert_allclose(losses, np.repeat(losses[:, :1], 3, 1), rtol=1e-4)


def test_in_networks_only_batch_norm_leaves_its_biases(found):
  rate = PLAN.rates[0]
  grown, still = (centering.seen(found, "run", side, rate, "biases") for side in (CONSTANTS, NORM))
  assert np.all(grown[:, -1] > 1e-3)
  assert np.all(still < 1e-6)


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(centering.EXPERIMENT, found, tmp_path)
  page = (tmp_path / "centering.md").read_text()
  assert centering.verdict(found) in page
  assert (tmp_path / "centering.png").stat().st_size > 10_000
