"""jaxbn.alternatives.normalizer_free, against the papers' equations in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxbn.alternatives.normalizer_free import (
  activation_gain,
  expected_variances,
  scaled_activation,
  scaled_weight_standardization,
)
from tests.variants import table

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(0.3, 2.0, (3, 2, 4, 6))
GAIN = RNG.uniform(0.5, 2.0, 6)


def oracle(kernel, gain, axis=-1, epsilon=1e-5):
  """γ (W - μ) / (σ sqrt(N)), where epsilon is in σ² N; on NumPy's arrays or JAX's."""
  axes = tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)
  n = math.prod(kernel.shape[a] for a in axes)
  mean = kernel.mean(axes, keepdims=True)
  var = ((kernel - mean) ** 2).mean(axes, keepdims=True)
  gain = gain.reshape([-1 if i == axis % kernel.ndim else 1 for i in range(kernel.ndim)])
  return gain * (kernel - mean) / (n * var + epsilon) ** 0.5


# Scaled weight standardization.


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_standardization_is_the_paper_s(axis, epsilon):
  gain = np.linspace(0.5, 2.0, KERNEL.shape[axis])
  with jax.enable_x64(True):
    actual = scaled_weight_standardization(KERNEL, gain, axis=axis, epsilon=epsilon)
  np.testing.assert_allclose(actual, oracle(KERNEL, gain, axis, epsilon), rtol=1e-12, atol=1e-13)


def test_in_float32_it_is_accurate_to_a_few_units_in_the_last_place():
  """Also where the mean is a hundred times the standard deviation, which costs no more."""
  kernel = (KERNEL + 200.0).astype(np.float32)
  actual = scaled_weight_standardization(kernel, GAIN.astype(np.float32))
  expected = oracle(kernel.astype(np.float64), GAIN.astype(np.float32).astype(np.float64))
  # A mean of 24 numbers around 200 is rounded by half an ulp of 200: 2**-17, here of about 2 * 5.
  np.testing.assert_allclose(actual, expected, atol=2**-17 / 5)


def test_each_output_s_weights_have_mean_0_and_squares_that_add_up_to_gain_squared():
  with jax.enable_x64(True):
    new = np.asarray(scaled_weight_standardization(KERNEL, GAIN, epsilon=0.0))
    without = np.asarray(scaled_weight_standardization(KERNEL, epsilon=0.0))
  np.testing.assert_allclose(new.sum((0, 1, 2)), 0, atol=1e-13)
  np.testing.assert_allclose((new**2).sum((0, 1, 2)), GAIN**2, rtol=1e-13)
  np.testing.assert_allclose(new, without * GAIN, rtol=1e-12, atol=1e-13)


def test_a_constant_kernel_gives_0_and_a_finite_gradient():
  def loss(kernel):
    return jnp.sum(jnp.sin(scaled_weight_standardization(kernel) + 1.0))

  value, gradient = jax.value_and_grad(loss)(jnp.full((5, 2), 3.0))
  np.testing.assert_allclose(value, 10 * np.sin(1), rtol=1e-6)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_the_kernel_s_and_sums_are_in_float32(dtype):
  kernel = jnp.asarray(KERNEL, dtype)
  actual = scaled_weight_standardization(kernel, GAIN.astype(np.float32))
  assert actual.dtype == kernel.dtype
  expected = oracle(np.asarray(kernel, np.float64), GAIN.astype(np.float32))
  # One rounding of the result, and float32's before it.
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=eps, atol=1e-6)


def test_transformations():
  with jax.enable_x64(True):
    args = KERNEL.reshape(-1, 6)[:8], GAIN
    table.compare_all(scaled_weight_standardization, oracle, args)


def test_it_is_traced_once():
  table.assert_traced_once(scaled_weight_standardization, (KERNEL, GAIN))


@pytest.mark.parametrize(
  ("kernel", "options", "error", "message"),
  [
    (np.ones((3, 2), int), {}, TypeError, "kernel has dtype int"),
    (np.ones((1, 1, 4)), {}, ValueError, r"kernel of shape \(1, 1, 4\) has 1 weight for each"),
    (np.ones((3, 2)), {"gain": np.ones(3)}, ValueError, r"gain has shape \(3,\), .* \(2,\) on ax"),
    (np.ones((3, 2)), {"gain": np.ones(2, int)}, TypeError, "gain has dtype int"),
    (np.ones((3, 2)), {"epsilon": -1.0}, ValueError, r"epsilon=-1.0 is out of range"),
    (np.ones((3, 2)), {"axis": 2}, ValueError, "axis=2 is out of range"),
  ],
)
def test_impossible_standardizations_are_refused(kernel, options, error, message):
  with pytest.raises(error, match=message):
    scaled_weight_standardization(kernel, **options)


# Activations.

# As sampled by the papers' authors, for their code: good to about three digits.
SAMPLED = {
  "celu": 1.270926833152771,
  "elu": 1.2716004848480225,
  "gelu": 1.7015043497085571,
  "leaky_relu": 1.70590341091156,
  "log_sigmoid": 1.9193484783172607,
  "relu": 1.7139588594436646,
  "relu6": 1.7131484746932983,
  "selu": 1.0008515119552612,
  "sigmoid": 4.803835391998291,
  "silu": 1.7881293296813965,
  "soft_sign": 2.338853120803833,
  "softplus": 1.9203323125839233,
  "tanh": 1.5939117670059204,
}


@pytest.mark.parametrize("name", SAMPLED)
def test_gains_are_those_of_the_papers(name):
  assert activation_gain(getattr(jax.nn, name)) == pytest.approx(SAMPLED[name], rel=2e-3)


def leaky(slope):
  return lambda z: jnp.where(z > 0, z, slope * z)


@pytest.mark.parametrize(
  ("activation", "var"),
  [
    (jax.nn.relu, (1 - 1 / math.pi) / 2),
    (leaky(0.2), (1 + 0.04) / 2 - 0.64 / (2 * math.pi)),
    (jnp.abs, 1 - 2 / math.pi),
    (jnp.square, 2.0),
    (jnp.sin, (1 - math.exp(-2)) / 2),
    (jnp.exp, math.e**2 - math.e),
    (lambda z: 3 - z / 4, 1 / 16),
  ],
)
def test_gains_are_exact_where_the_variance_is_known(activation, var):
  assert activation_gain(activation) == pytest.approx(var**-0.5, rel=1e-12)


def test_gains_agree_with_another_quadrature():
  def silu(z):
    return z / (1 + math.exp(-z))

  def moment(k):
    def integrand(z):
      return silu(z) ** k * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    return integrate.quad(integrand, -12, 12, epsabs=1e-13, epsrel=1e-13, limit=200)[0]

  expected = (moment(2) - moment(1) ** 2) ** -0.5
  assert activation_gain(jax.nn.silu) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.relu])  # one has a rule of its own
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.linearize])
def test_a_gain_is_a_number_also_under_a_transformation(transform, activation):
  gains = []

  def f(x):
    scaled = scaled_activation(activation)
    gains.append(scaled.args[1])
    return scaled(x)

  x = jnp.ones(3, jnp.bfloat16)
  y = transform(f, x)[0] if transform is jax.linearize else transform(f)(x)
  assert y.dtype == jnp.bfloat16
  assert gains == [activation_gain(activation)]


def test_a_scaled_activation_keeps_unit_variance():
  z = jax.random.normal(jax.random.key(0), (200_000,))
  # The relative standard error of a variance is sqrt((kurtosis - 1) / n): 0.4% here, for 4 of them.
  assert float(scaled_activation(jax.nn.relu)(z).var()) == pytest.approx(1.0, rel=0.016)


@pytest.mark.parametrize(
  ("activation", "error", "message"),
  [
    (None, TypeError, "activation=None is not a function; the identity's gain is 1"),
    ("relu", TypeError, "activation='relu' is not a function"),
    (jnp.sum, ValueError, "works element by element"),
    (jnp.zeros_like, ValueError, "has variance 0.0 for standard normal input"),
    (jnp.log, ValueError, "has variance nan"),
  ],
)
def test_activations_without_a_gain_are_refused(activation, error, message):
  with pytest.raises(error, match=message):
    scaled_activation(activation)


def test_what_is_traced_has_no_gain():
  with pytest.raises(TypeError, match=r"holds an array that is traced.*take the gain outside"):
    jax.vmap(lambda k: activation_gain(lambda z: k * z))(jnp.ones(3))


# Residual blocks.


def test_variances_add_up_and_start_anew_at_transitions():
  actual = expected_variances([False, False, True, False], alpha=0.5, var=3.0)
  assert actual == (3.0, 3.25, 3.5, 1.25, 1.5)
  assert expected_variances([]) == (1.0,)


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"alpha": math.inf}, ValueError, "alpha=inf is not finite"),
    ({"var": 0.0}, ValueError, "var=0.0 is out of range"),
    ({"alpha": "0.2"}, TypeError, "alpha='0.2' is not a number"),
  ],
)
def test_impossible_variances_are_refused(options, error, message):
  with pytest.raises(error, match=message):
    expected_variances([True], **options)


def test_signals_have_the_expected_variance_and_no_mean():
  """Dense residual blocks as in the papers, wide, with unit SkipInit: measured and computed."""
  width, alpha, transitions = 1024, 1.0, [True, False, False, True, False]
  variances = expected_variances(transitions, alpha=alpha)
  activation = scaled_activation(jax.nn.relu)

  def dense(x):
    key = jax.random.key(next(seeds))
    return x @ scaled_weight_standardization(jax.random.normal(key, (width, width)))

  seeds = iter(range(100))
  x = jax.random.normal(jax.random.key(100), (256, width))
  for transition, before, after in zip(transitions, variances, variances[1:], strict=False):
    h = activation(x / before**0.5)
    x = (dense(h) if transition else x) + alpha * dense(h)
    # Over the outputs of a layer the mean square deviates by sqrt(2 / width) = 4.4% at most (all
    # examples being alike), and by what the layers before it left.
    assert float(x.var()) == pytest.approx(after, rel=0.1)
    assert abs(float(x.mean())) < 0.1
