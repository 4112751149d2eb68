"""Batch renormalization: against the paper's equations, batch norm, and Keras."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.variants import renorm
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 3, 4))
SCALE, BIAS = RNG.normal(1, 0.3, (2, 4))
# Of the four channels r is clipped above, clipped below, and not; d above, below, and not, twice.
STATE = jaxbn.RunningStats(np.array([-3.0, 9.0, 1.2, 0.7]), np.array([0.3, 60.0, 3.0, 5.0]))
LIMITS = {"r_max": 1.5, "d_max": 0.8}
EPSILON = 1e-3
TRAINING = {"use_running_average": False, "epsilon": EPSILON}


def layer(x, scale=None, bias=None, state=STATE, **options):
  return renorm.batch_renorm(x, scale, bias, state, **LIMITS | TRAINING | options)


def corrections(x, state=STATE, axes=(0, 1), r_max=1.5, d_max=0.8):
  """Algorithm 1's first four lines, in NumPy's float64: mean_B, sigma_B, r, d."""
  mean, sigma = x.mean(axes), np.sqrt(x.var(axes) + EPSILON)
  running = np.sqrt(state.var + EPSILON)
  r = np.clip(sigma / running, 1 / r_max, r_max)
  return mean, sigma, r, np.clip((mean - state.mean) / running, -d_max, d_max)


def oracle(x, scale, bias, *args, **options):
  mean, sigma, r, d = corrections(x, *args, **options)
  return ((x - mean) / sigma * r + d) * scale + bias


def formula(x, scale, bias):
  """The same in JAX, with r and d as constants."""
  mean, sigma = x.mean((0, 1)), jnp.sqrt(x.var((0, 1)) + EPSILON)
  running = jnp.sqrt(STATE.var + EPSILON)
  r = jnp.minimum(jnp.maximum(sigma / running, 1 / 1.5), 1.5)
  d = jnp.minimum(jnp.maximum((mean - STATE.mean) / running, -0.8), 0.8)
  r, d = jax.lax.stop_gradient((r, d))
  return ((x - mean) / sigma * r + d) * scale + bias


def close(actual, expected, tolerance=1e-12):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def rounding(x):
  """Of y in float32: sums of 24 elements at most, two square roots, quotients and products, so 24 +
  16 roundings of what is at most max|z| r + d large; |mean| is too small to cancel digits.
  """
  return 40 * 2**-24 * (1.5 * np.abs(x).max() / x.std((0, 1)).min() + 0.8)


# Values


def test_the_example_clips_and_does_not():
  _, _, r, d = corrections(X)
  assert sorted(set(np.sign(np.where(np.isin(r, (1.5, 1 / 1.5)), r - 1, 0)))) == [-1, 0, 1]
  assert sorted(set(np.where(np.abs(d) == 0.8, np.sign(d), 0))) == [-1, 0, 1]


def test_values_are_the_paper_s():
  close(layer(X, SCALE, BIAS)[0], oracle(X, SCALE, BIAS))
  close(layer(X)[0], oracle(X, 1, 0))


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"momentum": 0.5, "debias": True, "unbiased": True},
    {"momentum": None},
    {"virtual_batch_size": 2},
  ],
  ids=str,
)
def test_the_running_statistics_are_batch_norm_s(options):
  state = STATE._replace(count=jnp.ones(4, jnp.int32))
  _, ours = layer(X, state=state, **options)
  _, theirs = jaxbn.batch_norm(X, state=state, **TRAINING, **options)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("parameters", [(SCALE, BIAS), (SCALE, None), (None, BIAS), (None, None)])
def test_without_room_for_corrections_it_is_batch_norm_bit_for_bit(dtype, parameters):
  x = jnp.asarray(X, dtype)
  scale, bias = (None if p is None else jnp.asarray(p, dtype) for p in parameters)
  state = jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), STATE)
  renormed = layer(x, scale, bias, state, r_max=1, d_max=0)
  plain = jaxbn.batch_norm(x, scale, bias, state, **TRAINING)
  jax.tree.map(np.testing.assert_array_equal, renormed, plain)


def test_without_clipping_training_normalizes_as_evaluation():
  wide = {"r_max": 1e6, "d_max": 1e6}
  y, _ = layer(X, SCALE, BIAS, **wide)
  evaluated, state = layer(X, SCALE, BIAS, use_running_average=True)
  close(y, evaluated)
  assert state is STATE
  # So an example's output does not depend on the others of its batch.
  close(layer(X[:2], SCALE, BIAS, **wide)[0], y[:2])


def test_float32_is_right_to_its_rounding():
  x, state = X.astype(np.float32), jax.tree.map(lambda s: s.astype(np.float32), STATE)
  exact = oracle(x.astype(float), 1, 0)
  y, _ = layer(jnp.asarray(x), state=state)
  assert y.dtype == jnp.float32
  assert np.max(np.abs(y - exact)) < rounding(x)


def test_half_precision_statistics_are_widened():
  state = jax.tree.map(lambda s: jnp.asarray(s, jnp.bfloat16), STATE)
  rounded = jax.tree.map(lambda s: np.asarray(s, float), state)
  y, new = layer(jnp.asarray(X, jnp.float32), state=state)
  close(y, oracle(X.astype(np.float32).astype(float), 1, 0, rounded), 1e-5)
  assert new.var.dtype == jnp.float32


def test_complex_d_is_clipped_in_length():
  x = X + 1j * RNG.normal(2, 1, X.shape)
  state = STATE._replace(mean=STATE.mean + 0.5j)
  batch = jaxbn.moments(x)
  d = (x.mean((0, 1)) - state.mean) / np.sqrt(state.var + EPSILON)
  clipped = d * np.minimum(1, 0.8 / np.abs(d))
  chosen = renorm.correction(1.5, 0.8, EPSILON)(batch, state)
  close(chosen.bias, clipped)
  same = renorm.correction(1.5, 0, EPSILON)(batch, state._replace(mean=x.mean((0, 1))))
  np.testing.assert_array_equal(same.bias, 0)


def test_each_virtual_batch_is_corrected_for_itself():
  y, _ = layer(X, SCALE, BIAS, virtual_batch_size=2)
  for first in range(0, 8, 2):
    part = slice(first, first + 2)
    close(y[part], oracle(X[part], SCALE, BIAS))


def test_masked_elements_are_not_there():
  mask = np.arange(8)[:, None, None] < 5
  x = np.where(mask, X, np.nan)
  y, state = layer(x, SCALE, BIAS, mask=mask, masked_value=0.0)
  close(y[:5], oracle(X[:5], SCALE, BIAS))
  assert not y[5:].any()
  gradient = jax.grad(lambda x: layer(x, mask=mask, masked_value=0.0)[0].sum())(x)
  assert np.isfinite(gradient).all()
  jax.tree.map(lambda a, b: close(a, b), state, layer(X[:5])[1])


def test_weights_count_as_often_as_they_say():
  often = RNG.integers(0, 3, 8)
  y, _ = layer(X, SCALE, BIAS, weights=often[:, None, None])
  repeated = oracle(np.repeat(X, often, 0), SCALE, BIAS)
  close(np.repeat(y, often, 0), repeated)


def test_a_batch_that_is_not_finite_can_leave_the_statistics():
  x = X.copy()
  x[0, 0, 1] = np.inf
  _, state = layer(x, skip_nonfinite=True)
  _, expected = layer(X)
  assert (state.mean[1], state.var[1]) == (STATE.mean[1], STATE.var[1])
  close(np.delete(state.var, 1), np.delete(expected.var, 1))


# Gradients and transformations


def of_layer(axis_name=None, **options):
  return lambda x, scale, bias: layer(x, scale, bias, axis_name=axis_name, **options)[0]


def test_transformations():
  table.compare_all(of_layer(), formula, (X, SCALE, BIAS))


@pytest.mark.parametrize("devices", table.DEVICES)
def test_on_devices(devices):
  table.compare_on_devices(devices, of_layer, formula, (X, SCALE, BIAS))


def test_limits_may_be_traced_and_nothing_is_traced_again():
  def f(x, r_max, d_max):
    return layer(x, r_max=r_max, d_max=d_max)[0]

  table.assert_traced_once(f, (X, 1.5, 0.8))
  close(jax.jit(f)(X, 1.5, 0.8), oracle(X, 1, 0))


def test_the_corrections_have_no_gradient():
  def f(r_max, d_max, mean, var):
    state = jaxbn.RunningStats(mean, var)
    return jnp.sum(layer(X, state=state, r_max=r_max, d_max=d_max)[0] ** 2)

  gradients = jax.grad(f, (0, 1, 2, 3))(1.5, 0.8, *map(jnp.asarray, STATE[:2]))
  assert not any(np.any(g) for g in gradients)


def test_through_two_elements_comes_no_gradient():
  # All that is left is epsilon's share of the variance.
  def f(x):
    return jnp.sum(jnp.arange(1.0, 9).reshape(2, 4) * layer(x, epsilon=1e-12)[0])

  x = np.array([[0.0, 1.0, 2.0, 3.0], [2.0, 4.0, -1.0, 9.0]])  # no sigma below 1
  assert np.max(np.abs(jax.grad(f)(x))) < 1e-10


@pytest.mark.optimized
def test_one_all_reduce():
  def f(x, state):
    return layer(x, state=state, axis_name="batch")

  lowered = jax.pmap(f, "batch", in_axes=(0, None)).lower(X.reshape(2, 4, 3, 4), STATE)
  assert len(re.findall(r" all-reduce(?:-start)?\(", lowered.compile().as_text())) == 1


# Errors


@pytest.mark.parametrize(
  ("options", "error", "match"),
  [
    ({"r_max": 0.5}, ValueError, r"r_max=0\.5 is out of range.*pass 1 or more"),
    ({"r_max": np.nan}, ValueError, "r_max=nan is out of range"),
    ({"d_max": -1}, ValueError, "d_max=-1 is out of range.*pass 0 or more"),
    ({"d_max": np.ones(4)}, ValueError, r"d_max has shape \(4,\); it is one number"),
    ({"r_max": "3"}, TypeError, "r_max='3' is not a number"),
    ({"r_max": lambda step: 3.0}, TypeError, r"pass the schedule's value, r_max\(step\)"),
    ({"state": None}, ValueError, "in training too: pass state"),
    ({"epsilon": -1.0}, ValueError, r"epsilon=-1\.0 is out of range"),
    ({"momentun": 0.9}, TypeError, "momentun"),
    ({"choose": lambda b, s: None}, TypeError, "choose"),
  ],
)
def test_what_is_wrong_is_refused(options, error, match):
  with pytest.raises(error, match=match):
    layer(X, **options)


# Keras


def test_it_is_keras_s():
  os.environ.setdefault("KERAS_BACKEND", "jax")
  keras = pytest.importorskip("keras")
  options = {"epsilon": EPSILON, "momentum": 0.9, "renorm": True, "renorm_momentum": 0.9}
  clipping = {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.8}
  theirs = keras.layers.BatchNormalization(**options, renorm_clipping=clipping)
  theirs.build((None, 3, 4))
  theirs.gamma.assign(SCALE)
  theirs.beta.assign(BIAS)
  ours = jaxbn.init(4)
  for step in range(6):
    x = RNG.normal(step / 2, 1 + step / 2, (4, 3, 4)).astype(np.float32)
    # Keras averages sigma, we the variance: from there on each step is the same.
    theirs.renorm_mean.assign(ours.mean)
    theirs.renorm_stddev.assign(np.sqrt(ours.var + EPSILON))
    expected = theirs(x, training=True)
    y, ours = layer(x, SCALE, BIAS, ours, momentum=0.9)
    assert np.max(np.abs(y - expected)) < rounding(x) * np.max(np.abs(SCALE)) + 2**-23
    np.testing.assert_allclose(ours.mean, theirs.moving_mean, rtol=0, atol=rounding(x))
    # A mean of squares is no less than the square of the mean.
    assert np.all(ours.var >= np.asarray(theirs.moving_variance) - rounding(x))
  assert np.any(ours.var > 1.01 * np.asarray(theirs.moving_variance))
