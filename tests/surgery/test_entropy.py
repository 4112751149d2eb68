"""jaxbn.surgery.minimize_entropy: scales and biases by what is predicted with less doubt."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbn.surgery import minimize_entropy
from tests import layers
from tests.surgery import networks

RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.normal(1, 2, (8, networks.WIDTH)), jnp.float32)
ONE = jax.devices()[:1]


def test_steps_are_those_of_the_optimizer_on_the_entropy_by_the_batch():
  """Against the derivative of the equation, written here; weight decay acts on nothing else."""
  model = networks.PreActivation()
  variables = networks.init(model, X)
  optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9))

  def entropy(norm):
    z = (X - X.mean(0)) / jnp.sqrt(X.var(0) + 1e-5)
    dense = variables["params"]["Dense_0"]
    h = nn.relu(z * norm["scale"] + norm["bias"])
    p = nn.softmax(X + h @ dense["kernel"] + dense["bias"])
    return -(p * jnp.log(p)).sum(1).mean()

  norm = variables["params"]["BatchNorm_0"]
  state, values = optimizer.init(norm), []
  for _ in range(3):
    value, grads = jax.value_and_grad(entropy)(norm)
    updates, state = optimizer.update(grads, state, norm)
    norm, values = optax.apply_updates(norm, updates), [*values, value]

  new, entropies = minimize_entropy(model, variables, 3 * [X], optimizer, devices=ONE, train=False)
  layers.assert_equal_to_rounding(new["params"]["BatchNorm_0"], norm)
  layers.assert_equal_to_rounding(entropies, jnp.stack(values))
  assert entropies[2] < entropies[0]
  layers.assert_bit_equal(new["batch_stats"], variables["batch_stats"])
  layers.assert_bit_equal(new["params"]["Dense_0"], variables["params"]["Dense_0"])


def test_nnx_gets_a_copy():
  model = networks.nnx_network()
  before = networks.snapshot(model)
  new, entropies = minimize_entropy(
    model, None, 3 * [X], optax.sgd(0.1), logits=lambda y: 0.5 * y, devices=ONE
  )
  assert entropies[2] < entropies[0]
  layers.assert_bit_equal(networks.snapshot(model), before)
  after = networks.snapshot(new)
  same = jax.tree.map(np.array_equal, before, after)["scanned"]
  assert not same["norm"]["scale"]
  assert not same["norm"]["bias"]
  assert same["dense"] == {"kernel": True, "bias": True}
  assert same["norm"]["mean"]
  assert type(new) is networks.NnxNetwork


def test_what_cannot_be_is_said():
  bare = nnx.Sequential(nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match=r"BatchNorm layers/0: no batch norm here has a scale"):
    minimize_entropy(bare, None, [X], optax.sgd(1.0))
  full = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match=r"BatchNorm layers/0 is given has a NaN"):
    minimize_entropy(full, None, [X, X * jnp.nan], optax.sgd(1.0), devices=ONE)
  with pytest.raises(ValueError, match=r"entropy of batch 1 is nan.* smaller learning rate"):
    minimize_entropy(full, None, [X, X], optax.sgd(jnp.inf), devices=ONE)
  with pytest.raises(ValueError, match="batches gave none"):
    minimize_entropy(full, None, [], optax.sgd(1.0))


def test_parameters_are_where_they_were_whatever_divides_the_batches():
  model = networks.PreActivation()
  there = jax.device_put(networks.init(model, X), jax.devices()[1])
  new, _ = minimize_entropy(model, there, [X[:6], X[6:]], optax.sgd(0.1), train=False)
  assert {device for leaf in jax.tree.leaves(new) for device in leaf.devices()} == {
    jax.devices()[1]
  }
