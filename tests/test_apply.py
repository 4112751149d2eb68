"""normalize: the formula against the oracle, whatever the layout, dtype and mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import jaxbn
from tests import bounds, oracle
from tests.cases import DTYPES, channels, precision

LAYOUTS = [
  ((6,), -1),
  ((6,), ()),
  ((8, 3), -1),
  ((8, 3), 0),
  ((4, 3, 2), 1),
  ((4, 3, 2), (0, -1)),
  ((2, 4, 3, 5), -1),
  ((2, 5, 4, 3), -3),
  ((2, 3, 2, 3, 2), (1, 3)),
  ((2, 3, 2, 3, 2), (-1, 0, -2)),
]


def inputs(shape, axis, dtype, seed=0):
  """x and per channel mean, var, scale, bias (float32 at least)."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(0.5, 2, shape), dtype)
  of_channels = channels(shape, axis)
  parameters = [
    rng.normal(0.5, 1, of_channels),
    rng.uniform(0.1, 4, of_channels),
    rng.normal(1, 0.5, of_channels),
    rng.normal(0, 1, of_channels),
  ]
  return x, *(jnp.asarray(p, bounds.accumulator(dtype)) for p in parameters)


def check(y, x, mean, var, scale, bias, epsilon=1e-5, axis=-1, where=True):
  expected = oracle.normalize(x, mean, var, scale, bias, epsilon, axis)
  scaled_z = oracle.normalize(x, mean, var, scale, None, epsilon, axis)
  bias = 0 if bias is None else oracle.expand(oracle.wide(bias), x, axis)
  bounds.assert_within(
    y, expected, bounds.normalized(expected, scaled_z, bias, x.dtype, y.dtype), where
  )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_is_the_formula_in_every_layout_and_dtype(shape, axis, dtype):
  with precision(dtype):
    x, *parameters = inputs(shape, axis, dtype)
    y = jax.jit(lambda *a: jaxbn.normalize(*a, axis=axis, dtype=dtype))(x, *parameters)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    check(y, x, *parameters, axis=axis)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_scale_and_bias_may_be_left_out(has_scale, has_bias, epsilon):
  x, mean, var, scale, bias = inputs((8, 3), -1, jnp.float32)
  scale, bias = (scale if has_scale else None), (bias if has_bias else None)
  y = jaxbn.normalize(x, mean, var, scale, bias, epsilon=epsilon)
  check(y, x, mean, var, scale, bias, epsilon)


def test_complex_input_is_shifted_by_a_complex_mean_and_scaled_by_a_real_deviation():
  x, mean, var, scale, bias = inputs((8, 3), -1, jnp.float32)
  x, mean, bias = x + 1j * x[::-1], mean - 2j * mean, bias + 1j
  y = jaxbn.normalize(x, mean, var, scale, bias)
  assert y.dtype == jnp.complex64
  check(y, x, mean, var, scale, bias)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e6])
def test_a_large_mean_costs_nothing_when_it_is_given(ratio):
  # x - mean is exact for values so close together (Sterbenz): the bound has no |mean| in it.
  x, mean, var, scale, bias = inputs((64, 3), -1, jnp.float32)
  x, mean = x + ratio, mean + ratio
  check(jax.jit(jaxbn.normalize)(x, mean, var, scale, bias), x, mean, var, scale, bias)


layouts = st.sampled_from(LAYOUTS)


