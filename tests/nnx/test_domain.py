"""jaxbn.nnx.DomainBatchNorm: against the Linen layer, bit for bit."""

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
DOMAINS = np.array([2, 0, 0, 1, 2, 2, 1, 0])


def make(features=3, **options):
  return jaxbn.nnx.DomainBatchNorm(
    features, num_domains=3, rngs=nnx.Rngs(0), **layers.FIXED | options
  )


def values(layer):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))


@pytest.mark.optimized
@pytest.mark.parametrize("axis", [-1, (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_domain", [False, True])
def test_layer_is_the_linen_layer_bit_for_bit(axis, masked, per_domain):
  options = {"momentum": 0.9, "debias": True, "axis": axis, "activation": jax.nn.relu}
  options["per_domain_parameters"] = per_domain
  linen = jaxbn.linen.DomainBatchNorm(num_domains=3, **layers.FIXED | options)
  call = {"mask": layers.MASK if axis == -1 else layers.MASK[:, :1]} if masked else {}
  start = linen.init(jax.random.key(0), X, DOMAINS, False)
  layer = make(3 if axis == -1 else 15, **options)
  for name, value in start["params"].items():
    variable = getattr(layer, name)
    variable.set_value(value.reshape(variable.shape))
  y, new = linen.apply(start, X, DOMAINS, False, mutable=["batch_stats"], **call)
  layers.assert_bit_equal(layer(X, DOMAINS, **call), y)
  found = values(layer)
  for name, value in new["batch_stats"].items():
    layers.assert_bit_equal(found[name], np.asarray(value).reshape(3, -1))
  layer.eval()
  layers.assert_bit_equal(layer(X, 1), linen.apply(start | new, X, 1, True))
  layers.assert_bit_equal(values(layer), found)


@pytest.mark.parametrize("per_domain", [False, True])
def test_the_state(per_domain):
  options = {"per_domain_parameters": per_domain, "momentum": None}
  shape = (3, 3) if per_domain else (3,)
  layer = make(**options)
  shapes = {k: v.shape for k, v in values(layer).items()}
  assert shapes == {
    **{"scale": shape, "bias": shape},
    **{"mean": (3, 3), "var": (3, 3), "count": (3, 3)},
  }
  assert isinstance(layer.mean, nnx.BatchStat)
  assert hash(nnx.graphdef(layer)) == hash(nnx.graphdef(make(**options)))


def test_under_jit_and_grad_statistics_are_tracked():
  layer, alone = make(), make()

  @nnx.jit
  def gradients(layer, domains):
    return nnx.grad(lambda layer: jnp.sum(layer(X, domains) ** 3))(layer)

  gradients(layer, DOMAINS)
  alone(X, DOMAINS)
  layers.assert_equal_to_rounding(values(layer), values(alone))


def test_what_a_layer_with_domains_cannot_is_refused():
  for options in ({"virtual_batch_size": 4}, {"choose": layers.halfway}):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* in a layer with domains"):
      make(**options)(X, DOMAINS)
  with pytest.raises(ValueError, match="domains hold 3"):
    make()(X, DOMAINS + 1)
