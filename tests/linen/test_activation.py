"""Activations of Linen layers that have parameters, or draw from a stream of random numbers."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from tests import layers

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 5, 4)) + 0.5
SLOPE = nn.PReLU(negative_slope_init=0.3)


class Within(nn.Module):
  """An activation inside the layer, made in one of the ways there are."""

  lift: Any = lambda cls: cls

  @nn.compact
  def __call__(self, x):
    norm = functools.partial(self.lift(jaxbn.linen.BatchNorm), use_running_average=False)
    x = norm(activation=nn.PReLU(), name="first")(x)
    shared = nn.PReLU(name="shared")
    x = norm(activation=shared, name="second")(x)
    return norm(activation=shared, name="third")(x)


class Outside(nn.Module):
  """The same after the layer."""

  @nn.compact
  def __call__(self, x):
    norm = functools.partial(jaxbn.linen.BatchNorm, use_running_average=False)
    x = nn.PReLU(name="PReLU_0")(norm(name="first")(x))
    shared = nn.PReLU(name="shared")
    x = shared(norm(name="second")(x))
    return shared(norm(name="third")(x))


def run(module, variables):
  def loss(params, x):
    y, new = module.apply(variables | {"params": params}, x, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(3 * y)), (y, new)

  return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], X)


LIFTED = {"plain": lambda cls: cls, "jit": nn.jit, "remat": nn.remat}


@pytest.mark.parametrize("lift", LIFTED)
def test_a_module_in_the_layer_is_one_after_it(lift):
  within, outside = Within(LIFTED[lift]), Outside()
  y, variables = within.init_with_output(KEY, X)
  expected, of_outside = outside.init_with_output(KEY, X)
  layers.assert_bit_equal(variables, of_outside)
  layers.assert_equal_to_rounding(y, expected)
  ours, theirs = (jax.jit(functools.partial(run, m))(variables) for m in (within, outside))
  layers.assert_equal_to_rounding(ours, theirs, 8 * float(jnp.finfo(jnp.float32).eps))
  slopes = [ours[0][0][name]["negative_slope"] for name in ("PReLU_0", "shared")]
  assert np.all(np.abs(slopes) > 0)


@pytest.mark.parametrize("name", [*layers.BATCH_NORMS, "ReferenceBatchNorm"])
def test_every_layer_takes_a_module(name):
  make, args, _ = layers.EVERY_LINEN[name]
  layer, plain = make(activation=SLOPE), make()
  y, variables = layer.init_with_output(KEY, *args)
  slope = variables["params"]["activation"]["negative_slope"]
  assert slope == jnp.float32(0.3)
  mutable = ["batch_stats", "reference"]

  def loss(params):
    y, _ = layer.apply(variables | {"params": params}, *args, mutable=mutable)
    return jnp.sum(jnp.sin(3 * y)), y

  def of_plain(slope, params):
    rest = {k: v for k, v in params.items() if k != "activation"}
    y, _ = plain.apply(variables | {"params": rest}, *args, mutable=mutable)
    y = jnp.where(y >= 0, y, slope * y)
    return jnp.sum(jnp.sin(3 * y)), y

  gradient, y = jax.grad(loss, has_aux=True)(variables["params"])
  expected, y_plain = jax.grad(of_plain, has_aux=True)(slope, variables["params"])
  layers.assert_equal_to_rounding(y, y_plain)
  layers.assert_equal_to_rounding(gradient["activation"]["negative_slope"], expected)


def test_a_recurrent_layer_takes_a_module():
  layer = jaxbn.linen.InputNormRNN(4, kind="simple", use_running_average=False, activation=SLOPE)
  variables = layer.init(KEY, X)

  def loss(params):
    y, _ = layer.apply(variables | {"params": params}, X, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(3 * y))

  gradient = jax.grad(loss)(variables["params"])
  assert gradient["activation"]["negative_slope"] != 0


def test_initialization_holds_what_a_mask_says():
  layer = jaxbn.linen.BatchNorm(use_running_average=False, activation=SLOPE, masked_value=-7.0)
  mask = np.arange(8)[:, None, None] % 3 > 0
  y, variables = layer.init_with_output(KEY, X, mask=mask)
  again, _ = layer.apply(variables, X, mask=mask, mutable=["batch_stats"])
  layers.assert_equal_to_rounding(y, again)
  assert np.all(y[::3] == -7)


def test_a_function_may_make_parameters():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      slope = nn.PReLU()
      layer = jaxbn.linen.BatchNorm(
        use_running_average=False, activation=lambda y: slope(nn.tanh(y))
      )
      return layer(x)

  variables = Network().init(KEY, X)
  gradient = run(Network(), variables)[0][0]
  assert gradient["PReLU_0"]["negative_slope"] != 0


def test_predictions_and_tables_know_of_it():
  layer = jaxbn.linen.BatchNorm(use_running_average=True, activation=SLOPE)
  variables = layer.init(KEY, X)
  y = jaxbn.linen.prediction_time(layer.apply)(variables, X)
  trained = layer.clone(use_running_average=False).apply(variables, X, mutable=["batch_stats"])[0]
  layers.assert_equal_to_rounding(y, trained)
  table = nn.tabulate(layer, KEY, compute_flops=True, console_kwargs={"width": 200})(X)
  assert len([row for row in table.splitlines() if "PReLU" in row and "│" in row]) == 1


def test_what_is_no_elementwise_function_is_refused_at_initialization_too():
  for activation, error, says in [
    (3, TypeError, "activation=3 is not a function"),
    (lambda y: y.sum(), ValueError, "turns an array of shape"),
    (nn.Dense(7), ValueError, "turns an array of shape"),
  ]:
    layer = jaxbn.linen.BatchNorm(use_running_average=False, activation=activation)
    with pytest.raises(error, match=says):
      layer.init(KEY, X)


class Dropped(nn.Module):
  """Random numbers inside the layer: of a module, of one in a function, of the network itself."""

  how: str

  @nn.compact
  def __call__(self, x):
    drop = nn.Dropout(0.5, deterministic=False)

    def by_hand(y):
      noise = jax.random.bernoulli(self.make_rng("dropout"), 0.5, y.shape)
      return jnp.where(noise, jnp.tanh(y), 0)

    activation = {
      "module": drop,
      "function": lambda y: drop(nn.tanh(y)),
      "make_rng": by_hand,
    }[self.how]
    return jaxbn.linen.BatchNorm(use_running_average=False, activation=activation)(x)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("how", ["module", "function", "make_rng"])
def test_the_gradient_is_of_the_numbers_that_were_drawn(how, jit):
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)))
    module = Dropped(how)
    rngs = {"dropout": jax.random.key(7)}
    variables = module.init({"params": KEY, **rngs}, x)

    def loss(x):
      y, _ = module.apply(variables, x, rngs=rngs, mutable=["batch_stats"])
      return jnp.sum(jnp.sin(3 * y))

    gradient = (jax.jit(jax.grad(loss)) if jit else jax.grad(loss))(x)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
    step = 1e-5  # central differences: their error is of the order of its square
    difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), difference, rtol=1e-6, atol=1e-6)
