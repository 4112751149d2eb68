"""Whitened layers of NNX: a call in that mode whitens a model, and training goes on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.alternatives.rewhitening_optimizer import rewhiten_optimizer_state
from tests.variants.table import double_precision  # noqa: F401


class Net(nnx.Module):
  def __init__(self):
    options = {"rngs": nnx.Rngs(0), "param_dtype": float}
    self.conv = jaxbn.nnx.WhitenedConv(3, 4, (3, 2), strides=[2, 1], **options)
    self.dense = jaxbn.nnx.WhitenedLinear(4, 5, **options)

  def __call__(self, x):
    return self.dense(nnx.relu(self.conv(x)))


def data(seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(2, 1, size=(8, 4, 4, 3)) @ rng.normal(size=(3, 3)))


def whitenings(model):
  return nnx.to_pure_dict(nnx.state(model, jaxbn.nnx.Whitening))


def wide(model):
  """The model with whitenings in double precision too."""
  for layer in (model.conv, model.dense):
    for variable in (layer.center, layer.matrix):
      variable.set_value(variable[...].astype(float))
  return model


def test_it_is_linen_s():
  model, x = wide(Net()), data()
  conv = jaxbn.linen.WhitenedConv(4, (3, 2), strides=(2, 1), param_dtype=float)

  def linen(mutable):
    params = {"kernel": model.conv.kernel[...], "bias": model.conv.bias[...]}
    whitening = {"center": model.conv.center[...], "matrix": model.conv.matrix[...]}
    apply = jax.jit(lambda variables: conv.apply(variables, x, mutable=mutable))
    return apply({"params": params, "whitening": whitening})

  call = nnx.jit(lambda model: model.conv(x))
  np.testing.assert_allclose(call(model), linen(False), rtol=1e-12)
  _, new = linen(["params", "whitening"])
  model.set_attributes(rewhitening=True)
  call(model)
  chex.assert_trees_all_close(whitenings(model)["conv"], new["whitening"], rtol=1e-12)
  np.testing.assert_allclose(model.conv.kernel[...], new["params"]["kernel"], rtol=1e-12)


def test_a_call_whitens_the_model_and_training_goes_on():
  model, x = wide(Net()), data()
  target = jnp.asarray(np.random.default_rng(5).normal(size=(5,)))
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

  def loss_of(model):
    return jnp.mean((model(x) - target) ** 2)

  @nnx.jit
  def step(model, optimizer):
    loss, gradient = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradient)
    return loss

  @nnx.jit
  def whiten(model):
    model(x)

  for _ in range(3):
    step(model, optimizer)
  y, old = model(x), whitenings(model)
  gradient_of = nnx.jit(nnx.grad(loss_of))
  before = gradient_of(model)

  model.set_attributes(rewhitening=True)
  whiten(model)
  model.set_attributes(rewhitening=False)
  np.testing.assert_allclose(model(x), y, rtol=1e-9, atol=1e-9)
  z = (x - model.conv.center[...]) @ model.conv.matrix[...]
  np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-9)

  state = rewhiten_optimizer_state(optimizer.opt_state, old, whitenings(model))
  assert jax.tree.structure(state) == jax.tree.structure(optimizer.opt_state)
  optimizer.opt_state = nnx.data(state)
  followed = rewhiten_optimizer_state(optax.TraceState(before), old, whitenings(model))
  after = gradient_of(model)
  chex.assert_trees_all_close(
    nnx.to_pure_dict(followed.trace), nnx.to_pure_dict(after), rtol=1e-7, atol=1e-9
  )

  losses = [float(step(model, optimizer)) for _ in range(30)]
  assert losses[-1] < 0.9 * losses[0]


def test_whitenings_are_no_parameters():
  names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(Net(), nnx.Param))}
  assert names == {"kernel", "bias"}


def test_half_precision():
  layer = jaxbn.nnx.WhitenedLinear(3, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert layer(data()).dtype == jnp.bfloat16