@settings(max_examples=16)  # each compiles a program
@given(layout=layouts, dtype=st.sampled_from(DTYPES[:3]), seed=st.integers(0, 999), data=st.data())
def test_a_mask_leaves_valid_positions_as_they_were(layout, dtype, seed, data):
  shape, axis = layout
  x, *parameters = inputs(shape, axis, dtype, seed)
  kept = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
  mask_shape = tuple(n if keep else 1 for n, keep in zip(shape, kept, strict=True))
  mask = np.random.default_rng(seed).random(mask_shape) < 0.6
  garbage = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 6e4]))
  dirty = jnp.where(mask, x, garbage).astype(dtype)
  masked_value = data.draw(st.sampled_from([None, 0.0, -3.0]))
  options = {"axis": axis, "masked_value": masked_value, "dtype": dtype}
  y = jax.jit(lambda x, mask, p: jaxbn.normalize(x, *p, mask=mask, **options))(
    dirty, mask, parameters
  )
  where = np.broadcast_to(mask, shape)
  check(y, x, *parameters, axis=axis, where=where)
  if masked_value is not None:
    assert np.all(oracle.wide(y)[~where] == masked_value)
  elif not np.isfinite(garbage):
    bias = np.broadcast_to(oracle.expand(np.asarray(parameters[-1]), x, axis), shape)
    np.testing.assert_array_equal(np.asarray(y)[~where], bias.astype(y.dtype)[~where])


def test_a_finite_masked_element_keeps_the_value_of_the_formula():
  x, *parameters = inputs((8, 3), -1, jnp.float32)
  mask = np.arange(8)[:, None] < 5
  check(jaxbn.normalize(x, *parameters, mask=mask), x, *parameters)


def test_a_masked_element_too_large_for_the_output_dtype_holds_bias():
  # Finite in float32, where the formula is computed, but not in the float16 that is given back.
  x = jnp.array([[60000.0], [0.0]], jnp.float16)
  half = jnp.float16
  y = jaxbn.normalize(
    x, jnp.zeros(1), jnp.full(1, 1e-4), None, jnp.ones(1), mask=[[False], [True]], dtype=half
  )
  np.testing.assert_array_equal(y, [[1.0], [1.0]])


@pytest.mark.parametrize("masked_value", [None, 0.0])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
def test_masked_elements_reach_no_gradient(garbage, masked_value):
  x, *parameters = inputs((6, 3), -1, jnp.float32)
  mask = np.arange(18).reshape(6, 3) % 4 > 0

  def gradients(x):
    def loss(x, mean, var, scale, bias):
      y = jaxbn.normalize(x, mean, var, scale, bias, mask=mask, masked_value=masked_value)
      return jnp.sum(jnp.where(mask, jnp.cos(y), 0))

    return jax.grad(loss, range(5))(x, *parameters)

  clean, dirty = gradients(x), gradients(jnp.where(mask, x, garbage))
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)
  assert not np.any(np.asarray(dirty[0])[~mask])


def test_a_masked_value_gets_no_gradient_even_if_the_loss_reads_it():
  x, *parameters = inputs((6, 3), -1, jnp.float32)
  mask = np.arange(6)[:, None] < 4

  def gradients(x, positions):
    def loss(x, *p):
      y = jaxbn.normalize(x, *p, mask=mask, masked_value=0.0)
      return jnp.sum(jnp.where(positions, jnp.cos(y), 0))

    return jax.grad(loss, range(5))(x, *parameters)

  jax.tree.map(
    np.testing.assert_array_equal, gradients(x.at[5].set(np.nan), True), gradients(x, mask)
  )


@pytest.mark.parametrize("parameter", range(5), ids=["x", "mean", "var", "scale", "bias"])
def test_gradients_are_those_of_finite_differences(parameter):
  with jax.enable_x64(True):
    arguments = list(inputs((5, 3), -1, jnp.float64))

    @jax.jit
    def loss(value):
      given = [*arguments[:parameter], value, *arguments[parameter + 1 :]]
      return jnp.sum(jnp.sin(jaxbn.normalize(*given)))

    check_grads(loss, (arguments[parameter],), order=2, rtol=1e-5)


PROMOTION = [
  (jnp.float16, None, jnp.float16),
  (jnp.float16, jnp.float16, jnp.float16),
  (jnp.float16, jnp.float32, jnp.float32),
  (jnp.bfloat16, jnp.float16, jnp.float32),
  (jnp.bfloat16, jnp.float32, jnp.float32),
  (jnp.float32, jnp.bfloat16, jnp.float32),
]


