"""The same numbers however many devices share the work, and in which of the three ways."""

import functools
import itertools
import json
import logging
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from configs import digits
from examples import data, parallelism, steps
from tests.examples import helpers, one_of_two

MODES = list(parallelism.MODES)

# Sums over a batch are taken in another order on another number of devices: a relative
# error of some 2**-24 a sum, which a few steps at learning rate 0.1 may enlarge tenfold.
REORDERED = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def one_device():
  return helpers.Job(helpers.config(model="vgg", parallelism="jit"), 1).train(4)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_training_gives_the_same_numbers_on_1_2_4_and_8_devices(mode, count, one_device):
  state, results = helpers.Job(helpers.config(model="vgg", parallelism=mode), count).train(4)
  expected, expected_results = one_device
  chex.assert_trees_all_close(state._asdict(), expected._asdict(), **REORDERED)
  losses = helpers.mean_losses(results)
  assert len(set(losses)) == 4
  np.testing.assert_allclose(losses, helpers.mean_losses(expected_results), rtol=1e-5)


def test_loss_curves_of_the_three_modes_agree_over_50_steps():
  """The main job on real data: nothing amplifies the different orders of sums beyond 1e-4."""
  config = digits.get_config()
  dataset = data.load("digits")
  curves = {}
  for mode in MODES:
    config.parallelism = mode
    batches = data.train_batches(dataset, config.batch_size, seed=config.seed)
    results = helpers.Job(config, 4).train(itertools.islice(batches, 50))[1]
    batches.close()
    curves[mode] = helpers.mean_losses(results)
  assert curves["jit"][-1] < 0.8 * curves["jit"][0]  # they do go down
  for mode in MODES:
    np.testing.assert_allclose(curves[mode], curves["pmap"], rtol=1e-4, err_msg=mode)


@pytest.mark.parametrize("mode", MODES)
def test_both_steps_compile_once_and_the_old_state_is_given_away(mode, caplog):
  job = helpers.Job(helpers.config(model="mlp", parallelism=mode), 4)
  chex.clear_trace_counter()

  @chex.assert_max_traces(n=1)
  def train_body(*args, **kwargs):
    return job.train_body(*args, **kwargs)

  @chex.assert_max_traces(n=1)
  def eval_body(*args, **kwargs):
    return job.eval_body(*args, **kwargs)

  train = job.parallel.step(train_body, donate_state=True)
  evaluate = job.parallel.step(eval_body)
  state = job.parallel.replicate(job.state)
  with caplog.at_level(logging.WARNING), jax.log_compiles():
    for i in range(3):
      batch, before = job.parallel.shard(helpers.batch(32, seed=i)), state
      state, _ = train(before, batch)
      evaluate(state, batch)
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
  # One trace may still be compiled twice, for arguments that are placed differently.
  compiled = [
    r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()
  ]
  assert len(compiled) == 2, compiled


@pytest.mark.parametrize("mode", MODES)
def test_every_device_has_the_same_state(mode):
  job = helpers.Job(helpers.config(model="mlp", blocks=(2,), parallelism=mode), 4)
  step, state = job.parallel.step(job.train_body), job.parallel.replicate(job.state)
  for i in range(2):
    state, _ = step(state, job.parallel.shard(helpers.batch(32, seed=i)))
  assert jax.tree.leaves(state.batch_stats)
  for leaf in jax.tree.leaves(state):
    first, *others = leaf.addressable_shards
    assert len(others) == 3
    for other in others:
      np.testing.assert_array_equal(other.data, first.data)


def test_shard_map_checks_that_a_state_is_the_same_on_every_device():
  parallel = parallelism.create(helpers.config(parallelism="shard_map"), jax.devices()[:4])
  step = parallel.step(lambda state, batch, axis_name: state + batch["x"].sum())
  with pytest.raises(ValueError, match="out_specs"):
    step(parallel.replicate(np.float32(1)), parallel.shard({"x": np.ones(8, np.float32)}))


