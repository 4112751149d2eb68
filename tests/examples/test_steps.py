"""The steps: what they compute. tests/examples/test_parallelism.py spreads them over devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from examples import parallelism, steps
from tests.examples import helpers


@pytest.fixture(scope="module")
def trained():
  """A job on four devices, and its state after two steps."""
  job = helpers.Job(helpers.config(model="mlp", blocks=(2,)), 4)
  return job, job.train(2)[0]


def test_statistics_are_those_of_the_global_batch():
  """Devices with very different shares would disagree, were the norm not synchronized."""
  job = helpers.Job(helpers.config(model="mlp", norm_momentum=0.0), 4)
  batch = helpers.batch(32)
  batch["image"] *= np.repeat([1.0, 2.0, 3.0, 4.0], 8).astype(np.float32)[:, None, None, None]
  state, _ = job.train([batch])
  first = batch["image"].reshape(32, -1) @ np.asarray(job.state.params["Dense_0"]["kernel"])
  stats = state.batch_stats["BatchNorm_0"]
  np.testing.assert_allclose(stats["mean"], first.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(stats["var"], first.var(0), rtol=1e-4)


class Constant(nn.Module):
  """Logits that are parameters: a network whose loss is known."""

  classes: int = 3

  @nn.compact
  def __call__(self, images, train, mask=None):
    logits = self.param("logits", lambda key: jnp.array([2.0, 0.0, -1.0]))
    return jnp.broadcast_to(logits, (len(images), 3))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_is_the_mean_cross_entropy_with_smoothed_labels(smoothing):
  model, optimizer = Constant(), optax.sgd(1.0)
  state = steps.init_state(model, optimizer, 0, helpers.IMAGE_SHAPE)
  batch = {"image": np.zeros((2, 8, 8, 1), np.float32), "label": np.array([0, 2], np.int32)}
  step = functools.partial(
    steps.train_step, model=model, optimizer=optimizer, label_smoothing=smoothing
  )
  new, sums = jax.jit(step)(state, batch)
  logits = np.array([2.0, 0.0, -1.0])
  log_p = logits - np.log(np.exp(logits).sum())
  target = np.eye(3)[[0, 2]] * (1 - smoothing) + smoothing / 3
  np.testing.assert_allclose(sums.loss, -(target * log_p).sum(), rtol=1e-6)
  assert (int(sums.correct), int(sums.count), int(new.step)) == (1, 2, 1)
  gradient = np.exp(log_p) - target.mean(0)
  np.testing.assert_allclose(new.params["logits"], logits - gradient, rtol=1e-6)


def padded_batches(examples, size):
  """`examples` in batches of `size`, the last filled up with what must not count."""
  total = len(examples["label"])
  for start in range(0, total, size):
    part = {key: values[start : start + size] for key, values in examples.items()}
    missing = size - len(part["label"])
    wild = helpers.batch(missing, seed=9)
    wild = wild | {"image": np.full_like(wild["image"], 1e3), "mask": np.zeros(missing, bool)}
    yield {key: np.concatenate([part[key], wild[key]]) for key in part}


def test_evaluation_counts_every_example_once_whatever_the_batch_size(trained):
  job, state = trained
  examples = helpers.batch(50, seed=5)
  step, placed = job.parallel.step(job.eval_body), job.parallel.replicate(state)
  results = [
    steps.evaluate(step, placed, padded_batches(examples, size), job.parallel) for size in (20, 52)
  ]
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  logits = jax.jit(functools.partial(job.model.apply, train=False))(variables, examples["image"])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["label"])
  correct = int((logits.argmax(-1) == examples["label"]).sum())
  for loss, accuracy, count in results:
    assert count == 50
    assert accuracy == correct / 50
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)


def test_evaluation_uses_the_running_statistics():
  """Alone or among others that are quite different, an example scores the same."""
  job = helpers.Job(helpers.config(model="mlp", parallelism="jit"), 1)
  one, many = helpers.batch(1), helpers.batch(8, seed=1)
  many["image"] *= 50
  mixed = {key: np.concatenate([one[key], many[key]]) for key in one}
  mixed["mask"][1:] = False
  step = jax.jit(job.eval_body)
  alone, among = step(job.state, one), step(job.state, mixed)
  np.testing.assert_allclose(alone.loss, among.loss, rtol=1e-5)
  assert int(among.count) == 1


def test_bfloat16_computes_in_it_but_keeps_float32():
  config = helpers.config(dtype="bfloat16", parallelism="jit")
  job = helpers.Job(config, 1)
  state, sums = jax.eval_shape(job.train_body, job.state, helpers.batch(32))
  kept = jax.tree.leaves((state.params, state.batch_stats, sums.loss))
  assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}
  text = str(jax.make_jaxpr(job.train_body)(job.state, helpers.batch(32)))
  convolutions = [line for line in text.splitlines() if "conv_general_dilated" in line]
  assert convolutions
  assert all("bf16[" in line.split("=")[0] for line in convolutions)


def test_the_first_state_follows_from_the_seed():
  states = [helpers.Job(helpers.config(model="mlp", seed=seed), 1).state for seed in (0, 0, 1)]
  chex.assert_trees_all_equal(states[0]._asdict(), states[1]._asdict())
  first, _, other = (state.params["Dense_0"]["kernel"] for state in states)
  assert not np.allclose(first, other)


# Steps that are skipped because numbers ran out: nothing remembers them but the counters.

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
  left = 20 - halvings
  single = helpers.Job(helpers.config(model="vgg"), 4).train([helpers.batch(32)] * left)[1]
  half = helpers.mean_losses(results[halvings:])
  # float16 rounds each of a handful of layers by 2**-11.
  np.testing.assert_allclose(half, helpers.mean_losses(single), rtol=10 * 2**-11)
