"""Fine-tuning in evaluation mode: the running statistics normalize while parameters are trained."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests import layers
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 3))
SCALE, BIAS = RNG.normal(1, 0.3, (2, 3))
STATE = jaxbn.RunningStats(np.array([0.5, -1.0, 0.0]), np.array([2.0, 0.5, 1.0]))


def frozen(x, scale, bias):
  return jaxbn.batch_norm(x, scale, bias, STATE, use_running_average=True)[0]


def formula(x, scale, bias):
  return (x - STATE.mean) / jnp.sqrt(STATE.var + 1e-5) * scale + bias


@pytest.mark.parametrize("transform", ["grad", "grad of grad", "vmap of grad", "grad of scan"])
def test_gradients_are_those_of_an_affine_map(transform):
  table.compare(transform, frozen, formula, (X, SCALE, BIAS))


def test_an_example_s_gradient_depends_on_no_other():
  slope = SCALE / np.sqrt(STATE.var + 1e-5)
  cotangent = RNG.normal(size=X.shape)
  (d_x,) = jax.vjp(lambda x: frozen(x, SCALE, BIAS), X)[1](cotangent)
  np.testing.assert_allclose(d_x, cotangent * slope, rtol=1e-14)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(1)(jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))


def test_a_linen_network_trains_and_its_statistics_stay():
  y, model = X.sum(1, keepdims=True), Linen()
  variables = model.init(jax.random.key(0), X, train=True)
  # Some batches first, so that there are statistics.
  for _ in range(3):
    _, new = model.apply(variables, X, train=True, mutable=["batch_stats"])
    variables |= new
  start, optimizer = variables["params"], optax.adam(0.05)

  @jax.jit
  def losses(params):
    def step(carry, _):
      params, moments = carry

      def loss(params):
        # No mutable collection: there is nothing that could be written.
        return jnp.mean((model.apply(variables | {"params": params}, X, train=False) - y) ** 2)

      value, gradients = jax.value_and_grad(loss)(params)
      updates, moments = optimizer.update(gradients, moments)
      return (optax.apply_updates(params, updates), moments), (value, gradients)

    return jax.lax.scan(step, (params, optimizer.init(params)), length=60)[1]

  values, gradients = losses(start)
  assert values[-1] < 0.2 * values[0]
  assert all(jnp.all(g[0] != 0) for g in jax.tree.leaves(gradients))


def test_an_nnx_network_trains_and_its_statistics_stay():
  rngs = nnx.Rngs(0)
  norm = jaxbn.nnx.BatchNorm(4, rngs=rngs)
  model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), norm, nnx.Linear(4, 1, rngs=rngs))
  model(X)
  before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
  optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
  model.eval()

  @nnx.jit
  def step(model, optimizer):
    def loss(model):
      return jnp.mean((model(X) - X.sum(1, keepdims=True)) ** 2)

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value

  losses = [step(model, optimizer) for _ in range(60)]
  assert losses[-1] < 0.5 * losses[0]
  layers.assert_bit_equal(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before)
  assert np.all(norm.scale[...] != 1)
