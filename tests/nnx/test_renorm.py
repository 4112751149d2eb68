"""jaxbn.nnx.BatchRenorm: against the Linen layer, bit for bit."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import errors, nnx

import jaxbn.linen
import jaxbn.nnx
from tests import layers

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8, 3)) * jnp.array([0.1, 1.0, 5.0]) + 0.5
SCHEDULES = {
  "r_max": optax.linear_schedule(1.0, 3.0, 2, transition_begin=1),
  "d_max": optax.linear_schedule(0.0, 2.0, 2, transition_begin=1),
}


def make(**options):
  return jaxbn.nnx.BatchRenorm(3, **{"rngs": nnx.Rngs(0)} | options)


def stats(layer):
  return nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))


@pytest.mark.optimized
@pytest.mark.parametrize(
  "options",
  [{}, {"r_max": 1.5, "d_max": 0.5, "debias": True}, SCHEDULES, {"r_max": SCHEDULES["r_max"]}],
  ids=["defaults", "numbers", "schedules", "one schedule"],
)
def test_the_layer_is_linen_s_bit_for_bit(options):
  layer = make(**options)
  linen = jaxbn.linen.BatchRenorm(use_running_average=False, **options)
  variables = linen.init(KEY, X[0])
  layers.assert_bit_equal(stats(layer), dict(variables["batch_stats"]))
  for x in X:
    expected, new = linen.apply(variables, x, mutable=["batch_stats"])
    variables |= new
    layers.assert_bit_equal(layer(x), expected)
    layers.assert_bit_equal(stats(layer), dict(variables["batch_stats"]))


def test_evaluation_does_not_count():
  layer = make(**SCHEDULES)
  layer(X[0])
  before = stats(layer)
  layer(X[1], use_running_average=True)
  layer.eval()
  y = layer(X[1])
  layers.assert_bit_equal(stats(layer), before)
  plain = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  plain.mean.set_value(layer.mean[...])
  plain.var.set_value(layer.var[...])
  layers.assert_bit_equal(y, plain(X[1], use_running_average=True))


def test_training_in_nnx_jit_traces_once():
  layer = make(**SCHEDULES)

  @nnx.jit
  @chex.assert_max_traces(1)
  def step(layer, x):
    return nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(layer)

  for x in X:
    gradient = step(layer, x)
  assert jnp.isfinite(gradient["scale"][...]).all()
  assert layer.step[...] == 4


@pytest.mark.parametrize(
  ("options", "call", "error", "match"),
  [
    ({"r_max": 0.5}, {}, ValueError, r"r_max=0\.5 is out of range"),
    ({"choose": layers.halfway}, {}, ValueError, "in a BatchRenorm, which chooses by itself"),
    ({"d_max": lambda step: -1.0}, {}, ValueError, r"d_max=-1\.0 is out of range"),
    ({}, {"use_running_average": 2}, TypeError, "use_running_average=2: a Python bool"),
    ({"use_running_average": None}, {}, ValueError, "neither to the constructor nor to the call"),
  ],
)
def test_what_is_wrong_is_refused(options, call, error, match):
  layer = make(**options)
  with pytest.raises(error, match=match):
    layer(X[0], **call)


def test_an_unknown_option_is_refused():
  with pytest.raises(TypeError, match="momentun"):
    make(momentun=0.9)


def test_a_plain_jit_is_refused():
  layer = make(**SCHEDULES)
  with pytest.raises(errors.TraceContextError, match="use the nnx one"):
    jax.jit(layer)(X[0])
