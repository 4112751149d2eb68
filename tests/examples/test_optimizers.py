"""The optimizers: what decays, and how the learning rate goes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import models, optimizers
from examples.settings import UserError
from tests.examples import helpers

PARAMS = {
  "Conv_0": {"kernel": np.ones((3, 3)), "gain": np.ones(3)},
  "norm": {"scale": np.ones(3), "bias": np.ones(3)},
}


def by_name(params):
  """What decays, told by the names of the leaves: the rule of earlier checkpoints' optimizers."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in ("scale", "bias", "gain"), params
  )


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_weight_decay_leaves_norms_biases_and_gains_alone(name):
  """Of a network with kernels that are standardized, and of one whose norm is an affine map."""
  config = helpers.config(optimizer=name, learning_rate=0.5, weight_decay=0.1, warmup_steps=0)
  for model in (models.NFResNet, models.VGG):
    network = model(classes=10, widths=(2,), blocks=(1,), norm="none")
    shapes = jax.eval_shape(
      functools.partial(network.init, train=False), jax.random.key(0), helpers.batch(1)["image"]
    )
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes["params"])
    decays, names = models.decays(network, helpers.IMAGE_SHAPE), by_name(params)
    assert decays == names
    optimizer = optimizers.create(config, decays)
    state = optimizer.init(params)
    still = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(still, state, params)
    assert jax.tree.map(lambda u: bool(np.all(u < 0)), updates) == names
    assert jax.tree.map(lambda u: bool(np.any(u)), updates) == names
    # A state that was saved under the rule by name is restored leaf by leaf, to the same places.
    saved = optimizers.create(config, by_name).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(saved)


def test_learning_rate_warms_up_and_falls_to_zero():
  config = helpers.config(learning_rate=0.4, warmup_steps=4, steps=20)
  rate = optimizers.schedule(config)
  assert [float(rate(i)) for i in (0, 2, 4)] == pytest.approx([0.0, 0.2, 0.4])
  assert float(rate(12)) == pytest.approx(0.2)
  assert float(rate(20)) == pytest.approx(0.0, abs=1e-7)


def test_unknown_name_is_refused_with_the_nearest():
  with pytest.raises(UserError, match=r"config.optimizer is 'adam'.*did you mean 'adamw'"):
    optimizers.create(helpers.config(optimizer="adam"), decays=True)


def scaled(initial, gradients):
  """The loss scale after each of these gradients, and the parameter at the end."""
  config = helpers.config(loss_scale=initial, optimizer="sgd", weight_decay=0.0, warmup_steps=0)
  optimizer = optimizers.create(config, decays=True)
  params = {"kernel": jnp.zeros(2)}

  def update(carry, gradient):
    params, state = carry
    grads = {"kernel": jnp.full(2, gradient) * optimizers.loss_scale(state)}
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), optimizers.loss_scale(state)

  (params, _), scales = jax.lax.scan(
    update, (params, optimizer.init(params)), jnp.array(gradients, jnp.float32)
  )
  return scales, params["kernel"]


def test_loss_scale_is_halved_by_an_overflow_but_not_below_one():
  scales, _ = scaled(4.0, [1.0, np.inf, np.nan, np.inf, 1.0])
  np.testing.assert_array_equal(scales, [4.0, 2.0, 1.0, 1.0, 1.0])


def test_loss_scale_is_doubled_after_2000_good_steps_up_to_its_largest():
  gradients = np.ones(4100)
  gradients[50] = np.inf
  scales, _ = scaled(2.0**22, gradients)
  changes = {i: float(scales[i]) for i in range(1, 4100) if scales[i] != scales[i - 1]}
  assert changes == {50: 2.0**21, 2050: 2.0**22, 4050: 2.0**23}
  assert scaled(2.0**24, np.ones(2001))[0][-1] == 2.0**24


def test_a_scaled_step_is_the_step():
  """Powers of two scale exactly."""
  gradients = [1.0, 0.25, 3.0]
  np.testing.assert_array_equal(scaled(0.0, gradients)[1], scaled(1024.0, gradients)[1])


def test_scaling_brings_the_skips_that_it_takes_to_come_down():
  assert optimizers.skips(helpers.config()) == 0
  assert optimizers.skips(helpers.config(skip_nonfinite=3)) == 3
  assert optimizers.skips(helpers.config(skip_nonfinite=3, loss_scale=1.0)) == 27


