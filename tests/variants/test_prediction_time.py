"""Prediction-time batch normalization: between the running statistics and the batch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.variants.prediction_time import interpolate, prediction_time_batch_norm
from tests import oracle
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 3, 2))
SCALE, BIAS = RNG.normal(1, 0.3, (2, 2))
STATE = jaxbn.RunningStats(np.array([0.5, -1.0]), np.array([2.0, 0.5]))
MASK = (np.arange(8) < 5)[:, None, None]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def predict(x=X, scale=SCALE, bias=BIAS, state=STATE, **options):
  return prediction_time_batch_norm(x, scale, bias, state, **options)


def expected(prior, **counted):
  batch = oracle.moments(X, **counted)
  n = np.mean(batch.count) / 3  # in examples of three places
  mean, var = (
    prior / (prior + n) * source + n / (prior + n) * target
    for source, target in zip(STATE[:2], batch[1:], strict=True)
  )
  return oracle.normalize(X, mean, var, SCALE, BIAS)


@pytest.mark.parametrize("prior", [0.0, 1, 16.0, 1e6])
@pytest.mark.parametrize("counted", [{}, {"mask": MASK}], ids=str)
def test_the_papers_interpolation(prior, counted):
  np.testing.assert_allclose(predict(prior=prior, **counted), expected(prior, **counted), **CLOSE)


def test_without_a_prior_it_is_training_s_output_and_with_all_of_it_evaluation_s():
  training, _ = jaxbn.batch_norm(X, SCALE, BIAS, STATE, use_running_average=False)
  evaluation, _ = jaxbn.batch_norm(X, SCALE, BIAS, STATE, use_running_average=True)
  np.testing.assert_array_equal(predict(), training)
  np.testing.assert_array_equal(predict(prior=jnp.inf), evaluation)


def test_with_all_of_the_prior_a_batch_that_is_not_finite_does_not_count():
  x = np.where(np.arange(8)[:, None, None] == 3, np.inf, X)
  others = np.arange(8) != 3
  y = predict(x, prior=jnp.inf)
  np.testing.assert_array_equal(y[others], predict(prior=jnp.inf)[others])


def test_a_batch_without_a_valid_element_leaves_the_running_statistics():
  y = predict(mask=np.zeros((8, 1, 1), bool))
  np.testing.assert_allclose(y, oracle.normalize(X, *STATE[:2], SCALE, BIAS), **CLOSE)


def test_the_choice_by_itself():
  choose = interpolate(4.0, elements=3)
  y, state = jaxbn.batch_norm(X, SCALE, BIAS, STATE, use_running_average=False, choose=choose)
  np.testing.assert_array_equal(y, predict(prior=4.0))
  _, tracked = jaxbn.batch_norm(X, SCALE, BIAS, STATE, use_running_average=False)
  np.testing.assert_array_equal(state.mean, tracked.mean)


def test_virtual_batches_count_for_themselves():
  y = predict(prior=4.0, virtual_batch_size=2)
  alone = [predict(X[i : i + 2], prior=4.0) for i in range(0, 8, 2)]
  np.testing.assert_allclose(y, np.concatenate(alone), **CLOSE)


def test_the_prior_may_be_traced():
  prior = jax.jit(lambda prior: predict(prior=prior))
  np.testing.assert_allclose(prior(3.0), predict(prior=3.0), **CLOSE)


# Every transformation, every kind of devices


def f(x, scale, bias, axis_name=None):
  return predict(x, scale, bias, prior=4.0, axis_name=axis_name)


def formula(x, scale, bias):
  share = 8 / (4 + 8)
  mean = (1 - share) * STATE.mean + share * x.mean((0, 1))
  var = (1 - share) * STATE.var + share * x.var((0, 1))
  return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


# All of them, of a choice, are in tests/test_choose.py.
@pytest.mark.parametrize("transform", ["vmap over x", "grad of remat", "grad of grad"])
def test_transformations(transform):
  table.compare(transform, f, formula, (X, SCALE, BIAS))


@pytest.mark.parametrize("devices", ["shard_map", "jit explicit"])
def test_devices(devices):
  def make(axis_name):
    return lambda *args: f(*args, axis_name=axis_name)

  table.compare_on_devices(devices, make, formula, (X, SCALE, BIAS))


def test_nothing_is_traced_again():
  table.assert_traced_once(f, (X, SCALE, BIAS))


# Errors


@pytest.mark.parametrize(
  ("given", "error", "says"),
  [
    ({"prior": -1.0}, ValueError, "prior=-1.0 is out of range: it is a number of examples"),
    ({"prior": np.nan}, ValueError, "prior=nan is out of range"),
    ({"prior": "16"}, TypeError, "prior='16' is not a number"),
    ({"state": None}, TypeError, "state is a NoneType"),
    ({"choose": 1}, TypeError, "multiple values for keyword argument 'choose'"),
    ({"x": X.astype(int)}, TypeError, "x has dtype int64"),
  ],
  ids=str,
)
def test_what_cannot_be_is_refused(given, error, says):
  with pytest.raises(error, match=says):
    predict(**given)
