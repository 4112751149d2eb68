"""jaxbn.linen.BatchRenorm: against the function bit for bit; its limits, and the count of steps."""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn.linen
from jaxbn.variants import renorm
from tests import layers

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8, 3)) * jnp.array([0.1, 1.0, 5.0]) + 0.5
# Batch normalization in the first two steps, corrections from the third on.
R_MAX = optax.linear_schedule(1.0, 3.0, 2, transition_begin=1)
D_MAX = optax.linear_schedule(0.0, 2.0, 2, transition_begin=1)


def make(**options):
  return jaxbn.linen.BatchRenorm(**{"use_running_average": False} | options)


def train(layer, variables, x, **call):
  y, new = layer.apply(variables, x, mutable=["batch_stats"], **call)
  return y, {**variables, **new}


def test_its_fields_are_batch_norm_s_then_two():
  ours, theirs = (
    [f.name for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]
    for cls in (jaxbn.linen.BatchRenorm, jaxbn.linen.BatchNorm)
  )
  assert ours == [*theirs, "r_max", "d_max"]


@pytest.mark.optimized
@pytest.mark.parametrize(
  "options",
  [{}, {"momentum": 0.5, "debias": True}, {"epsilon": 0.1, "use_bias": False}, {"axis": 1}],
  ids=str,
)
def test_the_layer_is_the_function_bit_for_bit(options):
  layer = make(r_max=1.5, d_max=0.5, **options)
  variables = layer.init(KEY, X[0])
  state = jaxbn.RunningStats(**variables["batch_stats"])
  parameters = [variables["params"].get(name) for name in ("scale", "bias")]
  arguments = {k: v for k, v in options.items() if k != "use_bias"} | {"r_max": 1.5, "d_max": 0.5}
  for x in X:
    y, variables = train(layer, variables, x)
    expected, state = renorm.batch_renorm(
      x, *parameters, state, use_running_average=False, **arguments
    )
    layers.assert_bit_equal(y, expected)
    layers.assert_bit_equal(jaxbn.RunningStats(**variables["batch_stats"]), state)


def test_schedules_are_of_the_number_of_training_calls():
  layer = make(r_max=R_MAX, d_max=D_MAX)
  variables = layer.init(KEY, X[0])
  assert jax.tree.map(lambda v: (v.shape, v.dtype.name), variables["batch_stats"]) == {
    "mean": ((3,), "float32"),
    "var": ((3,), "float32"),
    "step": ((), "float32"),
  }
  state = jaxbn.init(3)
  for t, x in enumerate(X):
    assert variables["batch_stats"]["step"] == t
    y, variables = train(layer, variables, x)
    limits = {"r_max": R_MAX(t), "d_max": D_MAX(t)}
    expected, state = renorm.batch_renorm(
      x, jnp.ones(3), jnp.zeros(3), state, use_running_average=False, **limits
    )
    layers.assert_bit_equal(y, expected)


def test_evaluation_and_initialization_do_not_count():
  layer = make(use_running_average=None, r_max=R_MAX)
  variables = layer.init(KEY, X[0], use_running_average=True)
  assert variables["batch_stats"]["step"] == 0
  _, new = layer.apply(variables, X[0], use_running_average=True, mutable=["batch_stats"])
  layers.assert_bit_equal(new["batch_stats"], variables["batch_stats"])
  layer.apply(variables, X[0], use_running_average=True)


def test_batch_norm_s_checkpoints_load():
  plain = jaxbn.linen.BatchNorm(use_running_average=False)
  variables = plain.init(KEY, X[0])
  _, variables = train(plain, variables, X[0])
  layer = make(r_max=1.0, d_max=0.0)
  chex.assert_trees_all_equal_structs(layer.init(KEY, X[0]), variables)
  layers.assert_bit_equal(train(layer, variables, X[1]), train(plain, variables, X[1]))


def test_a_step_that_is_missing_is_asked_for():
  variables = jaxbn.linen.BatchNorm(use_running_average=False).init(KEY, X[0])
  layer = make(r_max=R_MAX)
  with pytest.raises(ValueError, match=r"has a mean but no step.*Add the leaf"):
    train(layer, variables, X[0])
  # Evaluation has no use for it.
  make(use_running_average=True, r_max=R_MAX).apply(variables, X[0])