def clipped(changes, params, grads):
  """What plain SGD at rate 1 subtracts: the gradients that it is given."""
  config = helpers.config(
    **{"optimizer": "sgd", "weight_decay": 0.0, "warmup_steps": 0, "learning_rate": 1.0} | changes
  )
  optimizer = optimizers.create(config, decays=True)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  return jax.tree.map(lambda u: -u / 1.9, updates)  # Nesterov's first step is 1.9 gradients


def test_gradients_are_clipped_by_the_length_of_their_weights():
  """Per output of a kernel, per vector else, never the head: the paper's rule, in NumPy."""
  random = np.random.default_rng(0)
  shapes = {
    "WSConv_0": {"kernel": (3, 3, 2, 4), "gain": (4,), "bias": (4,)},
    "WSDense_0": {"kernel": (6, 5)},
    "SkipInit_0": {"scale": ()},
    "head": {"kernel": (5, 3), "bias": (3,)},
  }
  leaf = {"is_leaf": lambda x: isinstance(x, tuple)}
  params, grads = (jax.tree.map(lambda s: random.normal(size=s), shapes, **leaf) for _ in range(2))
  params["WSConv_0"]["bias"] *= 0  # counts as 1e-3 long
  grads["WSConv_0"]["kernel"][..., 0] *= 1e-3  # short enough

  def expected(w, g):
    axes = tuple(range(w.ndim - 1)) if w.ndim > 1 else None
    length = np.maximum(np.sqrt((w**2).sum(axes, keepdims=True)), 1e-3)
    allowed = 0.1 * length / np.sqrt((g**2).sum(axes, keepdims=True))
    return (g * np.minimum(1, allowed)).reshape(g.shape)

  wanted = jax.tree.map(expected, params, grads) | {"head": grads["head"]}
  for changes in ({}, {"skip_nonfinite": 1}):
    actual = clipped({"adaptive_clip": 0.1} | changes, params, grads)
    chex.assert_trees_all_close(actual, wanted, rtol=1e-5)
  np.testing.assert_array_equal(  # float32's, unchanged
    wanted["WSConv_0"]["kernel"][..., 0], grads["WSConv_0"]["kernel"][..., 0]
  )
  chex.assert_trees_all_close(clipped({}, params, grads), grads, rtol=1e-5)


def test_gradients_are_clipped_after_the_loss_scale_is_divided_out():
  params = {"Dense_0": {"kernel": np.full((2, 1), 3.0)}}
  grads = {"Dense_0": {"kernel": np.full((2, 1), 4.0 * 128)}}
  actual = clipped({"adaptive_clip": 0.5, "loss_scale": 128.0}, params, grads)
  np.testing.assert_allclose(actual["Dense_0"]["kernel"], 1.5, rtol=1e-6)


def test_a_run_goes_on_with_other_rules_for_bad_gradients():
  """Whatever form was saved, moments and counters arrive in the form that is wanted."""
  config = helpers.config(optimizer="adamw")
  forms = list(optimizers.forms(config, True, PARAMS))
  assert len({jax.tree.structure(form) for form in forms}) == 4
  assert jax.eval_shape(optimizers.create(config, decays=True).init, PARAMS) in forms
  for i, shape in enumerate(forms):
    saved = jax.tree.map(lambda x, i=i: np.full(x.shape, i + 1, x.dtype), shape)
    for wanted in forms:
      fresh = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), wanted)
      result = optimizers.carry_over(saved, fresh)
      chex.assert_trees_all_equal_shapes_and_dtypes(result, fresh)
      for name in ("mu", "nu", "count"):
        ours, theirs = (optax.tree.get_all_with_path(tree, name) for tree in (result, saved))
        chex.assert_trees_all_equal([x for _, x in ours], [x for _, x in theirs])
    assert optimizers.carry_over(saved, shape) == saved  # to the last leaf


def test_advice_when_numbers_ran_out(tmp_path):
  config = helpers.config(workdir=str(tmp_path), optimizer="sgd", learning_rate=5.0)
  lines = str(optimizers.not_finite("the loss became nan", config)).splitlines()
  flags = [line.split(" to ")[0].split() for line in lines[1:]]
  assert flags == [
    ["--config.learning_rate=0.1"],
    ["--config.learning_rate=0.1", f"--config.workdir={tmp_path}-2"],
    ["--config.skip_nonfinite=10"],
  ]
  config.learning_rate, config.skip_nonfinite = 0.1, 10
  assert "=0.01 to go on" in str(optimizers.not_finite("the loss became nan", config))
  assert "skip_nonfinite=100 to" in str(optimizers.not_finite("the loss became nan", config))
