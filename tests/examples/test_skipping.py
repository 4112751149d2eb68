"""Steps that are skipped because numbers ran out: nothing remembers them but the counters."""

import chex
import jax
import numpy as np
import optax
import pytest

from examples import parallelism
from tests.examples import helpers

MODES = list(parallelism.MODES)
COUNTERS = ("step", "loss_scale", "good_steps", "notfinite_count", "last_finite", "total_notfinite")


def poisoned(seed=7, value=np.nan):
  """A batch with one bad pixel."""
  batch = helpers.batch(32, seed)
  batch["image"][17, 3, 4] = value
  return batch


def learned(state):
  """The state without its counters."""
  return optax.tree.set(state, **{name: None for name in COUNTERS if in_tree(state, name)})


def in_tree(state, name):
  return bool(optax.tree.get_all_with_path(state, name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
  "changes",
  [
    {"skip_nonfinite": 2},
    {"skip_nonfinite": 2, "microbatches": 2},
    {"skip_nonfinite": 2, "microbatches": 2, "microbatch_statistics": "merged"},
    {"loss_scale": 128.0, "dtype": "float16", "optimizer": "adamw", "learning_rate": 1e-2},
  ],
  ids=["plain", "each", "merged", "float16"],
)
def test_a_batch_with_nan_leaves_no_trace(mode, changes):
  job = helpers.Job(helpers.config(model="mlp", parallelism=mode, **changes), 4)
  good = [helpers.batch(32, seed) for seed in range(3)]
  without, _ = job.train(good)
  state, results = job.train([good[0], poisoned(), poisoned(), good[1], good[2]])
  assert [int(sums.skipped) for sums in results] == [0, 1, 1, 0, 0]
  assert [int(sums.count) for sums in results] == [32, 0, 0, 32, 32]
  assert np.isfinite([sums.loss for sums in results]).all()
  assert int(state.step) == 5
  assert optax.tree.get(state.opt_state, "total_notfinite") == 2
  chex.assert_trees_all_equal(learned(state)._asdict(), learned(without)._asdict())


@pytest.mark.parametrize("mode", MODES)
def test_statistics_that_overflow_are_a_reason_as_well(mode):
  """The variance overflows, and the output, divided by it, is merely 0."""
  config = helpers.config(model="mlp", skip_nonfinite=1, parallelism=mode)
  job = helpers.Job(config, 4)
  state, (sums,) = job.train([poisoned(value=1e25)])
  assert int(sums.skipped) == 1
  chex.assert_trees_all_equal(state.batch_stats, jax.device_get(job.state.batch_stats))


def test_more_in_a_row_than_allowed_are_not_hidden():
  job = helpers.Job(helpers.config(model="mlp", skip_nonfinite=2), 4)
  _, results = job.train([poisoned(), poisoned(), helpers.batch(32), *[poisoned()] * 3])
  assert [int(sums.skipped) for sums in results] == [1, 1, 0, 1, 1, 0]
  assert np.isnan(results[-1].loss)


def test_nothing_is_skipped_by_default():
  job = helpers.Job(helpers.config(model="mlp"), 4)
  state, (sums,) = job.train([poisoned()])
  assert int(sums.skipped) == 0
  assert np.isnan(sums.loss)
  assert np.isnan(state.params["head"]["kernel"]).any()


def test_float16_overflows_until_the_scale_fits():
  """Real overflow: the largest scale is halved until the gradients fit, then float16 trains."""
  config = helpers.config(model="vgg", dtype="float16", loss_scale=2.0**24)
  job = helpers.Job(config, 4)
  state, results = job.train([helpers.batch(32)] * 20)
  skipped = [int(sums.skipped) for sums in results]
  halvings = sum(skipped)
  assert 1 <= halvings < 15
  assert skipped == [1] * halvings + [0] * (20 - halvings)
  assert optax.tree.get(state.opt_state, "loss_scale") == 2.0 ** (24 - halvings)
  steps = 20 - halvings
  single = helpers.Job(helpers.config(model="vgg"), 4).train([helpers.batch(32)] * steps)[1]
  half = helpers.mean_losses(results[halvings:])
  # float16 rounds each of a handful of layers by 2**-11.
  np.testing.assert_allclose(half, helpers.mean_losses(single), rtol=10 * 2**-11)
