"""The registry of norms: each in the whole trainer, Flax's by their definitions, the options."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from examples import models, norms, parallelism
from examples.settings import UserError
from tests.examples import helpers

# Those of one example at a time, which share nothing: each in one parallelism, all in all of them.
OF_EXAMPLES = {
  "none": "pmap",
  "layer": "shard_map",
  "group": "jit",
  "instance": "pmap",
  "rms": "shard_map",
}


def train(norm, batch, count, **changes):
  config = helpers.config(model="vgg", norm=norm, skip_nonfinite=1, **changes)
  return helpers.Job(config, count).train([batch])


def test_every_norm_is_of_the_batch_or_of_examples():
  assert set(OF_EXAMPLES) < set(norms.NORMS)
  assert set(OF_EXAMPLES.values()) == set(parallelism.MODES)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_every_norm_gives_the_same_in_every_parallelism(norm):
  """With microbatches and a mask; what is masked is NaN, and nothing is skipped for it."""
  batch = helpers.batch(32)
  batch["mask"] = np.arange(32) % 5 != 2
  batch["image"][~batch["mask"]] = np.nan
  whole = {key: x[batch["mask"]] for key, x in batch.items() if key != "mask"}
  if norm in OF_EXAMPLES:  # then microbatches do not matter either
    expected, (sums,) = train(norm, whole, 1, parallelism="jit")
  else:
    expected, (sums,) = train(norm, batch, 1, parallelism="jit", microbatches=2)
  assert int(sums.skipped) == 0
  for mode in [OF_EXAMPLES[norm]] if norm in OF_EXAMPLES else parallelism.MODES:
    state, results = train(norm, batch, 4, parallelism=mode, microbatches=2)
    # As in test_parallelism: sums in another order, by some units in the last place each.
    chex.assert_trees_all_close(state._asdict(), expected._asdict(), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(results[0].loss, sums.loss, rtol=1e-5)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_every_norm_computes_in_the_dtype_asked_for(norm):
  """Without a float32 convolution because of it, and with float32 parameters and logits."""
  job = helpers.Job(helpers.config(norm=norm, dtype="bfloat16", parallelism="jit"), 1)
  jaxpr = str(jax.make_jaxpr(job.train_body)(job.state, helpers.batch(32)))
  convolutions = [line for line in jaxpr.splitlines() if "conv_general_dilated" in line]
  assert convolutions
  assert all("bf16[" in line.split("=")[0] for line in convolutions)
  assert {x.dtype for x in jax.tree.leaves(job.state.params)} == {jnp.dtype("float32")}


class Alone(nn.Module):
  """One norm of a network, with nothing around it."""

  norm: str
  options: dict
  momentum = 0.9
  dtype = jnp.float32
  axis_name = virtual_batch_size = None

  @nn.compact
  def __call__(self, x, **kinds):
    return norms.NORMS[self.norm](self, True, None, **self.options)(**kinds)(x)


def definition(x, norm, axes, epsilon=1e-6):
  """x without its mean over some axes, divided by its root mean square, in float64."""
  x = x.astype(np.float64)
  x = x if norm == "rms" else x - x.mean(axes, keepdims=True)
  return x / np.sqrt((x**2).mean(axes, keepdims=True) + epsilon)


@pytest.mark.parametrize(
  ("norm", "options", "axes"),
  [
    ("layer", {}, (1, 2, 3, 4)),
    ("layer", {"per_position": True}, (3, 4)),
    ("rms", {"epsilon": 0.1}, (1, 2, 3, 4)),
    ("rms", {"per_position": True}, (3, 4)),
    ("group", {"channels": 4}, (1, 2, 4)),
    ("group", {"channels": 20}, (1, 2, 4)),  # the greatest common divisor with 12
    ("group", {"channels": 12, "epsilon": 0.1}, (1, 2, 3, 4)),
    ("instance", {}, (1, 2)),
  ],
)
def test_flax_norms_are_those_of_the_papers(norm, options, axes):
  x = np.random.default_rng(0).normal(0.5, 2.0, (3, 5, 4, 12)).astype(np.float32)
  module = Alone(norm, options)
  scale_init = nn.initializers.constant(3.0)
  y, variables = module.init_with_output(
    jax.random.key(0), x, activation=nn.relu, scale_init=scale_init
  )
  groups = x.reshape(*x.shape[:3], 3, 4)
  wanted = definition(groups, norm, axes, options.get("epsilon", 1e-6)).reshape(x.shape)
  # A float32 mean and mean square of at most 240 numbers, and y of no more than 10.
  np.testing.assert_allclose(y, 3 * np.maximum(wanted, 0), atol=1e-5)
  assert {leaf.shape for leaf in jax.tree.leaves(variables)} == {(12,)}


@pytest.mark.parametrize(
  ("norm", "given", "wanted"),
  [
    ("batch", "", {}),
    ("group", "channels=4, epsilon=1", {"channels": 4, "epsilon": 1}),
    ("layer", "per_position=True", {"per_position": True}),
  ],
)
def test_options_are_read(norm, given, wanted):
  config = helpers.config(norm=norm, norm_options=given)
  assert norms.options(config) == wanted
  models.create(config, helpers.IMAGE_SHAPE, 10, None)


def test_an_option_may_be_a_name_or_none(monkeypatch):
  def whitening(network, train, mask, *, kind="pca", groups=None):
    return norms.no_norm(network, train, mask)

  monkeypatch.setitem(norms.NORMS, "whitening", whitening)
  config = helpers.config(norm="whitening", norm_options="kind=zca,groups=(1, 2)")
  assert norms.options(config) == {"kind": "zca", "groups": (1, 2)}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"norm": "bach"}, "config.norm is 'bach', .* batch, .*; did you mean 'batch'"),
    (
      {"norm": "group", "norm_options": "chanels=4"},
      "norm_options has 'chanels', but config.norm is 'group', whose options are epsilon, channels"
      "; did you mean 'channels'",
    ),
    ({"norm": "none", "norm_options": "epsilon=1"}, "is 'none', whose options are none"),
    (
      {"norm": "group", "norm_options": "channels=4.0"},
      "channels=4.0, but must be of type int, such as --config.norm_options=channels=8",
    ),
    ({"norm_options": "epsilon"}, "norm_options is 'epsilon', but must be NAME=VALUE"),
    ({"norm_options": "epsilon=1)("}, "must be NAME=VALUE"),
    ({"norm_options": "epsilon=-1.0"}, "norm_options is 'epsilon=-1.0': epsilon=-1.0 is out of"),
    ({"norm": "group", "norm_options": "channels=0"}, "channels=0, but must be at least 1"),
    ({"norm": "instance", "model": "mlp"}, r"'instance', .* \(4,\) each statistic .* one element"),
    (
      {"norm": "group", "model": "mlp", "norm_options": "channels=1"},
      "'group', .* of one element",
    ),
    (
      {"norm": "layer", "virtual_batch_size": "device"},
      "virtual_batch_size is 'device', but config.norm is 'layer', which takes no virtual batches",
    ),
  ],
)
def test_what_no_norm_can_do_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    models.create(helpers.config(**changes), helpers.IMAGE_SHAPE, 10, None)
