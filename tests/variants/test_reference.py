"""Virtual batch normalization: an example among the reference batch, against the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.variants.reference import reference_batch_norm
from tests import oracle
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 3, 2))
REFERENCE = RNG.normal(-1, 3, (5, 3, 2))
SCALE, BIAS = RNG.normal(1, 0.3, (2, 2))
MASK = RNG.uniform(size=(8, 3, 1)) < 0.7
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def norm(x=X, scale=SCALE, bias=BIAS, reference=REFERENCE, **options):
  if not isinstance(reference, jaxbn.Moments | tuple):
    reference = jaxbn.moments(reference, axis=options.get("axis", -1))
  return reference_batch_norm(x, scale, bias, reference, **options)


def formula(x, scale, bias, reference):
  """1 / (n + 1) of each example and n / (n + 1) of the reference, means and mean squares."""
  n = len(reference)

  def share(values_of_x, values_of_reference):
    own, rest = values_of_x.mean(1, keepdims=True), values_of_reference.mean((0, 1))
    return own / (n + 1) + rest * n / (n + 1)

  mean = share(x, reference)
  var = share(x**2, reference**2) - mean**2
  return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


# Values


def test_the_paper_s_shares():
  np.testing.assert_allclose(norm(), formula(X, SCALE, BIAS, REFERENCE), **CLOSE)


@pytest.mark.parametrize("counted", ["mask", "weights"])
def test_each_example_is_among_the_reference_batch(counted):
  # Not the same number of elements in each: as they are, not as examples.
  reference = RNG.normal(-1, 3, (5, 4, 2))
  given = {counted: MASK if counted == "mask" else RNG.uniform(size=(8, 3, 1))}
  y = norm(reference=reference, **given)
  for i, x in enumerate(X):
    both = np.concatenate([reference.reshape(-1, 2), x])
    weights = oracle.weights_of(x, **{k: v[i] for k, v in given.items()})
    stats = oracle.moments(both, weights=np.concatenate([np.ones((20, 2)), weights]))
    np.testing.assert_allclose(y[i], oracle.normalize(x, *stats[1:], SCALE, BIAS), **CLOSE)


def test_an_example_depends_on_the_reference_and_itself_alone():
  y = norm()
  others = np.where((np.arange(8) == 3)[:, None, None], X, np.nan)
  np.testing.assert_array_equal(norm(others)[3], y[3])
  np.testing.assert_allclose(norm(X[3:4])[0], y[3], **CLOSE)
  by_reference = jax.jacobian(lambda r: norm(reference=r)[3])(REFERENCE)
  assert np.all(np.asarray(jnp.abs(by_reference).max((0, 1))) > 0)


def test_a_masked_example_has_the_reference_s_statistics():
  mask = (np.arange(8) != 3)[:, None, None]
  y = norm(mask=mask)
  stats = oracle.moments(REFERENCE)
  np.testing.assert_allclose(y[3], oracle.normalize(X[3], *stats[1:], SCALE, BIAS), **CLOSE)


def test_without_a_reference_it_is_instance_normalization():
  y = norm(reference=jaxbn.empty_moments(2, float))
  alone = [oracle.batch_norm(x, SCALE, BIAS) for x in X]
  np.testing.assert_allclose(y, alone, **CLOSE)


@pytest.mark.parametrize("axis", [0, 1, (0, 2)])
def test_the_channels_may_lie_on_any_axes(axis):
  x, reference = RNG.normal(1, 2, (2, 4, 4, 4, 4))
  first = min({0, 1, 2, 3} - {a % 4 for a in np.atleast_1d(axis)})
  y = norm(x, None, None, reference, axis=axis)
  for i in range(4):
    one = np.take(x, [i], first)
    stats = oracle.moments(np.concatenate([reference, one], first), axis)
    exact = oracle.normalize(one, *stats[1:], axis=axis)
    np.testing.assert_allclose(np.take(y, [i], first), exact, **CLOSE)


def test_half_precision_examples_and_a_residual():
  x = jnp.asarray(X, jnp.bfloat16)
  y = norm(x, np.float32(SCALE), np.float32(BIAS), residual=x, activation=jax.nn.relu)
  exact = jax.nn.relu(formula(x.astype(float), SCALE, BIAS, REFERENCE) + x.astype(float))
  np.testing.assert_allclose(np.float64(y), exact, rtol=1e-5, atol=1e-5)


# Every transformation, every kind of devices


# All of them, of a choice, are in tests/test_choose.py.
TRANSFORMS = "vmap over x", "vmap over parameters", "scan", "grad of remat", "jvp", "grad of grad"


def test_transformations():
  table.compare_all(norm, formula, (X, SCALE, BIAS, REFERENCE), transforms=TRANSFORMS)


@pytest.mark.parametrize("devices", ["pmap", "shard_map", "jit", "jit explicit"])
def test_devices(devices):
  # Nothing is shared: on every device the whole reference batch.
  table.compare_on_devices(devices, lambda axis_name: norm, formula, (X, SCALE, BIAS, REFERENCE))


def test_nothing_is_traced_again():
  table.assert_traced_once(norm, (X, SCALE, BIAS, REFERENCE))


# Errors


@pytest.mark.parametrize(
  ("given", "error", "says"),
  [
    ({"reference": (1, 2, 3)}, TypeError, r"a tuple was given; jaxbn\.Moments are needed"),
    ({"reference": jaxbn.empty_moments(3)}, ValueError, r"reference.mean has shape \(3,\)"),
    ({"axis": (0, 1, 2), "reference": jaxbn.empty_moments((8, 3, 2))}, ValueError, "no axis of"),
    ({"scale": np.ones(5)}, ValueError, r"scale has shape \(5,\)"),
    ({"x": X.astype(int)}, TypeError, "x has dtype int64"),
    ({"x": X[:0]}, ValueError, "empty batch"),
  ],
  ids=str,
)
def test_what_cannot_be_is_refused(given, error, says):
  with pytest.raises(error, match=says):
    norm(**given)
