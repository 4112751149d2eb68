"""jaxbn.nnx.WhiteningNorm: the Linen layer bit for bit, and NNX's manners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.variants import whitening
from tests.layers import FIXED, assert_bit_equal
from tests.linen.test_whitening import CASES, KEY, X, call_of
from tests.linen.test_whitening import make as make_linen


def make(features=4, **options):
  given = {"rngs": nnx.Rngs(0), "group_size": 2} | FIXED | options
  return jaxbn.nnx.WhiteningNorm(features, **given)


def values(layer):
  return nnx.to_pure_dict(nnx.state(layer))


@pytest.mark.optimized
@pytest.mark.parametrize("case", CASES)
def test_layer_is_the_linen_layer_bit_for_bit(case):
  options = CASES[case]
  linen = make_linen(**options)
  variables = linen.init(KEY, X, use_running_average=False)
  graph, state = nnx.split(make(2 if case == "axis" else 4, **options))

  @jax.jit
  def ours(state):
    layer = nnx.merge(graph, state)
    evaluated = layer(X, use_running_average=True, **call_of(case))
    y = layer(X, **call_of(case))
    return y, values(layer), evaluated

  @jax.jit
  def theirs(variables):
    evaluated = linen.apply(variables, X, use_running_average=True, **call_of(case))
    y, new = linen.apply(
      variables, X, use_running_average=False, mutable=["batch_stats"], **call_of(case)
    )
    return y, variables.get("params", {}) | new["batch_stats"], evaluated

  assert_bit_equal(ours(state), theirs(variables))


def test_the_variables_are_named_shaped_and_typed():
  layer = make(param_dtype=jnp.bfloat16)
  described = {
    name: (type(getattr(layer, name)), v.shape, v.dtype.name) for name, v in values(layer).items()
  }
  assert described == {
    "scale": (nnx.Param, (4,), "bfloat16"),
    "bias": (nnx.Param, (4,), "bfloat16"),
    "mean": (nnx.BatchStat, (4,), "float32"),
    "whitening": (nnx.BatchStat, (2, 2, 2), "float32"),
  }
  assert_bit_equal((layer.mean[...], layer.whitening[...]), tuple(whitening.init(4, 2)))
  assert set(values(make(use_scale=False, use_bias=False))) == {"mean", "whitening"}


def test_the_mode_is_the_call_s_then_the_layer_s():
  layer = make()
  start = values(layer)
  layer.eval()
  layer(X)
  assert_bit_equal(values(layer), start)
  view = nnx.view(layer, use_running_average=False)
  view(X)
  trained = values(layer)
  assert np.any(trained["whitening"] != start["whitening"])
  layer(X, use_running_average=True)
  assert_bit_equal(values(layer), trained)


def test_it_is_synchronized_and_its_options_can_be_hashed():
  layer = make(axis_name="devices", axis_index_groups=[[0, 1]], momentum=0.0)
  graph, state = nnx.split(layer)
  hash(graph)

  @functools.partial(jax.pmap, axis_name="devices")
  def step(x):
    layer = nnx.merge(graph, state, copy=True)
    return layer(x), values(layer)["whitening"]

  y, new = step(X.reshape(2, 3, 2, 4))
  alone = make(momentum=0.0)
  whole = alone(X)
  np.testing.assert_array_equal(new[0], new[1])
  # Of order one, and of a condition number below a hundred.
  np.testing.assert_allclose(y.reshape(X.shape), whole, rtol=0, atol=1e-4)
  np.testing.assert_allclose(new[0], alone.whitening[...], rtol=0, atol=1e-4)


def test_gradients_and_updates_go_through_nnx_transformations():
  layer = make()
  gradients = nnx.jit(nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X)))))(layer)
  assert set(nnx.to_pure_dict(gradients)) == {"scale", "bias"}
  assert np.any(layer.mean[...] != 0)


def test_training_a_captured_layer_says_what_to_do():
  layer = make()
  with pytest.raises(errors.TraceContextError, match=r"WhiteningNorm.*nnx\.jit.*model\.eval"):
    jax.jit(lambda x: layer(x))(X)


@pytest.mark.parametrize(
  ("options", "x", "says"),
  [
    ({"use_running_average": None}, X, "neither to the constructor nor to the call"),
    ({}, X[..., :2], r"num_features=4.*number of channels"),
    ({"group_size": 3}, X, "group_size=3 does not divide the 4 channels"),
  ],
)
def test_what_cannot_work_is_refused(options, x, says):
  with pytest.raises(ValueError, match=says):
    make(**options)(x)