@pytest.mark.parametrize("mode", MODES)
def test_examples_are_dealt_out_in_order(mode):
  helper = parallelism.MODES[mode](jax.devices()[:4])
  shards = helper.shard({"x": np.arange(8)})["x"].addressable_shards
  assert [s.device for s in shards] == jax.devices()[:4]
  assert [np.ravel(s.data).tolist() for s in shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("mode", MODES)
def test_unreplicate_copies(mode):
  placed = parallelism.MODES[mode](jax.devices()[:4]).replicate({"x": np.arange(3.0)})
  copy = steps.unreplicate(placed)["x"]
  assert copy.base is None
  np.testing.assert_array_equal(copy, [0.0, 1.0, 2.0])


@pytest.mark.parametrize("mode", MODES)
def test_devices_with_fewer_valid_examples_or_none_count_for_what_they_have(mode):
  """As if the invalid ones, NaN here, were not there: on one device they are not."""
  per_device = [[8, 3, 0, 1], [0, 0, 5, 7], [1, 8, 2, 1]]
  whole, ragged = [], []
  for seed, counts in enumerate(per_device):
    batch = helpers.batch(32, seed)
    batch["mask"] = (np.arange(8) < np.array(counts)[:, None]).ravel()
    whole.append({key: x[batch["mask"]] for key, x in batch.items() if key != "mask"})
    batch["image"][~batch["mask"]] = np.nan
    ragged.append(batch)
  config = helpers.config(model="vgg", parallelism="jit")
  expected, expected_results = helpers.Job(config, 1).train(whole)
  config.parallelism = mode
  state, results = helpers.Job(config, 4).train(ragged)
  chex.assert_trees_all_close(state._asdict(), expected._asdict(), **REORDERED)
  for sums, wanted in zip(results, expected_results, strict=True):
    np.testing.assert_allclose(sums.loss, wanted.loss, rtol=1e-5)
    assert (int(sums.correct), int(sums.count)) == (int(wanted.correct), 12)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_valid_examples_teaches_nothing(mode):
  config = helpers.config(model="mlp", parallelism=mode, weight_decay=0.0)
  nothing = helpers.batch(32) | {"mask": np.zeros(32, bool)}
  job = helpers.Job(config, 4)
  state, (sums,) = job.train([nothing])
  chex.assert_trees_all_equal(state.params, jax.device_get(job.state.params))
  chex.assert_trees_all_equal(state.batch_stats, jax.device_get(job.state.batch_stats))
  assert (float(sums.loss), int(sums.count)) == (0.0, 0)


def test_two_processes_with_two_devices_are_one_with_four():
  """Each has its half of a batch only; both end with the same state."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "tests.examples.one_of_two", str(port)]
  processes = [
    subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
  assert first == second
  state, results = helpers.Job(one_of_two.config("jit"), 4).train(one_of_two.STEPS)
  for mode in MODES:
    losses, kernel = first[mode]
    np.testing.assert_allclose(losses, helpers.mean_losses(results), rtol=1e-5)
    np.testing.assert_allclose(kernel, state.params["head"]["kernel"], **REORDERED)


@functools.cache
def trained_in_groups(mode, count, size):
  config = helpers.config(model="mlp", virtual_batch_size=size, microbatches=2, parallelism=mode)
  return helpers.Job(config, count).train(2)[0]


@pytest.mark.parametrize("size", ["2", "8"])
@pytest.mark.parametrize(
  ("mode", "counts"), [("pmap", (2, 8)), ("shard_map", (8, 2)), ("jit", (2, 8))]
)
def test_virtual_batches_do_not_depend_on_the_devices(mode, counts, size):
  """Groups within a device, and of several: of the 16 examples of a microbatch, in order.

  Each mode with both sizes and both numbers of devices, though not with each pair of them.
  """
  alone = trained_in_groups("jit", 1, size)
  state = trained_in_groups(mode, counts[size == "8"], size)
  chex.assert_trees_all_close(state._asdict(), alone._asdict(), **REORDERED)
  other = trained_in_groups("jit", 1, "global")
  difference = other.params["head"]["kernel"] - state.params["head"]["kernel"]
  assert np.abs(difference).max() > 1e-4
