"""jaxbn.linen.ConditionalBatchNorm: against the function, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import jaxbn
import jaxbn.linen
from jaxbn.variants.conditional import conditional_batch_norm
from tests import layers

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(1, 2, (8, 5, 3)), jnp.float32)
LABELS = np.array([3, 0, 0, 1, 3, 3, 1, 0])
KEY = jax.random.key(0)


def make(**options):
  return jaxbn.linen.ConditionalBatchNorm(num_classes=4, **layers.FIXED | options)


@pytest.fixture(scope="module")
def variables():
  return make(use_running_average=False).init(KEY, X, LABELS)


def test_the_tree(variables):
  shapes = jax.tree.map(jnp.shape, variables)
  assert shapes["params"] == {"scale": (4, 3), "bias": (4, 3)}
  assert shapes["batch_stats"] == {"mean": (3,), "var": (3,)}
  empty = jax.tree.map(jnp.zeros_like, variables)
  loaded = serialization.from_bytes(empty, serialization.to_bytes(variables))
  layers.assert_bit_equal(loaded, variables)


def test_initialization_tracks_nothing(variables):
  start = jaxbn.init(3)
  layers.assert_bit_equal(variables["batch_stats"], {"mean": start.mean, "var": start.var})


@pytest.mark.optimized
@pytest.mark.parametrize("axis", [-1, (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_is_the_function_bit_for_bit(axis, masked):
  options = {"momentum": 0.9, "debias": True, "axis": axis, "activation": jax.nn.relu}
  layer = make(**options)
  call = {"mask": layers.MASK if axis == -1 else layers.MASK[:, :1]} if masked else {}
  start = layer.init(KEY, X, LABELS, False)
  y, new = layer.apply(start, X, LABELS, False, mutable=["batch_stats"], **call)
  params, state = start["params"], jaxbn.RunningStats(**start["batch_stats"])
  options["labels"] = LABELS
  expected, state = conditional_batch_norm(
    X, params["scale"], params["bias"], state, use_running_average=False, **options, **call
  )
  layers.assert_bit_equal(y, expected)
  layers.assert_bit_equal(new["batch_stats"], state._asdict())
  evaluation = layer.apply(start | new, X, LABELS, use_running_average=True)
  expected, _ = conditional_batch_norm(
    X, params["scale"], params["bias"], state, use_running_average=True, **options
  )
  layers.assert_bit_equal(evaluation, expected)


def test_without_bias(variables):
  layer = make(use_bias=False, use_running_average=True)
  assert set(layer.init(KEY, X, LABELS)["params"]) == {"scale"}


def test_without_either_there_is_nothing_to_condition():
  with pytest.raises(ValueError, match="pass a table"):
    make(use_bias=False, use_scale=False, use_running_average=True).init(KEY, X, LABELS)


def test_errors_reach_the_caller(variables):
  with pytest.raises(ValueError, match="labels hold 4"):
    make().apply(variables, X, LABELS + 1, True)
