"""Weight normalization against the paper's gradients, Flax's layer, and batch norm's pieces."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.alternatives import weight_norm
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

RNG = np.random.default_rng(0)
V, G = RNG.normal(size=(6, 3)), RNG.normal(1, 0.5, 3)
CONV = RNG.normal(size=(3, 2, 4, 5))
X, BIAS = RNG.normal(1, 2, (8, 2, 3)), RNG.normal(size=3)
TRAINING = {"use_running_average": False}


def formula(v, g):
  return g * v / jnp.sqrt(jnp.sum(v**2, 0))


def test_direction_and_length_are_the_paper_s():
  w = weight_norm.weight_norm(V, G)
  np.testing.assert_allclose(w, formula(V, G), rtol=1e-10)
  np.testing.assert_allclose(weight_norm.weight_norm(5 * V, G), w, rtol=1e-10)
  np.testing.assert_allclose(weight_norm.lengths(w), np.abs(G), rtol=1e-10)


def test_gradients_are_equation_3():
  # dL/dg = dL/dw . v / ||v||,  dL/dv = g/||v|| dL/dw - g (dL/dg) / ||v||^2 v
  c = RNG.normal(size=V.shape)
  d_v, d_g = jax.grad(lambda v, g: jnp.sum(c * jnp.sin(weight_norm.weight_norm(v, g))), (0, 1))(
    V, G
  )
  norm = np.linalg.norm(V, axis=0)
  d_w = c * np.cos(G * V / norm)
  expected = np.sum(d_w * V, 0) / norm
  np.testing.assert_allclose(d_g, expected, rtol=1e-9)
  np.testing.assert_allclose(d_v, G / norm * d_w - G * expected / norm**2 * V, rtol=1e-9)
  np.testing.assert_allclose(np.sum(d_v * V, 0), 0, atol=1e-10)  # so that v only grows


@pytest.mark.parametrize("axis", [-1, (0, 3), 2])
def test_it_is_flax_s(axis):
  layer = nn.WeightNorm(nn.Conv(5, (3, 2), use_bias=False, dtype=float), feature_axes=axis)
  shape = np.take(CONV.shape, np.atleast_1d(axis))
  scale = np.broadcast_to(np.arange(1.0, 1 + shape[-1]), shape)
  x = RNG.normal(size=(2, 5, 5, 4))
  variables = {"params": {"layer_instance": {"kernel": CONV}, "layer_instance/kernel/scale": scale}}
  w = weight_norm.weight_norm(CONV, scale, axis=axis)
  expected = nn.Conv(5, (3, 2), use_bias=False, dtype=float).apply({"params": {"kernel": w}}, x)
  np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [-1, (0, 3), 2])
def test_lengths_give_the_kernel_back(axis):
  scale = weight_norm.lengths(CONV, axis=axis)
  np.testing.assert_allclose(weight_norm.weight_norm(CONV, scale, axis=axis), CONV, rtol=1e-10)


def test_half_precision_is_summed_in_single():
  v = jnp.full((4096, 1), 0.1, jnp.bfloat16)  # their sum in bfloat16 would stop far below
  w = weight_norm.weight_norm(v, jnp.ones(1, jnp.bfloat16))
  assert w.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(w, float), 1 / 64, rtol=2**-8)
  assert weight_norm.lengths(v).dtype == jnp.bfloat16


def test_a_kernel_of_zeros_is_no_nan():
  chex.assert_tree_all_finite(jax.grad(lambda v: weight_norm.weight_norm(v, G).sum())(0 * V))


def test_transformations():
  table.compare_all(weight_norm.weight_norm, formula, (V, G))


def test_it_compiles_once():
  table.assert_traced_once(weight_norm.weight_norm, (V, G))


# Initialization by data


def test_the_first_batch_has_mean_0_and_variance_1():
  x = RNG.normal(3, 2, (50, 6))
  t = x @ weight_norm.weight_norm(V, np.ones(3))
  scale, bias = weight_norm.data_dependent_init(t)
  y = x @ weight_norm.weight_norm(V, scale) + bias
  np.testing.assert_allclose(y.mean(0), 0, atol=1e-9)
  np.testing.assert_allclose(y.std(0), 1, rtol=1e-9)


def test_the_first_batch_is_that_of_all_valid_elements_of_all_devices():
  t = RNG.normal(3, 2, (8, 3))
  mask = np.array([1, 1, 0, 0, 0, 1, 1, 1], bool)[:, None]
  of_each = jax.vmap(
    lambda t, mask: weight_norm.data_dependent_init(t, mask=mask, axis_name="batch"),
    axis_name="batch",
  )(np.where(mask, t, np.nan).reshape(4, 2, 3), mask.reshape(4, 2, 1))
  valid = t[mask[:, 0]]
  expected = 1 / valid.std(0), -valid.mean(0) / valid.std(0)
  for i in range(4):
    chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], of_each), expected, rtol=1e-8)


# Mean-only batch normalization


def mean_only(x, bias, **options):
  return weight_norm.mean_only_batch_norm(x, bias, **TRAINING, **options)[0]


def test_mean_only_transformations():
  table.compare_all(mean_only, lambda x, bias: x - x.mean((0, 1)) + bias, (X, BIAS))


@pytest.mark.parametrize("devices", table.DEVICES)
def test_mean_only_on_devices(devices):
  def make(axis_name):
    return lambda x, bias: mean_only(x, bias, axis_name=axis_name)

  table.compare_on_devices(devices, make, lambda x, bias: x - x.mean((0, 1)) + bias, (X, BIAS))


def test_the_running_mean_normalizes_in_evaluation_whatever_the_variance():
  state = jaxbn.RunningStats(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0]))
  y, same = weight_norm.mean_only_batch_norm(X, BIAS, state, use_running_average=True)
  np.testing.assert_allclose(y, X - state.mean + BIAS, rtol=1e-12, atol=1e-12)
  chex.assert_trees_all_equal(same, state)
  mask = np.arange(8)[:, None, None] < 5
  y, new = weight_norm.mean_only_batch_norm(
    X, BIAS, state, **TRAINING, momentum=0.75, mask=mask, masked_value=0.0
  )
  mean = X[:5].mean((0, 1))
  np.testing.assert_allclose(y[:5], X[:5] - mean + BIAS, rtol=1e-12, atol=1e-12)
  assert not np.any(y[5:])
  np.testing.assert_allclose(new.mean, 0.75 * state.mean + 0.25 * mean, rtol=1e-12)
  np.testing.assert_array_equal(new.var, state.var)


@pytest.mark.parametrize(
  ("call", "error", "says"),
  [
    (lambda: weight_norm.weight_norm(V, G[:2]), ValueError, r"scale has shape \(2,\)"),
    (lambda: weight_norm.weight_norm(V.astype(int), G), TypeError, "kernel has dtype int"),
    (lambda: weight_norm.weight_norm(V, G, epsilon=-1.0), ValueError, "epsilon=-1.0"),
    (lambda: weight_norm.lengths(V, axis=2), ValueError, "axis=2 is out of range"),
    (
      lambda: weight_norm.data_dependent_init(X, axis_index_groups=[[0]]),
      ValueError,
      "pass axis_name too",
    ),
    (lambda: mean_only(X, BIAS, epsilon=1.0), TypeError, "no option 'epsilon': there is no var"),
    (lambda: mean_only(X, BIAS, unbiased=True), TypeError, "no option 'unbiased'"),
    (
      lambda: weight_norm.mean_only_batch_norm(X, use_running_average=True),
      ValueError,
      "pass state",
    ),
    (lambda: mean_only(X, BIAS, state=3), TypeError, "state is a int"),
  ],
)
def test_what_cannot_work_is_refused(call, error, says):
  with pytest.raises(error, match=says):
    call()