def test_masks_and_networks():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask=None):
      x = nn.Dense(4)(x)
      return make(use_running_average=not train, r_max=R_MAX, d_max=D_MAX)(x, mask=mask)

  network = Network()
  variables = network.init(KEY, X[0], train=False)
  mask = jnp.arange(8)[:, None] < 5

  @jax.jit
  @chex.assert_max_traces(1)
  def step(variables, x):
    def loss(params):
      y, new = network.apply(
        {**variables, "params": params}, x, train=True, mask=mask, mutable=["batch_stats"]
      )
      return jnp.sum(jnp.where(mask, jnp.sin(y), 0)), new

    gradient, new = jax.grad(loss, has_aux=True)(variables["params"])
    return gradient, {**variables, **new}

  for x in X:
    gradient, variables = step(variables, x.at[5:].set(jnp.nan))
    assert np.isfinite(gradient["BatchNorm_0"]["scale"]).all()
  assert variables["batch_stats"]["BatchNorm_0"]["step"] == 4


@pytest.mark.parametrize(
  ("options", "error", "match"),
  [
    ({"r_max": 0.5}, ValueError, r"r_max=0\.5 is out of range"),
    ({"choose": layers.halfway}, ValueError, "in a BatchRenorm, which chooses by itself"),
    ({"d_max": lambda step: -1.0}, ValueError, r"d_max=-1\.0 is out of range"),
    ({"use_running_average": 2}, TypeError, "use_running_average=2: a Python bool"),
  ],
)
def test_what_is_wrong_is_refused(options, error, match):
  with pytest.raises(error, match=match):
    make(**options).init(KEY, X[0])


# The names of variables: a network may change from one norm to the other.


class Network(nn.Module):
  # Layers of a norm in every way that a network has to make one.

  norm: Any
  lifted: Any = lambda cls: cls

  def setup(self):
    self.first = self.norm(use_running_average=False)
    self.others = [self.norm(use_running_average=False), Compact(self.norm, self.lifted)]

  def __call__(self, x):
    x = self.first(x)
    for layer in self.others:
      x = layer(x)
    return x


class Compact(nn.Module):
  norm: Any
  lifted: Any

  @nn.compact
  def __call__(self, x):
    x = self.norm(use_running_average=False)(x)
    x = self.norm(use_running_average=False, name="norm")(x)
    x = nn.BatchNorm(use_running_average=False)(x)
    x = self.lifted(self.norm)(use_running_average=False)(x)
    return nn.Sequential([self.norm(use_running_average=False), nn.Dense(3)])(x)


LIFTED = {
  "plain": lambda cls: cls,
  "jit": nn.jit,
  "remat": nn.remat,
  "vmap": lambda cls: nn.vmap(
    cls, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
  ),
}


@pytest.mark.parametrize("lifted", LIFTED)
def test_a_network_finds_the_variables_of_batch_norm(lifted):
  flax, batch_norm, renorm = (
    Network(norm, LIFTED[lifted])
    for norm in (nn.BatchNorm, jaxbn.linen.BatchNorm, jaxbn.linen.BatchRenorm)
  )
  saved = flax.init(KEY, X[0])
  for network in (batch_norm, renorm):
    assert jax.tree.structure(network.init(KEY, X[0])) == jax.tree.structure(saved)
  y, new = renorm.apply(saved, X[0], mutable=["batch_stats"])
  expected, theirs = flax.apply(saved, X[0], mutable=["batch_stats"])
  assert y.shape == expected.shape
  assert jax.tree.structure(new) == jax.tree.structure(theirs)


def test_a_class_of_one_s_own_has_its_own_name():
  class Own(jaxbn.linen.BatchRenorm):
    pass

  module = nn.Sequential([Own(use_running_average=False), make(), Own(use_running_average=False)])
  assert set(module.init(KEY, X[0])["params"]) == {"layers_0", "layers_1", "layers_2"}

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Own(use_running_average=False)(make()(Own(use_running_average=False)(x)))

  assert set(Network().init(KEY, X[0])["params"]) == {"Own_0", "BatchNorm_0", "Own_1"}
