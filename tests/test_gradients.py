"""Gradients of batch_norm: the analytic formula, finite differences, and what a large mean costs.

Over several devices in test_devices.py, under every transformation in test_transforms.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxbn
from tests import bounds, oracle

LAYOUTS = [((12, 3), -1), ((6, 3, 4), (0, -1)), ((4, 3, 3, 5), 1)]
COUNTED = ["plain", "mask", "weights", "both"]


def inputs(shape, axis=-1, ratio=0.5, seed=0):
  """x with deviation 2 and mean 2 ratio, scale, bias and a cotangent, all in float64."""
  rng = np.random.default_rng(seed)
  of_channels = tuple(shape[a] for a in sorted(a % len(shape) for a in np.atleast_1d(axis)))
  x = 2 * (ratio + rng.normal(size=shape))
  return x, rng.normal(1, 0.5, of_channels), rng.normal(size=of_channels), rng.normal(size=shape)


def single(*arrays):
  return tuple(np.asarray(a, np.float32) for a in arrays)


def counted(kind, shape, seed=1):
  """The arguments that say which elements exist."""
  rng = np.random.default_rng(seed)
  options = {"mask": rng.random(shape) < 0.7, "weights": rng.uniform(0.5, 2, shape)}
  options["weights"] = np.where(rng.random(shape) < 0.8, options["weights"], 0).astype(np.float32)
  return {k: v for k, v in options.items() if kind in (k, "both")}


def gradients(x, scale, bias, cotangent, options, axis=-1, state=None, **static):
  """Of sum(cotangent * y), where elements exist."""
  valid = oracle.weights_of(x, **options) > 0

  @jax.jit
  def gradient(*arguments):
    def loss(x, scale, bias):
      y, _ = jaxbn.batch_norm(
        *(x, scale, bias, state),
        use_running_average=state is not None,
        axis=axis,
        **options,
        **static,
      )
      return jnp.sum(jnp.where(valid, cotangent * y, 0))

    return jax.grad(loss, (0, 1, 2))(*arguments)

  return gradient(x, scale, bias)


def check(actual, x, scale, cotangent, axis=-1, **options):
  expected = oracle.gradients(x, scale, cotangent, axis=axis, **options)
  bound = bounds.gradients(x, scale, cotangent, axis=axis, **options)
  for one, right, allowed in zip(actual, expected, bound, strict=True):
    bounds.assert_within(one, right, allowed)


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_training_gradients_are_the_analytic_ones(shape, axis, kind):
  x, scale, bias, cotangent = single(*inputs(shape, axis))
  options = counted(kind, shape)
  actual = gradients(x, scale, bias, cotangent, options, axis)
  check(actual, x, scale, cotangent, axis, **options)


@pytest.mark.parametrize("kind", COUNTED)
def test_evaluation_gradients_hold_the_statistics_constant(kind):
  x, scale, bias, cotangent = single(*inputs((12, 3)))
  options = counted(kind, x.shape)
  state = jaxbn.RunningStats(jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 0.5, 4.0]))
  d_x, d_scale, d_bias = gradients(x, scale, bias, cotangent, options, state=state)
  g = np.where(oracle.weights_of(x, **options) > 0, oracle.wide(cotangent), 0)
  r = 1 / np.sqrt(oracle.wide(state.var) + 1e-5)
  z = oracle.normalize(x, state.mean, state.var)
  tolerance = (bounds.summing(12, 1) + 10) * bounds.roundoff(np.float32)
  bounds.assert_within(d_x, g * r * scale, tolerance * abs(g * r * scale) + 1e-30)
  bounds.assert_within(d_scale, (g * z).sum(0), tolerance * abs(g * z).sum(0))
  bounds.assert_within(d_bias, g.sum(0), tolerance * abs(g).sum(0))


@pytest.mark.parametrize(("ratio", "claim"), [(1e2, 1e-4), (1e3, 1e-3), (1e4, 1e-2)])
def test_a_large_mean_costs_gradients_no_more_than_outputs(ratio, claim):
  # Relative to what the gradient would be with the statistics constant, scale / s |g|.
  x, scale, bias, cotangent = single(*inputs((1024, 8), ratio=ratio))
  actual = gradients(x, scale, bias, cotangent, {})
  check(actual, x, scale, cotangent)
  expected = oracle.gradients(x, scale, cotangent)
  size = np.abs(scale) / np.sqrt(oracle.moments(x).var) * np.sqrt(np.mean(cotangent**2, 0))
  assert np.max(np.abs(actual[0] - expected.x) / size) <= claim


def test_the_gradient_of_x_is_orthogonal_to_shifts_and_nearly_to_rescaling():
  # y does not change when x is shifted; nor, but for epsilon, when it is rescaled.
  x, scale, bias, cotangent = inputs((16, 3))
  with jax.enable_x64(True):
    d_x, *_ = gradients(x, scale, bias, cotangent, {}, epsilon=1e-12)
    d_x = np.asarray(d_x)
  np.testing.assert_allclose(d_x.sum(0), 0, atol=1e-10)
  np.testing.assert_allclose((d_x * (x - x.mean(0))).sum(0), 0, atol=1e-10)


@pytest.mark.parametrize("use_running_average", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["plain", "both"])
def test_derivatives_through_outputs_and_the_new_state_are_finite_differences(
  kind, use_running_average
):
  with jax.enable_x64(True):
    x, scale, bias, cotangent = inputs((6, 2))
    state = jaxbn.RunningStats(jnp.array([0.5, 1.0]), jnp.array([1.0, 0.5]))
    options = counted(kind, x.shape)
    exists = oracle.weights_of(x, **options) > 0
    # The finite difference must not step across weight 0, which is where a mask begins.
    weights = np.where(exists, options.pop("weights", np.ones(x.shape)), 1.0).astype(np.float64)

    @jax.jit
    def loss(x, scale, bias, state, weights):
      given = {"weights": jnp.where(exists, weights, 0)} if kind in ("weights", "both") else {}
      y, new_state = jaxbn.batch_norm(
        *(x, scale, bias, state),
        use_running_average=use_running_average,
        momentum=0.9,
        **options,
        **given,
      )
      loss = jnp.sum(jnp.where(exists, cotangent * jnp.sin(y), 0))
      return loss + jnp.sum(jnp.cos(new_state.mean) * new_state.var)

    check_grads(loss, (x, scale, bias, state, weights), order=1, modes=["rev"], rtol=1e-5)


def test_gradients_of_complex_input_are_finite_differences():
  with jax.enable_x64(True):
    x, scale, bias, _ = inputs((6, 2))
    x, direction = x + 1j * x[::-1] ** 2, np.random.default_rng(3).normal(size=(2, 6, 2))
    direction = direction[0] + 1j * direction[1]

    @jax.jit
    def loss(x):
      y, _ = jaxbn.batch_norm(x, scale, bias, use_running_average=False)
      return jnp.sum(jnp.sin(y.real) + y.imag**3)

    h = 1e-5
    numeric = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    # JAX's convention: the gradient is the conjugate of the direction of steepest ascent.
    np.testing.assert_allclose(
      np.sum(jax.jit(jax.grad(loss))(x) * direction).real, numeric, rtol=1e-7
    )


@pytest.mark.parametrize("kind", COUNTED)
def test_detached_statistics_are_constants_and_give_another_gradient(kind):
  x, scale, bias, cotangent = single(*inputs((12, 3)))
  options = counted(kind, x.shape)
  detached = gradients(x, scale, bias, cotangent, options, detach_stats=True)
  r = 1 / np.sqrt(oracle.moments(x, **options).var + 1e-5)
  valid = oracle.weights_of(x, **options) > 0
  np.testing.assert_allclose(
    detached[0], np.where(valid, cotangent * r * scale, 0), rtol=1e-5, atol=1e-7
  )
  attached = gradients(x, scale, bias, cotangent, options)
  allowed = bounds.gradients(x, scale, cotangent, **options)
  for one, other, bound in zip(detached[1:], attached[1:], allowed[1:], strict=True):
    bounds.assert_within(one, oracle.wide(other), 2 * bound)  # two programs, each off by as much
  assert np.max(np.abs(detached[0] - attached[0])) > 0.1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_gradients_are_float32_ones_rounded(dtype):
  x, scale, bias, cotangent = single(*inputs((64, 3)))
  x = np.asarray(jnp.asarray(x, dtype))
  # What flows through the output and through the statistics is added before it is rounded.
  half = gradients(x, scale, bias, cotangent, {})
  full = gradients(x.astype(np.float32), scale, bias, cotangent, {})
  assert half[0].dtype == dtype
  np.testing.assert_allclose(
    half[0].astype(np.float32), full[0], rtol=float(jnp.finfo(dtype).eps), atol=1e-6
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), half[1:], full[1:])
