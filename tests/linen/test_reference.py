"""jaxbn.linen.ReferenceBatchNorm: against the functions, bit for bit, and in a network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from jaxbn.variants.reference import normalize_reference, reference_batch_norm
from tests import layers

RNG = np.random.default_rng(0)
X, REFERENCE = jnp.asarray(RNG.normal(1, 2, (2, 8, 5, 3)), jnp.float32)
KEY = jax.random.key(0)


def make(**options):
  return jaxbn.linen.ReferenceBatchNorm(**layers.FIXED | options)


def refer(layer, params, x=REFERENCE, **call):
  return layer.apply(params, x, is_reference=True, mutable=["reference"], **call)


def test_initialization_creates_parameters_only():
  for is_reference in (False, True):
    variables = make().init(KEY, X, is_reference)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"scale": (3,), "bias": (3,)}}


@pytest.mark.optimized
@pytest.mark.parametrize("axis", [-1, (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_is_the_functions_bit_for_bit(axis, masked):
  options = {"axis": axis, "activation": jax.nn.relu, "epsilon": 1e-3}
  call = {"mask": layers.MASK if axis == -1 else layers.MASK[:, :1]} if masked else {}
  layer = make(**options)
  params = layer.init(KEY, X)
  scale, bias = (params["params"][name] for name in ("scale", "bias"))
  y, kept = refer(layer, params, **call)
  expected, reference = normalize_reference(REFERENCE, scale, bias, **options, **call)
  layers.assert_bit_equal(y, expected)
  layers.assert_bit_equal(kept["reference"]["var"], reference.var)
  assert kept["reference"]["count"].shape == scale.shape
  expected = reference_batch_norm(X, scale, bias, reference, **options, **call)
  layers.assert_bit_equal(layer.apply(params | kept, X, **call), expected)


@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
def test_devices_with_parts_of_the_reference_batch(transform):
  layer = make(axis_name="b")
  params = layer.init(KEY, X)

  def both(reference, x):
    _, kept = refer(layer, params, reference)
    return layer.apply(params | kept, x)

  y = transform(both, axis_name="b")(*layers.devices((REFERENCE, X)))
  whole = make().apply(params | refer(make(), params)[1], X)
  layers.assert_equal_to_rounding(y.reshape(X.shape), whole)


class Network(nn.Module):
  @nn.compact
  def __call__(self, x, is_reference=False):
    for _ in range(2):
      x = jaxbn.linen.ReferenceBatchNorm(activation=nn.relu)(nn.Dense(4)(x), is_reference)
    return x


def test_in_a_network_gradients_flow_through_the_reference_unless_stopped():
  params = Network().init(KEY, X)

  @jax.jit
  def outputs(params, reference, x):
    _, kept = refer(Network(), params, reference)
    return Network().apply(params | kept, x)

  def loss(reference, stop):
    _, kept = refer(Network(), params, reference)
    kept = jax.lax.stop_gradient(kept) if stop else kept
    return jnp.sum(Network().apply(params | kept, X) ** 2)

  y = outputs(params, REFERENCE, X)
  alone = outputs(params, REFERENCE, jnp.where(jnp.arange(8)[:, None, None] == 2, X, 7.0))
  layers.assert_equal_to_rounding(alone[2], y[2])  # depends on no other example
  assert jnp.any(jax.grad(loss)(REFERENCE, False))
  assert not jnp.any(jax.grad(loss)(REFERENCE, True))


def test_without_a_reference_batch_it_says_so():
  params = make().init(KEY, X)
  with pytest.raises(ValueError, match="the layer has no reference batch: apply the network to it"):
    make().apply(params, X)
  with pytest.raises(TypeError, match="is_reference=None"):
    make().apply(params, X, None)
