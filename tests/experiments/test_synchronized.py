"""Whose statistics normalize: simulated devices, and what the page makes of it."""

import json

import jax
import numpy as np
import pytest

from benchmarks import results as stored
from experiments import experiment, synchronized
from experiments.classification import recipe
from experiments.splits import splits
from experiments.synchronized_runs import LOCAL, RENORM, SHARED, Plan, network

PLAN = Plan("digits", (8,), (2, 8), 16, 40, 20, 20, 2, (0.1, 1.0))


def trained(side, elements, steps=3):
  """Parameters and statistics after some steps."""
  made = recipe(network(PLAN, side, elements), "digits")
  carry, step = jax.jit(made.start)(jax.random.key(0)), jax.jit(made.step)
  for first in range(0, steps * 16, 16):
    carry = step(carry, 1.0, np.arange(first, first + 16))
  return carry[0]


@pytest.fixture(scope="module")
def networks():
  return {(side, n): trained(side, n) for side in (LOCAL, SHARED) for n in (2, 8)}


def test_synchronized_does_not_depend_on_the_number_of_devices(networks):
  few, many = networks[SHARED, 8]["params"], networks[SHARED, 2]["params"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), few, many)


def test_local_ones_do_and_are_of_their_device(networks):
  few, many = networks[LOCAL, 8]["params"], networks[LOCAL, 2]["params"]
  kernels = [jax.tree.leaves(params)[-1] for params in (few, many)]
  assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
  for (side, n), variables in networks.items():
    means = next(
      leaf
      for path, leaf in jax.tree.leaves_with_path(variables["batch_stats"])
      if path[-1].key == "mean"
    )
    assert means.shape == (16 // n, 8)
    assert (np.ptp(means, axis=0).max() < 1e-6) == (side == SHARED)


def test_evaluation_is_by_all_statistics_together(networks):
  images = splits("digits")["test"].images[:5]
  variables = networks[SHARED, 8]
  logits = network(PLAN, SHARED, 8).apply(variables, images, False)
  one = jax.tree.map(lambda leaf: leaf[:1], variables["batch_stats"])
  alone = network(PLAN, LOCAL, 16).apply({**variables, "batch_stats": one}, images, False)
  np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)


def made_up(accuracies):
  """Rows of two seeds, by side and elements."""
  for (side, elements), accuracy in accuracies.items():
    head = {"side": side, "elements": elements, "rate": 1.0}
    yield {"kind": "grid", **head, "validation": [accuracy, accuracy]}
    for seed, change in enumerate((-0.001, 0.001)):
      yield {"kind": "run", **head, "seed": seed, "test": [0.1, accuracy + change, accuracy]}


def test_the_page_says_from_where_on_local_ones_are_enough(tmp_path):
  accuracies = {(SHARED, 2): 0.85, (LOCAL, 2): 0.4, (LOCAL, 8): 0.8, (LOCAL, 32): 0.845}
  accuracies |= {(RENORM, 2): 0.6, (RENORM, 8): 0.845, (RENORM, 32): 0.835}
  rows = json.loads(json.dumps(list(made_up(accuracies)), allow_nan=False))
  found = stored.made("synchronized", "python -m experiments.synchronized --full", rows)
  assert synchronized.enough(found, LOCAL) == 32
  assert synchronized.enough(found, RENORM) is None  # not at 32 again
  experiment.show(synchronized.EXPERIMENT, found, tmp_path)
  page = (tmp_path / "synchronized.md").read_text()
  assert "local statistics from 32 on and batch renorm at none" in page
  assert "three layers of 128 ReLUs" in page  # as `--full` has it
  assert "standard deviation of 2 seeds" in page
  assert (tmp_path / "synchronized.png").stat().st_size > 10_000
