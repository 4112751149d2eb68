"""Accumulation: what each of the two kinds computes, and what it needs."""

import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import microbatches, parallelism, steps
from tests.examples import helpers
from tests.examples.test_parallelism import REORDERED

MODES = list(parallelism.MODES)


def test_one_microbatch_is_a_step_without():
  """The same program, so bit for bit the same."""
  for statistics in ("each", "merged"):
    assert microbatches.create(1, statistics) is microbatches.whole
    assert microbatches.axes("batch", 1, statistics) == "batch"
    assert microbatches.axes(None, 1, statistics) is None
  assert inspect.signature(steps.train_step).parameters["accumulate"].default is microbatches.whole


@pytest.fixture(scope="module")
def whole():
  """Without accumulation; test_parallelism.py says that it is the same in each mode."""
  return helpers.Job(helpers.config(model="vgg", parallelism="jit"), 4).train(3)[0]


@pytest.mark.parametrize("mode", MODES)
def test_merged_statistics_give_the_step_without_accumulation(mode, whole):
  changes = {"model": "vgg", "microbatches": 4, "microbatch_statistics": "merged"}
  merged, _ = helpers.Job(helpers.config(parallelism=mode, **changes), 4).train(3)
  chex.assert_trees_all_close(merged._asdict(), whole._asdict(), **REORDERED)


def loop(job, batches, count):
  """Accumulation by hand, on one device, with nothing in it but the valid examples."""

  def loss_fn(params, batch_stats, part):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = job.model.apply(variables, part["image"], train=True, mutable="batch_stats")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, part["label"])
    return losses.sum(), new["batch_stats"]

  def mean(trees, number):
    return jax.tree.map(lambda *leaves: sum(leaves) / number, *trees)

  grad = jax.jit(jax.grad(loss_fn, has_aux=True))
  state = job.state
  for batch in batches:
    parts = [
      {key: x[k::count][batch["mask"][k::count]] for key, x in batch.items()} for k in range(count)
    ]
    found = [grad(state.params, state.batch_stats, part) for part in parts if len(part["label"])]
    grads, stats = zip(*found, strict=True)
    grads, stats = mean(grads, batch["mask"].sum()), mean(stats, len(stats))
    updates, opt_state = job.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = steps.TrainState(state.step + 1, params, stats, opt_state)
  return state


def uneven(seed, valid):
  """A batch of which `valid` examples are, with NaN for the others."""
  batch = helpers.batch(32, seed)
  batch["mask"][:] = False
  batch["mask"][valid] = True
  batch["image"][~batch["mask"]] = np.nan
  return batch


@pytest.fixture(scope="module")
def by_hand():
  batches = [
    helpers.batch(32),
    uneven(1, [*range(13), 14, 16, 17, 20]),  # 6, 4, 4 and 3 of a microbatch, none of a device
    uneven(2, [1, 5, 9, 17, 21]),  # of one microbatch only
  ]
  job = helpers.Job(helpers.config(model="mlp", blocks=(2,), parallelism="jit"), 1)
  return batches, loop(job, batches, 4)


@pytest.mark.parametrize("mode", MODES)
def test_each_is_a_loop_over_microbatches(mode, by_hand):
  """With one update of the running statistics, by the mean of those that have examples."""
  batches, expected = by_hand
  config = helpers.config(model="mlp", blocks=(2,), parallelism=mode, microbatches=4)
  state, _ = helpers.Job(config, 4).train(batches)
  chex.assert_trees_all_close(state._asdict(), expected._asdict(), **REORDERED)


def compiled(mode, **changes):
  """The step on 4 devices with 64 examples each: with fewer, XLA wastes a tenth on gaps.

  In larger networks its order of operations keeps an activation more at times.
  """
  config = helpers.config(model="vgg", blocks=(2,), parallelism=mode, batch_size=256, **changes)
  job = helpers.Job(config, 4)
  batch = helpers.batch(256)
  del batch["mask"]
  step = job.parallel.step(job.train_body)
  return step.lower(job.parallel.replicate(job.state), job.parallel.shard(batch)).compile()


@pytest.mark.optimized
@pytest.mark.parametrize("mode", MODES)
def test_each_needs_the_memory_of_one_microbatch_and_merged_that_of_all(mode):
  programs = [
    compiled(mode),
    compiled(mode, microbatches=4),
    compiled(mode, microbatches=4, microbatch_statistics="merged"),
  ]
  whole, each, merged = (p.memory_analysis().temp_size_in_bytes for p in programs)
  assert each < whole / 3
  assert 0.9 < merged / whole < 1.1
  for program in programs:
    text = program.as_text()
    assert not re.search("all-gather|all-to-all", text)  # examples stay where they are
    if mode != "jit":  # two norms, forward and backward; gradients and losses; counts
      assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2 * 2 + 1 + 1


def test_a_microbatch_does_not_depend_on_the_number_of_devices():
  config = helpers.config(model="mlp", microbatches=4)
  one, four = (helpers.Job(config, count).train(2)[0]._asdict() for count in (1, 4))
  chex.assert_trees_all_close(one, four, **REORDERED)
  assert not jnp.allclose(one["params"]["head"]["kernel"], 0)
