"""Measure: moments against the float64 oracle, to derived tolerances."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
from jaxbn import Moments
from tests import bounds, oracle
from tests.moments import (
  assert_gradient,
  assert_within,
  measure,
  measured_within,
  on_device,
  samples,
  shared_within,
  total,
  unit_roundoff,
)

# ---------------------------------------------------------------------------------------------
# moments, against the oracle


@st.composite
def broadcast_shapes(draw, shape):
  """Any shape that broadcasts against `shape`: ones anywhere, leading ones left out."""
  sizes = [n if draw(st.booleans()) else 1 for n in shape]
  leading = next((i for i, n in enumerate(sizes) if n != 1), len(sizes))
  return tuple(sizes[draw(st.integers(0, leading)) :])


@st.composite
def batches(draw):
  """(x, axis, mask, weights) of any rank from 1 to 5; NaN wherever x is left out."""
  shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
  dtype = draw(st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]))
  axes = draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
  axis = tuple(a - len(shape) if draw(st.booleans()) else a for a in axes)
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  x = samples(rng, shape, draw(st.sampled_from([0.0, -3.0, 100.0])), dtype)
  mask = weights = None
  if draw(st.booleans()):
    mask = rng.random(draw(broadcast_shapes(shape))) < draw(st.sampled_from([0.2, 0.8]))
  if draw(st.booleans()):
    weights = rng.integers(0, 4, draw(broadcast_shapes(shape))).astype(np.float32)
  x = np.where(oracle.weights_of(x, mask, weights) > 0, x, np.asarray(np.nan, dtype))
  return x, axis[0] if len(axis) == 1 and draw(st.booleans()) else axis, mask, weights


@settings(max_examples=25)
@given(batches(), st.booleans())
def test_moments_match_the_oracle(batch, fast):
  x, axis, mask, weights = batch
  got = measure(x, axis=axis, mask=mask, weights=weights, use_fast_variance=fast)
  exact = oracle.moments(x, axis, mask, weights)
  n = x.size // max(1, exact.mean.size)
  chex.assert_type(got.mean, jnp.promote_types(x.dtype, jnp.float32))
  chex.assert_type(got.var, jnp.float32)
  # The pivot is an element: at most sqrt(n - 1) standard deviations away, with weights up to 3.
  farthest = exact.mean + np.sqrt(3 * n * exact.var)
  assert_within(got, exact, measured_within(exact, farthest, n, x.dtype, fast))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_double_precision_stays_double(dtype, fast):
  with jax.enable_x64(True):
    x = samples(0, (64, 3), 1e6, dtype)
    mask = np.arange(64)[:, None] % 3 > 0
    got = measure(x, mask=mask, use_fast_variance=fast)
    chex.assert_type([got.mean, got.var, got.count], [dtype, np.float64, np.int32])
    exact = oracle.moments(x, mask=mask)
    assert_within(got, exact, measured_within(exact, x[1], 64, dtype, fast))


@pytest.mark.parametrize("axis", [1, -2, (1,), [np.int64(-2)], np.array([1])])
def test_axis_may_be_said_in_many_ways(axis):
  x = samples(0, (4, 3, 2))
  got = jax.jit(lambda x: jaxbn.moments(x, axis=axis))(x)
  chex.assert_trees_all_equal(got, measure(x, axis=1))


def test_several_axes_are_taken_in_the_order_of_x():
  x = samples(0, (4, 3, 2))
  got = measure(x, axis=(-1, 1))
  chex.assert_shape(got.mean, (3, 2))
  chex.assert_trees_all_equal(got, measure(x, axis=(1, 2)))


def test_any_pivot_gives_the_same_moments():
  x = samples(0, (50, 3), 10.0)
  exact, pivot = oracle.moments(x), np.float32([9, 30, -5])
  assert_within(measure(x, pivot=pivot), exact, measured_within(exact, pivot, 50, x.dtype))


# ---------------------------------------------------------------------------------------------
# Accuracy where the mean is large


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("ratio", [1e3, -1e4, 1e6])
def test_the_variance_keeps_its_digits_far_from_zero(ratio, fast):
  x = samples(0, (4096, 4), ratio)
  exact = oracle.moments(x)
  tolerances = measured_within(exact, x[0], 4096, x.dtype, fast)
  assert np.all(tolerances[1] < 1e-4 * (1 + (exact.mean - x[0]) ** 2))  # the claim is a strong one
  assert_within(measure(x, use_fast_variance=fast), exact, tolerances)


@pytest.mark.parametrize("masked", [False, True])
def test_an_outlier_in_first_place_costs_what_samuelson_allows(masked):
  # The farthest an element can be: sqrt(n - 1) standard deviations, so var loses a factor of n.
  x = samples(0, (1024, 1)) * 1e-3
  x[0] = 1e3
  exact = oracle.moments(x)
  mask = np.ones((1024, 1), bool) if masked else None
  assert np.abs(x[0] - exact.mean) > 0.99 * np.sqrt(1023 * exact.var)
  assert_within(measure(x, mask=mask), exact, measured_within(exact, x[0], 1024, x.dtype))
  two = measure(x, mask=mask, use_fast_variance=False)
  assert_within(two, exact, measured_within(exact, x[0], 1024, x.dtype, fast=False))


def test_one_and_two_passes_agree_on_benign_data():
  x = samples(0, (512, 4), 1.0)
  one, two = measure(x), measure(x, use_fast_variance=False)
  chex.assert_trees_all_equal(one.mean, two.mean)
  tolerance = 2 * measured_within(oracle.moments(x), x[0], 512, x.dtype)[1]
  assert np.all(np.abs(one.var - two.var) <= tolerance)


@pytest.mark.parametrize("axis", [-1, 1, (1, 3), ()])
def test_with_a_mask_the_pivot_is_an_element_that_exists(axis):
  # A tenth exist, at 1e4 deviations; all others are NaN, and a pivot of 0 would lose every digit.
  # It is at most sqrt(n) deviations away: R^2 <= (1 + n) var, in the tolerance for n elements.
  rng = np.random.default_rng(0)
  x = (1e4 + rng.normal(size=(20, 3, 7, 2))).astype(np.float32)
  mask = rng.random(x.shape) < 0.1
  found = jaxbn.moments(np.where(mask, x, np.float32(np.nan)), axis=axis, mask=mask)
  right = oracle.moments(x, axis, mask)
  n = right.count
  allowed = (3 * n + 18) * unit_roundoff(np.float32) * (1 + n) * right.var
  bounds.assert_within(found.var, right.var, allowed)


# ---------------------------------------------------------------------------------------------
# Counts


def count_when_traced(shape, **kwargs):
  seen = []
  x = jax.ShapeDtypeStruct(shape, jnp.float16)
  jax.eval_shape(lambda x: seen.append(jaxbn.moments(x, **kwargs).count), x)
  return seen[0]


def test_a_count_that_follows_from_shapes_is_a_numpy_number():
  count = count_when_traced((2**24 + 3, 2))
  assert type(count) is np.int32
  assert count == 2**24 + 3


def test_more_elements_than_int32_holds_are_counted_in_floating_point():
  count = count_when_traced((2**16, 2**15, 2))
  assert type(count) is np.float32
  assert count == 2.0**31


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_weights_of_half_precision_elements_are_summed_in_single(dtype):
  # In float16 a sum ends at 65504, in bfloat16 it has 8 bits.
  rng = np.random.default_rng(0)
  x = np.asarray(rng.normal(3, 1, (100_000, 2)), dtype)
  weights = rng.uniform(0.5, 2, x.shape).astype(np.float32)
  got, exact = jaxbn.moments(x, weights=weights), oracle.moments(x, weights=weights)
  error = 2 * bounds.summing(len(x), bounds.roundoff(np.float32))  # of a numerator and a count
  np.testing.assert_allclose(got.count, exact.count, rtol=error)
  np.testing.assert_allclose(got.mean, exact.mean, rtol=error)
  np.testing.assert_allclose(got.var, exact.var, rtol=2 * error)


@pytest.mark.parametrize(
  ("mask_shape", "count_shape"),
  [((), ()), ((1, 1, 1), ()), ((5, 1, 1), ()), ((5, 4, 1), ()), ((3,), (3,)), ((5, 4, 3), (3,))],
)
@pytest.mark.parametrize("name", ["mask", "weights"])
def test_a_count_has_a_channel_axis_only_where_channels_differ(name, mask_shape, count_shape):
  x, kept = np.ones((5, 4, 3), np.float32), np.zeros(mask_shape, np.float32)
  kept = kept > 0 if name == "mask" else kept
  count = jax.eval_shape(lambda x, kept: jaxbn.moments(x, **{name: kept}), x, kept).count
  assert count.shape == count_shape
  assert count.dtype == (jnp.int32 if name == "mask" else jnp.float32)


def test_a_count_broadcasts_against_several_channel_axes():
  mask = np.ones((1, 3, 1), bool)
  got = measure(np.ones((5, 3, 2), np.float32), axis=(1, 2), mask=mask)
  chex.assert_shape([got.count, got.mean], [(3, 1), (3, 2)])


@pytest.mark.parametrize("repeated", [False, True])
def test_masked_counts_are_exact_past_2_to_the_24(repeated):
  # 2**24 + 1 is the first integer that float32 lacks. A mask may be counted before it is repeated.
  shape, mask_shape = ((4099, 4097, 1), (4099, 1, 1)) if repeated else ((2**24 + 3, 1),) * 2

  @jax.jit
  def count(one):
    position = jax.lax.broadcasted_iota(jnp.int32, mask_shape, 0)
    return jaxbn.moments(jnp.broadcast_to(one, shape), mask=position > 1)

  got = count(jnp.ones((), jnp.float16))
  assert got.count.dtype == jnp.int32
  assert got.count == (4097 * 4097 if repeated else 2**24 + 1)
  assert got.mean == 1
  assert got.var == 0


# ---------------------------------------------------------------------------------------------
# What is masked does not exist

MASKS = {
  "first": np.repeat([[False], [True], [True], [True]], 3, axis=1),
  "channel": np.repeat([[True, False, True]], 4, axis=0),
  "per channel": np.array([[1, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, 0]], bool),
  "all": np.zeros((4, 3), bool),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


gradient_of_total = jax.jit(jax.grad(total), static_argnames="fast")
hessian_of_total = jax.jit(jax.hessian(total))


@every_mask
@pytest.mark.parametrize("name", ["mask", "weights"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_what_is_left_out_reaches_no_statistic_and_no_gradient(mask, name, garbage):
  x = samples(0, (4, 3))
  dirty = np.where(mask, x, np.float32(garbage))
  left_out = mask if name == "mask" else 2 * mask.astype(np.float32)
  got = measure(dirty, **{name: left_out})
  chex.assert_trees_all_equal(got, measure(x, **{name: left_out}))
  for fast in (True, False):
    gradient = gradient_of_total(dirty, fast=fast, **{name: left_out})
    assert np.all(np.isfinite(gradient))
    assert np.all(np.where(mask, 0, gradient) == 0)


@every_mask
def test_what_is_left_out_reaches_no_second_derivative(mask):
  dirty = np.where(mask, samples(0, (4, 3)), np.float32(np.nan))
  hessian = np.asarray(hessian_of_total(dirty, mask))
  assert np.all(np.isfinite(hessian))
  assert np.all(hessian[~mask] == 0)
  assert np.all(hessian[..., ~mask] == 0)


def test_masks_may_differ_under_vmap():
  masks = np.stack(list(MASKS.values()))
  x = np.where(masks, samples(0, (4, 4, 3)), np.float32(np.nan))
  stats = jax.jit(jax.vmap(lambda x, mask: jaxbn.moments(x, mask=mask)))(x, masks)
  gradients = jax.jit(jax.vmap(jax.grad(total)))(x, masks)
  for i in range(4):
    chex.assert_trees_all_close(on_device(stats, i), measure(x[i], mask=masks[i]), rtol=4 * 2**-24)
  assert np.all(np.isfinite(gradients))
  assert np.all(gradients[~masks] == 0)


def test_a_weight_of_zero_gets_no_gradient_from_its_element():
  x = np.float32([[1.0], [3.0], [np.nan]])
  weights = np.float32([[1.0], [1.0], [0.0]])
  gradient = jax.jit(jax.grad(lambda w: measure(x, weights=w).mean[0]))(weights)
  # d mean / dw = (x - mean) / count, in powers of two.
  np.testing.assert_array_equal(gradient, [[-0.5], [0.5], [0.0]])


@functools.partial(jax.jit, static_argnames="fast")
@jax.grad
def gradient_of_both(x, a, b, kept, fast):
  stats = jaxbn.moments(x, use_fast_variance=fast, **kept)
  return jnp.sum(a * stats.mean + b * stats.var)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 1e4])
@pytest.mark.parametrize("left_out", ["none", "mask", "weights"])
def test_gradients_are_the_analytic_ones(fast, ratio, left_out):
  x = samples(0, (32, 3), ratio)
  rng = np.random.default_rng(1)
  kept = {
    "none": {},
    "mask": {"mask": rng.random((32, 3)) < 0.7},
    "weights": {"weights": rng.integers(0, 3, (32, 1)).astype(np.float32)},
  }[left_out]
  a, b = np.float32([1, 0, -2]), np.float32([0, 1, 3])

  gradient = gradient_of_both(x, a, b, kept, fast)
  farthest = np.float64(ratio) + 4  # the pivot is an element, and none is further away
  assert_gradient(gradient, x, a, b, farthest, **kept)


@pytest.mark.parametrize(
  ("kind", "fast"),
  [
    ("plain", True),
    ("plain", False),
    ("masked", True),
    ("weighted", True),
    ("shared", True),
    ("shared weights", True),
  ],
)
def test_first_and_second_derivatives_by_finite_differences(kind, fast):
  with jax.enable_x64(True):
    x, direction = (samples(i, (4, 6, 1), 1.0 - i, np.float64) for i in range(2))
    a, b = 0.7, -1.3

    def loss(x):
      if kind.startswith("shared"):
        weights = (1 + x) ** 2 if kind == "shared weights" else None
        own = jax.vmap(lambda x, w: jaxbn.moments(x, weights=w))(x, weights)
        mean, var = jax.vmap(lambda m: jaxbn.sync(m, "i"), axis_name="i")(own)[1:]
        return jnp.sum(jnp.arange(4)[:, None] * (a * mean + b * mean * var))
      kept = {
        "plain": {},
        "masked": {"mask": np.arange(6)[:, None] % 4 > 0},
        "weighted": {"weights": (1 + x[1]) ** 2},  # so that they are differentiated as well
      }[kind]
      stats = jaxbn.moments(x[0], use_fast_variance=fast, **kept)
      return jnp.sum(a * stats.mean + b * stats.mean * stats.var)

    gradient = jax.grad(loss)
    along = jax.jit(lambda x: (loss(x), gradient(x)))
    wanted = jax.jit(lambda x: jax.jvp(gradient, (x,), (direction,)))(x)
    # Central differences are off by step^2 times third derivatives, and by u / step: of order one
    # here, and at most a few thousand with weights, which are divided by their sum.
    step = 1e-5
    (f_hi, g_hi), (f_lo, g_lo) = along(x + step * direction), along(x - step * direction)
    np.testing.assert_allclose((f_hi - f_lo) / (2 * step), np.vdot(wanted[0], direction), rtol=1e-6)
    np.testing.assert_allclose((g_hi - g_lo) / (2 * step), wanted[1], rtol=1e-6, atol=1e-6)


def test_forward_and_reverse_mode_agree():
  x, tangent = samples(0, (2, 20, 3), 10.0)
  cotangent = tuple(samples(1, (2, 3)))

  @jax.jit
  def both(x, tangent, cotangent):
    def stats(x):
      return jaxbn.moments(x)[1:]

    return jax.jvp(stats, (x,), (tangent,))[1], jax.vjp(stats, x)[1](cotangent)[0]

  forward, backward = both(x, tangent, cotangent)
  one = sum(np.vdot(c, t) for c, t in zip(cotangent, forward, strict=True))
  # Both are sums of the same 60 products, each with fewer than 30 roundings.
  size = np.abs(backward).ravel() @ np.abs(tangent).ravel()
  assert abs(one - np.vdot(backward, tangent)) <= 90 * 2**-24 * size


@pytest.mark.parametrize("fast", [True, False])
def test_a_constant_channel_has_the_second_derivative_of_any_other(fast):
  hessian = jax.jit(jax.hessian(lambda x: total(x[:, None], fast=fast)))
  # d2 var / dx_i dx_j = 2 (delta_ij - 1/n) / n: powers of two for n = 4.
  wanted = 2 * (np.eye(4) - 0.25) / 4
  np.testing.assert_array_equal(hessian(jnp.ones(4)), wanted)


def test_the_pivot_takes_no_part_in_gradients():
  # Its share in the mean would cancel up to rounding, which 7 elements and a pivot of 0.3 leave.
  x = samples(0, (7, 3), 1.0)

  def loss(pivot):
    return sum(jnp.sum(leaf) for leaf in jaxbn.moments(x, pivot=pivot)[1:])

  np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.full(3, 0.3)), np.zeros(3))


# ---------------------------------------------------------------------------------------------
# Special values


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("value", [0.1, -60000.0, 1e-30, 1e30])
@pytest.mark.parametrize("fast", [True, False])
def test_a_constant_channel_has_variance_zero(dtype, value, fast):
  value = jnp.clip(jnp.float32(value), -6e4, 6e4) if dtype == jnp.float16 else value
  got = measure(jnp.full((1000, 2), value, dtype), use_fast_variance=fast)
  np.testing.assert_array_equal(got.mean, jnp.full(2, value, dtype).astype(got.mean.dtype))
  np.testing.assert_array_equal(got.var, np.zeros(2))


def test_one_element_is_its_own_mean():
  x = samples(0, (1, 3), 1e5)
  chex.assert_trees_all_equal(measure(x), Moments(np.int32(1), x[0], np.zeros(3, np.float32)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_does_not_overflow(dtype):
  # Squares and sums are far beyond float16's 65504; bfloat16's own values leave exact squares.
  x = np.asarray([[60000.0], [-60000.0]] * 512).astype(dtype)
  exact = oracle.moments(x)
  got = measure(x)
  chex.assert_type([got.mean, got.var], jnp.float32)
  assert_within(got, exact, measured_within(exact, x[0], 1024, dtype))


def test_numbers_too_small_for_normal_ones_are_within_the_smallest():
  x = np.float32([[1e-40, 1e-39], [3e-40, 1.0]])
  exact = oracle.moments(x)
  assert_within(measure(x), exact, measured_within(exact, x[0], 2, x.dtype))


@pytest.mark.parametrize("fast", [True, False])
def test_squares_that_overflow_give_an_infinite_variance(fast):
  x = np.float32([[1e30], [-1e30], [3e30], [1e30]])
  got = measure(x, use_fast_variance=fast)
  np.testing.assert_allclose(got.mean, [1e30], rtol=16 * 2**-24)
  np.testing.assert_array_equal(got.var, [np.inf])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_not_finite_stays_in_its_channel(value, place):
  x = samples(0, (4, 3))
  dirty = x.copy()
  dirty[place, 1] = value
  clean, got = measure(x), measure(dirty)
  assert not np.isfinite(got.mean[1])
  assert not np.isfinite(got.var[1])
  for a, b in zip(clean[1:], got[1:], strict=True):
    np.testing.assert_array_equal(a[::2], b[::2])


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_weights_closed_over_by_a_compiled_function_are_known_when_tracing(make):
  x, weights = samples(0, (4, 3)), make(np.float32([[1], [0], [2], [1]]))
  got = jax.jit(lambda x: jaxbn.moments(x, weights=weights))(x)
  chex.assert_trees_all_equal(got, measure(x, weights=weights))


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float16, np.float64])
def test_weights_of_any_real_dtype_count(dtype):
  x, weights = samples(0, (4, 3)), np.array([[1], [0], [1], [1]])
  got = measure(x, weights=weights.astype(dtype))
  chex.assert_trees_all_equal(got, measure(x, weights=weights.astype(np.float32)))


# ---------------------------------------------------------------------------------------------
# Transformations


class Variants(chex.TestCase):
  """The same numbers, whichever way the functions are run."""

  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.named_parameters(("plain", False), ("masked", True))
  def test_moments_and_merge(self, masked):
    x = samples(0, (2, 6, 3), 5.0)
    mask = np.arange(6)[:, None] > 1

    @self.variant
    def both(a, b):
      kept = {"mask": mask} if masked else {}
      return jaxbn.merge(jaxbn.moments(a, **kept), jaxbn.moments(b, **kept))

    parts = [(half, np.broadcast_to(mask, half.shape) | (not masked)) for half in x]
    assert_within(both(*x), *shared_within(*parts))


def test_new_values_are_not_traced_again():
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def once(total, x, mask):
    return jaxbn.merge(total, jaxbn.moments(x, mask=mask))

  state = Moments(jnp.zeros(3, jnp.int32), jnp.zeros(3), jnp.zeros(3))
  for i in range(3):
    state = once(state, samples(i, (4, 3)), samples(i + 9, (4, 3)) > 0)


# ---------------------------------------------------------------------------------------------
# What is refused

X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
  ("kwargs", "error", "message"),
  [
    ({"x": np.ones((4, 3), np.int32)}, TypeError, r"x has dtype int32.*x\.astype\(jnp\.float32\)"),
    ({"x": np.ones((4, 3), bool)}, TypeError, r"x has dtype bool"),
    ({"axis": 2}, ValueError, r"axis=2 is out of range for x with 2 axes.*-2 and less than 2"),
    ({"axis": -3}, ValueError, r"axis=-3 is out of range"),
    ({"axis": (1, -1)}, ValueError, r"axis=\(1, -1\) names one axis of x .* twice"),
    ({"axis": 1.0}, TypeError, r"axis=1\.0: the channels' axes are integers"),
    ({"axis": "c"}, TypeError, r"axis='c': the channels' axes are integers"),
    ({"x": np.ones((0, 3), np.float32)}, ValueError, r"x of shape \(0, 3\) is an empty batch"),
    ({"mask": np.ones((2, 3), bool)}, ValueError, r"mask of shape \(2, 3\) does not broadcast"),
    ({"mask": np.ones(4, bool)}, ValueError, r"mask of shape \(4,\).*pass mask\[\.\.\., None\]"),
    ({"mask": np.ones((1, 4, 3), bool)}, ValueError, r"mask of shape \(1, 4, 3\) does not broad"),
    ({"mask": np.ones((4, 1))}, TypeError, r"mask has dtype float.*pass mask != 0"),
    ({"mask": np.ones((4, 1), int)}, TypeError, r"mask has dtype int.*boolean"),
    ({"weights": np.float32([[1, -1, 1]])}, ValueError, r"weights hold a negative or a non-finite"),
    ({"weights": np.float32([[1, np.nan, 1]])}, ValueError, r"weights hold a .*non-finite"),
    ({"weights": np.float32([[1, np.inf, 1]])}, ValueError, r"weights hold a .*non-finite"),
    ({"weights": np.ones(3, np.complex64)}, TypeError, r"weights have dtype complex64"),
    ({"weights": np.ones(4, np.float32)}, ValueError, r"weights of shape \(4,\).*\[\.\.\., None\]"),
    ({"pivot": np.ones(4)}, ValueError, r"pivot has shape \(4,\).*channels of shape \(3,\)"),
    ({"pivot": np.ones((1, 3))}, ValueError, r"pivot has shape \(1, 3\)"),
    ({"pivot": 0.0}, ValueError, r"pivot has shape \(\)"),
  ],
)
def test_moments_refuses(kwargs, error, message):
  with pytest.raises(error, match=message):
    jaxbn.moments(**{"x": X, **kwargs})


def test_the_leading_axes_hint_names_as_many_as_are_missing():
  with pytest.raises(ValueError, match=r"pass mask\[\.\.\., None, None\]"):
    jaxbn.moments(np.ones((5, 4, 3), np.float32), mask=np.ones(5, bool))


def test_complex_weights_are_refused_in_a_list_too():
  with pytest.raises(TypeError, match="weights have dtype complex64"):
    jaxbn.moments(jnp.ones((2, 1)), weights=[[1j], [2j]])


@pytest.mark.optimized
def test_under_vmap_the_branch_for_far_means_stays_a_branch():
  def statistics(x):
    return jaxbn.moments(x)[1:]

  near, far = np.random.default_rng(0).normal(size=(2, 2, 64, 3)).astype(np.float32)
  far[1] += 1e4
  x = np.stack([near, far])
  twice = jax.jit(jax.vmap(jax.vmap(statistics)))
  branches = [f.lower(a).as_text().count("stablehlo.case") for f, a in [
    (jax.jit(statistics), x[0, 0]), (twice, x)
  ]]  # fmt: skip
  assert branches[0] == branches[1] > 0
  for (mean, var), one in zip(
    zip(*(v.reshape(4, 3) for v in twice(x)), strict=True), x.reshape(4, 64, 3), strict=True
  ):
    alone = jax.jit(statistics)(one)
    np.testing.assert_array_max_ulp(np.asarray(mean), np.asarray(alone[0]), 2)
    np.testing.assert_allclose(var, oracle.moments(one).var, rtol=1e-4)
