"""What normalizes where it is not the batch's own: `choose=`, and what differs between examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import oracle
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 3, 2))
SCALE, BIAS = RNG.normal(1, 0.3, (2, 2))
PER_EXAMPLE = RNG.normal(1, 0.3, (2, 8, 1, 2))
STATE = jaxbn.RunningStats(np.array([0.5, -1.0]), np.array([2.0, 0.5]))
TRAINING = {"use_running_average": False}


def halfway(batch, state):
  """Means and variances between the batch's and the running ones, with a correction of z."""
  mean, var = (batch.mean + state.mean) / 2, (batch.var + state.var) / 2
  return jaxbn.Chosen(mean, var, jnp.sqrt(batch.var), batch.mean)


def halfway_formula(x, scale, bias):
  batch_mean, batch_var = x.mean((0, 1)), x.var((0, 1))
  mean, var = (batch_mean + STATE.mean) / 2, (batch_var + STATE.var) / 2
  z = (x - mean) / jnp.sqrt(var + 1e-5) * jnp.sqrt(batch_var) + batch_mean
  return z * scale + bias


def layer(x, scale=None, bias=None, state=STATE, **options):
  return jaxbn.batch_norm(x, scale, bias, state, **TRAINING, **options)


def chosen(axis_name=None, **options):
  options |= {"choose": halfway, "axis_name": axis_name}
  return lambda x, scale, bias: layer(x, scale, bias, **options)[0]


# Values


def test_what_is_chosen_normalizes_and_the_batch_is_tracked():
  y, state = layer(X, SCALE, BIAS, choose=halfway)
  np.testing.assert_allclose(y, halfway_formula(X, SCALE, BIAS), rtol=1e-12, atol=1e-12)
  _, tracked = layer(X)
  np.testing.assert_array_equal(state.mean, tracked.mean)
  np.testing.assert_array_equal(state.var, tracked.var)


@pytest.mark.parametrize("scale", [SCALE, None, PER_EXAMPLE[0]], ids=["scale", "none", "examples"])
@pytest.mark.parametrize("bias", [BIAS, None, PER_EXAMPLE[1]], ids=["bias", "none", "examples"])
@pytest.mark.parametrize("correction", ["both", "scale", "bias", "aligned"])
def test_the_correction_is_within_scale_and_bias(scale, bias, correction):
  r, d = {
    "both": ([2.0, 3.0], [0.5, 0.25]),
    "scale": ([2.0, 3.0], None),
    "bias": (None, [0.5, 0.25]),
    "aligned": (PER_EXAMPLE[1], [0.5, 0.25]),
  }[correction]
  r, d = (None if v is None else np.asarray(v) for v in (r, d))

  def choose(batch, state):
    return jaxbn.Chosen(batch.mean, batch.var, r, d)

  z = np.asarray(layer(X)[0])
  z = z if r is None else z * r
  z = z if d is None else z + d
  expected = z * (1 if scale is None else scale) + (0 if bias is None else bias)
  y = layer(X, scale, bias, choose=choose)[0]
  np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_in_evaluation_the_running_statistics_normalize():
  y, _ = jaxbn.batch_norm(X, SCALE, BIAS, STATE, use_running_average=True, choose=halfway)
  np.testing.assert_allclose(y, oracle.normalize(X, *STATE[:2], SCALE, BIAS), rtol=1e-12)


