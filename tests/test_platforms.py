"""What is compiled for accelerators where that differs from the CPU's, executed on the CPU.

`by_platform` chooses when a program is compiled. Here it chooses as for an accelerator,
so that the code of both is held to the oracle wherever the tests run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import _xla
from tests import bounds, oracle


@pytest.fixture(autouse=True)
def compiled_for_an_accelerator(monkeypatch):
  def choose(*args, default, **others):
    return default(*args)

  jax.clear_caches()  # of what was traced for all platforms
  monkeypatch.setattr(_xla, "by_platform", choose)
  yield
  jax.clear_caches()


def inputs(shape, ratio, seed=0):
  rng = np.random.default_rng(seed)
  x, cotangent = ratio + rng.normal(size=shape), rng.normal(size=shape)
  scale, bias = rng.normal(1, 0.5, shape[-1]), rng.normal(size=shape[-1])
  return tuple(np.asarray(a, np.float32) for a in (x, scale, bias, cotangent))


def train(x, scale, bias, **options):
  return jaxbn.batch_norm(x, scale, bias, use_running_average=False, **options)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 1.5, 30.0, 1e4])
def test_outputs_and_gradients_match_the_oracle(ratio, masked):
  x, scale, bias, cotangent = inputs((64, 3, 8), ratio)
  options = {"mask": np.random.default_rng(1).random(x.shape) < 0.7} if masked else {}
  valid = options.get("mask", np.ones(x.shape, bool))

  def loss(x, scale, bias):
    y = train(x, scale, bias, **options)
    return jnp.sum(jnp.where(valid, cotangent * y, 0)), y

  assert "cond" not in str(jax.make_jaxpr(loss)(x, scale, bias))
  actual, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)
  expected = oracle.batch_norm(x, scale, bias, **options)
  bounds.assert_within(y, expected, bounds.output(x, scale, bias, **options), valid)
  exact = oracle.gradients(x, scale, cotangent, **options)
  allowed = bounds.gradients(x, scale, cotangent, **options)
  for one, right, bound in zip(actual, exact, allowed, strict=True):
    bounds.assert_within(one, right, bound)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tracked", [False, True])
def test_half_precision_matches_the_oracle(dtype, tracked):
  # bfloat16 with running statistics has no pivot: its sums are around 0, and its mean is near.
  x, scale, bias, _ = inputs((256, 8), 3.0)
  x = jnp.asarray(x, dtype)
  y = train(x, scale, bias, state=jaxbn.init(8) if tracked else None, dtype=dtype)
  around_0 = {"pivot": 0.0} if tracked else {}
  bound = bounds.output(x, scale, bias, dtype, **around_0)
  bounds.assert_within(y, oracle.batch_norm(x, scale, bias), bound)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("value", [0.1, -60000.0, 1e-30, 1e30])
def test_a_constant_channel_has_variance_zero(value, fast):
  got = jaxbn.moments(jnp.full((1000, 2), value), use_fast_variance=fast)
  np.testing.assert_array_equal(got.mean, np.full(2, value, np.float32))
  np.testing.assert_array_equal(got.var, np.zeros(2))


def test_what_is_not_finite_stays_in_its_channel():
  x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  dirty = x.copy()
  dirty[0, 1] = np.nan
  clean, got = jaxbn.moments(x), jaxbn.moments(dirty)
  assert np.isnan(got.mean[1])
  assert np.isnan(got.var[1])
  np.testing.assert_array_equal(clean.mean[::2], got.mean[::2])
  np.testing.assert_array_equal(clean.var[::2], got.var[::2])


@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.leaky_relu], ids=["silu", "leaky_relu"])
def test_derivatives_through_an_activation_are_those_of_the_formula(activation):
  def formula(x, scale, bias):
    return activation((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * scale + bias)

  def derivatives(f, *given):
    gradient = jax.grad(lambda *p: jnp.sum(jnp.cos(given[0]) * f(*p)), (0, 1, 2))
    return jax.jit(lambda *p: jax.jvp(gradient, p, tuple(map(jnp.sin, p))))(*given)

  with jax.enable_x64(True):
    given = [jnp.asarray(a, jnp.float64) for a in inputs((16, 3), 1.5)[:3]]
    layer = functools.partial(train, activation=activation)
    actual, expected = derivatives(layer, *given), derivatives(formula, *given)
    # In float64, rounding and a wrong formula cannot be taken for each other.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-9), actual, expected)