@pytest.mark.parametrize(("x_dtype", "scale_dtype", "expected"), PROMOTION)
def test_the_default_dtype_is_what_x_scale_and_bias_promote_to(x_dtype, scale_dtype, expected):
  x, mean, var, scale, _ = inputs((8, 3), -1, x_dtype)
  scale = None if scale_dtype is None else scale.astype(scale_dtype)
  assert jaxbn.normalize(x, mean, var, scale).dtype == expected


def test_half_precision_output_is_rounded_once():
  # Of a float32 result: the half-precision input alone decides nothing about the arithmetic.
  x, *parameters = inputs((64, 3), -1, jnp.bfloat16)
  once = jaxbn.normalize(x.astype(jnp.float32), *parameters).astype(jnp.bfloat16)
  np.testing.assert_array_equal(jaxbn.normalize(x, *parameters, dtype=jnp.bfloat16), once)


def test_numpy_arrays_and_lists_are_accepted():
  x, *parameters = inputs((4, 3), -1, jnp.float32)
  expected = jaxbn.normalize(x, *parameters)
  for convert in (np.asarray, lambda a: np.asarray(a).tolist()):
    y = jaxbn.normalize(convert(x), *map(convert, parameters))
    np.testing.assert_array_equal(y, expected)


CHANNELS = r"has shape \(4,\), but x of shape \(8, 3\) has channels of shape \(3,\)"
BAD = jnp.ones(4)
REFUSED = {
  "integer": (lambda n, x: n(x.astype(int)), TypeError, r"x has dtype int32.*astype"),
  "mean": (lambda n, x: n(x, mean=BAD), ValueError, f"^mean {CHANNELS}.*pass mean"),
  "var": (lambda n, x: n(x, var=BAD), ValueError, f"^var {CHANNELS}.*pass var"),
  "scale": (lambda n, x: n(x, scale=BAD), ValueError, f"^scale {CHANNELS}.*pass scale"),
  "bias": (lambda n, x: n(x, bias=BAD), ValueError, f"^bias {CHANNELS}.*pass bias"),
  "axis": (lambda n, x: n(x, axis=2), ValueError, r"axis=2 is out of range.*less than 2"),
  "axis-twice": (lambda n, x: n(x, axis=(1, -1)), ValueError, r"axis=\(1, -1\).*twice.*once"),
  "mask-dtype": (
    lambda n, x: n(x, mask=jnp.ones((8, 1))),
    TypeError,
    r"mask has dtype float32.*mask != 0",
  ),
  "mask-shape": (
    lambda n, x: n(x, mask=jnp.ones(8, bool)),
    ValueError,
    r"mask of shape \(8,\) does not broadcast.*\(8, 3\).*mask\[\.\.\., None\]",
  ),
  "masked-value": (
    lambda n, x: n(x, masked_value=7.0),
    ValueError,
    r"masked_value=7\.0.*pass mask",
  ),
  "epsilon": (lambda n, x: n(x, epsilon=-1.0), ValueError, r"epsilon=-1\.0 is out of range.*1e-5"),
  "dtype": (lambda n, x: n(x, dtype=jnp.int32), TypeError, r"dtype=.*int32.*floating-point"),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name, jit):
  call, error, message = REFUSED[name]

  def normalize(x, mean=jnp.zeros(3), var=jnp.ones(3), **options):  # noqa: B008 (arrays are immutable)
    return jaxbn.normalize(x, mean, var, **options)

  def refused(x):
    return call(normalize, x)

  with pytest.raises(error, match=message):
    (jax.jit(refused) if jit else refused)(jnp.ones((8, 3)))


def test_half_precision_statistics_are_used_in_single_precision():
  # In bfloat16, 1 + 1e-5 is 1 and rsqrt(0.7) has three digits.
  x, mean, var = np.float32([[0.5, 2.0]]), jnp.bfloat16([0.25, 1.0]), jnp.bfloat16([1.0, 0.7])
  y = jaxbn.normalize(x, mean, var)
  np.testing.assert_allclose(y, oracle.normalize(x, mean, var), rtol=8 * 2**-24)