def test_detached_statistics_reach_choose_detached():
  def loss(x):
    return jnp.sum(layer(x, choose=lambda b, s: halfway(b, s), detach_stats=True)[0] ** 2)

  def plain(x):
    batch = jax.lax.stop_gradient((x.mean((0, 1)), x.var((0, 1))))
    mean, var = ((b + s) / 2 for b, s in zip(batch, STATE[:2], strict=True))
    return jnp.sum(((x - mean) / jnp.sqrt(var + 1e-5) * jnp.sqrt(batch[1]) + batch[0]) ** 2)

  np.testing.assert_allclose(jax.grad(loss)(X), jax.grad(plain)(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_in_virtual_batches_groups_choose_for_themselves(axis):
  # The axis of the channels may lie before or behind that of the examples.
  examples = 1 if axis == 0 else 0
  x = RNG.normal(1, 2, (4, 4, 4))
  state = jaxbn.RunningStats(np.arange(4.0), np.arange(1.0, 5.0))
  options = {"choose": halfway, "axis": axis, "state": state}
  y, _ = layer(x, virtual_batch_size=2, **options)
  for first in (0, 2):
    part = np.take(x, (first, first + 1), examples)
    alone = layer(part, **options)[0]
    np.testing.assert_allclose(np.take(y, (first, first + 1), examples), alone, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parameters_of_examples_go_with_their_virtual_batches(size):
  y, _ = layer(X, *PER_EXAMPLE, virtual_batch_size=size)
  z, _ = layer(X, virtual_batch_size=size)
  np.testing.assert_allclose(y, z * PER_EXAMPLE[0] + PER_EXAMPLE[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mean", "var", "scale", "bias"])
def test_normalize_takes_each_per_example(name):
  given = {"mean": STATE.mean, "var": STATE.var, "scale": SCALE, "bias": BIAS}
  per_example = given | {name: PER_EXAMPLE[0] ** 2}
  y = jaxbn.normalize(X, **per_example)
  for i in range(len(X)):
    one = jaxbn.normalize(X[i], **given | {name: per_example[name][i, 0]})
    np.testing.assert_allclose(y[i], one, rtol=1e-12, atol=1e-12)


def test_a_masked_example_reaches_no_gradient_of_what_differs_between_examples():
  mask = np.arange(8) != 3
  x = np.where(mask[:, None, None], X, np.nan)

  def loss(x, scale, bias):
    return layer(x, scale, bias, mask=mask[:, None, None], masked_value=0.0)[0].sum()

  d_x, d_scale, d_bias = jax.grad(loss, (0, 1, 2))(x, *PER_EXAMPLE)
  for gradient in (d_x, d_scale, d_bias):
    assert np.isfinite(gradient).all()
    assert not gradient[3].any()


# Every transformation


def test_transformations_of_a_choice():
  table.compare_all(chosen(), halfway_formula, (X, SCALE, BIAS))


def plain_formula(x, scale, bias):
  return (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5) * scale + bias


def with_activation(f):
  return lambda *args: jax.nn.silu(f(*args))


# With an activation and without, in turns: test_transforms.py has both for parameters of channels.
@pytest.mark.parametrize("activation", [None, jax.nn.silu], ids=["plain", "silu"])
def test_transformations_of_parameters_per_example(activation):
  def f(x, *parameters):
    return layer(x, *parameters, activation=activation)[0]

  formula = plain_formula if activation is None else with_activation(plain_formula)
  transforms = tuple(table.TRANSFORMS)[activation is not None :: 2]
  table.compare_all(f, formula, (X, *PER_EXAMPLE), transforms=transforms)


def test_transformations_of_statistics_per_example():
  def formula(x, mean, var, scale):
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale

  args = (X, PER_EXAMPLE[0], PER_EXAMPLE[1] ** 2, SCALE)
  transforms = "jit", "grad", "jvp", "grad of grad"
  table.compare_all(jaxbn.normalize, formula, args, transforms=transforms)


@pytest.mark.parametrize("devices", table.DEVICES)
def test_on_devices(devices):
  table.compare_on_devices(devices, chosen, halfway_formula, (X, SCALE, BIAS))


def test_nothing_is_traced_again():
  table.assert_traced_once(chosen(), (X, SCALE, BIAS))


# Errors


def refused(error, match, f, *args, **options):
  with pytest.raises(error, match=match):
    f(*args, **options)


def test_what_cannot_be_chosen_is_refused():
  options = functools.partial(layer, X)
  refused(TypeError, "choose='batch' is not a function", options, choose="batch")
  refused(TypeError, r"gave a tuple; it has to give a jaxbn\.Chosen", options, choose=lambda *_: ())
  wrong = lambda b, s: jaxbn.Chosen(b.mean, b.var, np.ones(5))  # noqa: E731
  refused(ValueError, r"scale of choose has shape \(5,\)", options, choose=wrong)


def test_parameters_that_fit_neither_channels_nor_examples_are_refused():
  refused(ValueError, r"scale has shape \(8, 2\).* give it 3 axes", layer, X, np.ones((8, 2)))
  refused(ValueError, r"scale has shape \(7, 1, 2\)", layer, X, np.ones((7, 1, 2)))
