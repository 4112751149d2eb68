"""Recurrent batch normalization on digits: the experiment in little, and its page."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import results as stored
from experiments import experiment, recurrent, recurrent_runs
from experiments.splits import batches, splits

PLAN = recurrent_runs.Plan(units=8, batch_size=64)


def test_sequences_hold_all_pixels_in_the_task_s_order():
  images = np.arange(2 * 8 * 8).reshape(2, 8, 8, 1)
  rows, pixels, permuted = (recurrent_runs.sequences(task, images) for task in recurrent_runs.TASKS)
  np.testing.assert_array_equal(rows[1, 2], images[1, 2, :, 0])
  np.testing.assert_array_equal(pixels[1, :, 0], np.arange(64, 128))
  assert not np.array_equal(permuted, pixels)
  np.testing.assert_array_equal(np.sort(permuted, 1), pixels)
  np.testing.assert_array_equal(permuted[1] - permuted[0], 64)  # one order for all


@pytest.mark.parametrize("method", recurrent_runs.METHODS)
def test_all_methods_have_the_same_start(method):
  """The same kernels' shapes and forget gates, and a scale only where something is normalized."""
  model = recurrent_runs.Classifier(method, 5, 3)
  x, noise = jnp.ones((4, 3, 2)), 0.1 * jax.random.normal(jax.random.key(1), (4, 5))
  params = model.init(jax.random.key(0), x, noise, True)["params"]
  leaves = jax.tree.leaves_with_path(params)
  shapes = sorted(np.shape(leaf) for _, leaf in leaves if np.ndim(leaf) == 2)
  assert shapes == [(2, 20), (5, 10), (5, 20)]
  (bias,) = (
    leaf for _, leaf in leaves if np.shape(leaf) == (20,) and set(np.ravel(leaf)) == {0, 1}
  )
  np.testing.assert_array_equal(bias, np.repeat([0, 1, 0, 0], 5))
  scales = [np.unique(leaf) for path, leaf in leaves if "scale" in jax.tree_util.keystr(path)]
  gain = {"LSTM": [], "layer norm": [1.0] * 3, "batch norm, 0.1": [0.1] * 3}
  np.testing.assert_allclose(np.ravel(scales), gain.get(method, [1.0] * 3), rtol=1e-6)


def test_it_learns_and_is_evaluated_by_the_statistics_of_its_parameters():
  made = recurrent_runs.recipe(recurrent_runs.GAIN_SMALL, recurrent_runs.ROWS, PLAN)
  carry, step, look = jax.jit(made.start)(jax.random.key(0)), jax.jit(made.step), jax.jit(made.look)
  before = look(carry)
  order = batches(False, splits("digits")["train"].labels, PLAN.batch_size, 30, 0)
  for batch in jnp.asarray(order):
    carry = step(carry, 0.03, batch)
  after = look(carry)
  assert after.keys() == {"validation", "test"}
  assert after["validation"] > before["validation"] + 0.2


def runs(method, accuracies):
  """Of two seeds, the first look at the start."""
  return [
    {"kind": "run", "side": method, "task": "t", "rate": 1, "every": 10, "test": [None, *a]}
    for a in accuracies
  ]


def test_a_difference_within_the_spread_is_called_that(tmp_path):
  rows = [
    *runs(recurrent_runs.PLAIN, [[0.5, 0.80], [0.5, 0.90]]),
    *runs(recurrent_runs.LAYER, [[0.1, 0.20], [0.1, 0.21]]),
    *runs(recurrent_runs.GAIN_SMALL, [[0.9, 0.88], [0.9, 0.90]]),
    *runs(recurrent_runs.GAIN_ONE, [[0.2, 0.40], [0.2, 0.42]]),
  ]
  found = stored.made("recurrent", "a command", rows)
  plain, layer, gain = recurrent.verdicts(found)
  assert "t +4.0 (within the spread) in the end and +22.0 over the training" in plain
  assert "t +68.5 in the end" in layer
  assert "t +48.0 in the end" in gain
  assert recurrent.verdict(found).endswith("it learns t.")
  experiment.show(recurrent.EXPERIMENT, found, tmp_path)
  page = (tmp_path / "recurrent.md").read_text()
  assert recurrent.verdict(found) in page
  assert "frame-wise" in page
  assert (tmp_path / "recurrent.png").stat().st_size > 10_000
