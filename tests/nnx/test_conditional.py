"""jaxbn.nnx.ConditionalBatchNorm: against the Linen layer, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from tests import layers

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(1, 2, (8, 5, 3)), jnp.float32)
LABELS = np.array([3, 0, 0, 1, 3, 3, 1, 0])


def make(features=3, **options):
  return jaxbn.nnx.ConditionalBatchNorm(
    features, num_classes=4, rngs=nnx.Rngs(0), **layers.FIXED | options
  )


def values(layer):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))


@pytest.mark.optimized
@pytest.mark.parametrize("axis", [-1, (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_is_the_linen_layer_bit_for_bit(axis, masked):
  options = {"momentum": 0.9, "debias": True, "axis": axis, "activation": jax.nn.relu}
  linen = jaxbn.linen.ConditionalBatchNorm(num_classes=4, **layers.FIXED | options)
  call = {"mask": layers.MASK if axis == -1 else layers.MASK[:, :1]} if masked else {}
  start = linen.init(jax.random.key(0), X, LABELS, False)
  layer = make(3 if axis == -1 else 15, **options)
  for name, value in start["params"].items():
    getattr(layer, name).set_value(value.reshape(4, -1))
  y, new = linen.apply(start, X, LABELS, False, mutable=["batch_stats"], **call)
  layers.assert_bit_equal(layer(X, LABELS, **call), y)
  found = values(layer)
  for name, value in new["batch_stats"].items():
    layers.assert_bit_equal(found[name], np.asarray(value).ravel())
  layer.eval()
  layers.assert_bit_equal(layer(X, LABELS), linen.apply(start | new, X, LABELS, True))
  layers.assert_bit_equal(values(layer), found)


def test_the_state():
  layer = make()
  assert {k: v.shape for k, v in values(layer).items()} == {
    "scale": (4, 3),
    "bias": (4, 3),
    "mean": (3,),
    "var": (3,),
  }
  assert isinstance(layer.scale, nnx.Param)
  assert hash(nnx.graphdef(layer)) == hash(nnx.graphdef(make()))


def test_gradients_of_the_tables_under_jit():
  layer = make()

  @nnx.jit
  def gradients(layer, labels):
    return nnx.grad(lambda layer: jnp.sum(layer(X, labels) ** 3))(layer)

  by_bias = gradients(layer, LABELS).bias[...]
  assert not by_bias[2].any()  # no example is of class 2
  assert by_bias[jnp.array([0, 1, 3])].all()


def test_errors_reach_the_caller():
  with pytest.raises(ValueError, match="labels hold 4"):
    make()(X, LABELS + 1)
