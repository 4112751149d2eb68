"""Activations of NNX layers that have parameters, or draw random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from tests import layers

X = np.random.default_rng(0).normal(size=(8, 4))


def make():
  rngs = nnx.Rngs(0)
  drop = nnx.Sequential(jnp.tanh, nnx.Dropout(0.5, rngs=rngs))
  return jaxbn.nnx.BatchNorm(4, rngs=rngs, activation=drop)


def test_a_module_s_parameters_have_gradients():
  within = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0), activation=nnx.PReLU(0.3))
  outside = nnx.Sequential(jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.PReLU(0.3))
  x = jnp.asarray(X, jnp.float32)
  ours, theirs = (
    nnx.grad(lambda m, x: jnp.sum(jnp.sin(3 * m(x))), argnums=(0, 1))(m, x)
    for m in (within, outside)
  )
  slopes = (
    ours[0]["activation"]["negative_slope"][...],
    theirs[0]["layers"][1]["negative_slope"][...],
  )
  layers.assert_equal_to_rounding(*slopes)
  layers.assert_equal_to_rounding(ours[1], theirs[1])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_the_gradient_is_of_the_numbers_that_were_drawn(jit):
  with jax.enable_x64(True):
    graphdef, state = nnx.split(make())

    def loss(x):
      layer = nnx.merge(graphdef, state, copy=True)
      return jnp.sum(jnp.sin(3 * layer(x)))

    x = jnp.asarray(X)
    gradient = (jax.jit(jax.grad(loss)) if jit else jax.grad(loss))(x)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
    step = 1e-5  # central differences: their error is of the order of its square
    difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), difference, rtol=1e-6, atol=1e-6)


def test_each_call_draws_anew_and_evaluation_does_not():
  layer = make()
  x = jnp.asarray(X, jnp.float32)
  first, second = (nnx.jit(lambda m, x: m(x))(layer, x) for _ in range(2))
  assert np.any((np.asarray(first) == 0) != (np.asarray(second) == 0))
  layers.assert_equal_to_rounding(first, nnx.jit(lambda m, x: m(x))(make(), x))
  layer.eval()
  count = jax.tree.leaves(nnx.state(layer, nnx.RngCount))
  y = jax.jit(layer)(x)  # captured: nothing is set
  assert np.all(y != 0)
  layers.assert_bit_equal(jax.tree.leaves(nnx.state(layer, nnx.RngCount)), count)
