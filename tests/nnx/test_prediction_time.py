"""jaxbn.nnx.prediction_time: against the Linen one, and what it leaves as it was."""

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


def make(**options):
  return jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **layers.FIXED | options)


class Network(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.blocks = nnx.List(
      [nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), make(), nnx.Dropout(0.5, rngs=rngs))]
    )
    self.norm = make()

  def __call__(self, x, mask=None):
    for block in self.blocks:
      x = block(x)
    return self.norm(x, mask=mask)


def variables(model):
  return nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))


@pytest.mark.optimized
@pytest.mark.parametrize("prior", [0.0, 4.0, jnp.inf])
def test_a_layer_is_the_linen_layer_s_bit_for_bit(prior):
  linen = jaxbn.linen.BatchNorm(**layers.FIXED)
  start = linen.init(jax.random.key(0), X, False)
  expected = jaxbn.linen.prediction_time(linen.apply, prior)(start, X, True, mask=layers.MASK)
  predict = jaxbn.nnx.prediction_time(make(), prior)
  for x in (3 * X, X):  # the first leaves nothing behind
    y = predict(x, mask=layers.MASK)
  layers.assert_bit_equal(y, expected)


@pytest.mark.parametrize("jit", [False, True])
def test_a_network_predicts_and_the_other_stays_as_it_was(jit):
  model = Network()
  model.eval()
  before = variables(model)
  predict = jaxbn.nnx.prediction_time(model)
  y = nnx.jit(lambda model, x: model(x))(predict, X) if jit else predict(X)
  layers.assert_bit_equal(variables(model), before)
  assert type(model.norm) is jaxbn.nnx.BatchNorm
  # By the batch's statistics: zero mean, unit variance, before the last scale and bias.
  z = (y - model.norm.bias[...]) / model.norm.scale[...]
  np.testing.assert_allclose(z.mean((0, 1)), 0, atol=1e-5)
  np.testing.assert_allclose(z.std((0, 1)), 1, atol=1e-3)
  assert jnp.max(jnp.abs(y - model(X))) > 0.1
  layers.assert_bit_equal(variables(model), before)


def test_what_it_does_not_know_is_refused():
  with pytest.raises(ValueError, match=r"prior=-1.0 is out of range"):
    jaxbn.nnx.prediction_time(make(), -1.0)
  derived = nnx.Sequential(jaxbn.nnx.DomainBatchNorm(3, 2, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match=r"not DomainBatchNorm at layers\.0: use jaxbn.variants"):
    jaxbn.nnx.prediction_time(derived)
  with pytest.raises(ValueError, match="not BatchNorm at the top with choose"):
    jaxbn.nnx.prediction_time(make(choose=layers.halfway))
