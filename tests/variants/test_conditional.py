"""Conditional batch normalization: against the equations, and what becomes of labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.variants.conditional import conditional_batch_norm
from tests import oracle
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 3, 2))
SCALES, BIASES = RNG.normal(1, 0.3, (2, 4, 2))
LABELS = np.array([3, 0, 0, 1, 3, 3, 1, 0])  # none is of class 2
STATE = jaxbn.RunningStats(np.array([0.5, -1.0]), np.array([2.0, 0.5]))
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def norm(x=X, scales=SCALES, biases=BIASES, labels=LABELS, state=STATE, **options):
  return conditional_batch_norm(
    x, scales, biases, state, labels=labels, **{"use_running_average": False} | options
  )


def expected(x, scales, biases, axis=-1, **counted):
  """Example by example, from the equation; examples lie along axis 0."""
  z = oracle.batch_norm(x, axis=axis, **counted)
  parameters = zip(scales[LABELS], biases[LABELS], strict=True)
  axis = [a - 1 if a > 0 else a for a in np.atleast_1d(axis)]  # of one example
  return np.stack(
    [
      z_i * oracle.expand(s, z_i, axis) + oracle.expand(b, z_i, axis)
      for z_i, (s, b) in zip(z, parameters, strict=True)
    ]
  )


# Values


def test_each_example_has_its_class_s_scale_and_bias():
  y, state = norm()
  np.testing.assert_allclose(y, expected(X, SCALES, BIASES), **CLOSE)
  _, tracked = jaxbn.batch_norm(X, None, None, STATE, use_running_average=False)
  jax.tree.map(np.testing.assert_array_equal, state, tracked)


def test_one_of_the_tables_may_be_missing():
  one, zero = np.ones_like(SCALES), np.zeros_like(BIASES)
  np.testing.assert_allclose(norm(biases=None)[0], expected(X, SCALES, zero), **CLOSE)
  np.testing.assert_allclose(norm(scales=None)[0], expected(X, one, BIASES), **CLOSE)


@pytest.mark.parametrize("axis", [1, -1, (-1, -2)])
def test_the_channels_may_lie_on_any_axes_behind_the_examples(axis):
  x = RNG.normal(1, 2, (8, 2, 2, 2))
  shape = (4, *[2] * np.size(axis))
  scales, biases = RNG.normal(1, 0.3, (2, *shape))
  y, _ = norm(x, scales, biases, state=None, axis=axis)
  np.testing.assert_allclose(y, expected(x, scales, biases, axis), **CLOSE)


def test_the_channels_may_lie_before_the_examples():
  y, _ = norm(np.moveaxis(X, -1, 0), axis=0)
  np.testing.assert_allclose(np.moveaxis(y, 0, -1), norm()[0], **CLOSE)


def test_in_evaluation_the_running_statistics_normalize():
  y, state = norm(use_running_average=True)
  z = oracle.normalize(X, *STATE[:2])
  np.testing.assert_allclose(
    y, z * SCALES[LABELS][:, None] + BIASES[LABELS][:, None], rtol=1e-12, atol=1e-12
  )
  assert state is STATE


def test_one_label_for_all_is_plain_batch_norm():
  y, _ = norm(labels=[3] * 8)
  np.testing.assert_array_equal(y, norm(labels=3)[0])
  plain, _ = jaxbn.batch_norm(X, SCALES[3], BIASES[3], STATE, use_running_average=False)
  np.testing.assert_allclose(y, plain, **CLOSE)


def test_the_label_of_a_masked_example_is_not_looked_at():
  mask = (np.arange(8) != 5)[:, None, None]
  x, labels = np.where(mask, X, np.nan), np.where(mask.ravel(), LABELS, -1)

  @jax.jit
  def gradients(x, scales, labels):
    def loss(x, scales):
      return jnp.sum(norm(x, scales, labels=labels, mask=mask, masked_value=0.0)[0] ** 3)

    return jax.grad(loss, (0, 1))(x, scales)

  y, _ = norm(x, labels=labels, mask=mask)
  valid = mask.ravel()
  np.testing.assert_allclose(y[valid], expected(x, SCALES, BIASES, mask=mask)[valid], **CLOSE)
  np.testing.assert_allclose(
    norm(x, labels=labels, weights=1.0 * mask)[0][valid], y[valid], **CLOSE
  )
  for gradient in gradients(x, SCALES, labels):
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("label", [-1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_label_out_of_range_that_cannot_be_seen_makes_its_example_nan(label, masked):
  labels = np.where(np.arange(8) == 5, label, LABELS)
  mask = np.ones((8, 1, 1), bool) if masked else None
  y = jax.jit(lambda labels: norm(labels=labels, mask=mask)[0])(labels)
  np.testing.assert_array_equal(np.isnan(y).all((1, 2)), np.arange(8) == 5)
  others = np.arange(8) != 5
  np.testing.assert_allclose(y[others], norm()[0][others], **CLOSE)


def test_half_precision_is_rounded_once():
  x = jnp.asarray(X, jnp.bfloat16)
  scales, biases = np.float32(SCALES), np.float32(BIASES)
  y, _ = norm(x, scales, biases, state=None, dtype=jnp.bfloat16)
  exact = expected(np.float64(x), np.float64(scales), np.float64(biases))
  # bfloat16's unit roundoff, and what float32 loses before.
  np.testing.assert_allclose(np.float64(y), exact, rtol=1.01 * 2**-8, atol=1e-6)


# Every transformation, every kind of devices


def formula(x, scales, biases):
  z = (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5)
  one_hot = jax.nn.one_hot(LABELS, 4, dtype=x.dtype)
  return z * (one_hot @ scales)[:, None] + (one_hot @ biases)[:, None]


# All of them, of parameters that differ between examples, are in tests/test_choose.py.
@pytest.mark.parametrize("transform", ["vmap over parameters", "grad of scan", "grad of grad"])
def test_transformations(transform):
  table.compare(transform, lambda *args: norm(*args)[0], formula, (X, SCALES, BIASES))


@pytest.mark.parametrize("devices", table.DEVICES)
def test_devices(devices):
  def make(axis_name):
    def f(x, scales, biases):
      labels = jnp.asarray(LABELS)
      if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * len(x)
        labels = jax.lax.dynamic_slice_in_dim(labels, first, len(x))
      return norm(x, scales, biases, labels, axis_name=axis_name)[0]

    return f

  table.compare_on_devices(devices, make, formula, (X, SCALES, BIASES))


def test_nothing_is_traced_again():
  table.assert_traced_once(lambda *args: norm(*args)[0], (X, SCALES, BIASES))


def test_other_labels_do_not_trace_again():
  traces = []

  @jax.jit
  def f(labels):
    traces.append(labels)
    return norm(labels=labels)[0]

  f(LABELS), f(3 - LABELS)
  assert len(traces) == 1


# Errors


@pytest.mark.parametrize(
  ("given", "error", "says"),
  [
    ({"labels": LABELS + 1}, ValueError, "labels hold 4, but there are rows from 0 to 3"),
    ({"labels": LABELS - 1}, ValueError, "labels hold -1"),
    ({"labels": LABELS * 1.0}, TypeError, "labels has dtype float64; they are integers from 0"),
    ({"labels": LABELS[:5]}, ValueError, r"labels has shape \(5,\).* holds 8 examples"),
    ({"labels": LABELS > 1}, TypeError, "labels has dtype bool"),
    ({"scales": SCALES[0]}, ValueError, r"scales has shape \(2,\)"),
    ({"biases": BIASES[:3]}, ValueError, r"biases has shape \(3, 2\), but for 4 rows"),
    ({"scales": None, "biases": None}, ValueError, "scales=None, biases=None: pass a table"),
    ({"x": X.astype(int)}, TypeError, "x has dtype int64"),
    ({"axis": (0, 1, 2), "scales": X[:4, None] + X, "biases": None}, ValueError, "no axis of ex"),
  ],
  ids=str,
)
def test_what_cannot_be_is_refused(given, error, says):
  with pytest.raises(error, match=says):
    norm(**given)
