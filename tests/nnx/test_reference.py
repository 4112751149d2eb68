"""jaxbn.nnx.ReferenceBatchNorm: against the Linen layer, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from tests import layers

RNG = np.random.default_rng(0)
X, REFERENCE = jnp.asarray(RNG.normal(1, 2, (2, 8, 5, 3)), jnp.float32)


def make(features=3, **options):
  return jaxbn.nnx.ReferenceBatchNorm(features, rngs=nnx.Rngs(0), **layers.FIXED | options)


@pytest.mark.optimized
@pytest.mark.parametrize("axis", [-1, (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_is_the_linen_layer_bit_for_bit(axis, masked):
  options = {"axis": axis, "activation": jax.nn.relu, "epsilon": 1e-3}
  call = {"mask": layers.MASK if axis == -1 else layers.MASK[:, :1]} if masked else {}
  linen = jaxbn.linen.ReferenceBatchNorm(**layers.FIXED | options)
  params = linen.init(jax.random.key(0), X)
  layer = make(3 if axis == -1 else 15, **options)
  for name, value in params["params"].items():
    getattr(layer, name).set_value(value.ravel())
  y, kept = linen.apply(params, REFERENCE, is_reference=True, mutable=["reference"], **call)
  layers.assert_bit_equal(layer(REFERENCE, is_reference=True, **call), y)
  for name, value in kept["reference"].items():
    layers.assert_bit_equal(getattr(layer, name)[...], value.ravel())
  before = nnx.to_pure_dict(nnx.state(layer))
  layers.assert_bit_equal(layer(X, **call), linen.apply(params | kept, X, **call))
  layers.assert_bit_equal(nnx.to_pure_dict(nnx.state(layer)), before)


def test_gradients_flow_through_the_reference():
  layer = make()

  @nnx.jit
  def gradient(layer, reference):
    def loss(reference, layer):
      layer(reference, is_reference=True)
      return jnp.sum(layer(X) ** 3)

    return nnx.grad(loss)(reference, layer)

  assert jnp.all(gradient(layer, REFERENCE))
  assert jnp.all(jnp.isfinite(layer.mean[...]))  # the reference stays


def test_without_a_reference_batch_it_says_so():
  with pytest.raises(ValueError, match="the layer has no reference batch, or one that is NaN"):
    make()(X)
  assert jnp.isnan(nnx.jit(lambda layer, x: layer(x))(make(), X)).all()


def test_channels_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"scale has shape \(4,\)"):
    make(4)(X, is_reference=True)


def test_lists_are_hashable_when_split():
  layer = make(axis=[-1], axis_name="b", axis_index_groups=[[0, 1]])
  assert hash(nnx.graphdef(layer))
