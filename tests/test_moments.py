"""Measure and share: moments, merge and sync against the float64 oracle, to derived tolerances."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Moments
from tests import bounds, oracle

INT32_MAX = 2**31 - 1

# ---------------------------------------------------------------------------------------------
# Tolerances: first-order rounding analysis, u the unit roundoff, p the pivot, E over the elements.
#
# Each element goes through h additions of the sum. One pass over d = x - p makes, besides those, at
# most 3 roundings in E[d] (difference, weight, division), and 7 in E[|d|^2] (the difference twice,
# two squares and their sum for complex x, weight, division), all relative to values of which E|d|
# and E[|d|^2] are the sums of absolute values. With R^2 = E[|d|^2] = var + |mean - p|^2 >= E|d|^2:
#
#   |mean - exact| <= u |mean| + (h + 3) u R
#   |var - exact|  <= (h + 7) u R^2 + (2 (h + 3) + 2) u R^2 + u var + 2 u R^2 <= (3h + 18) u R^2
#
# (E[|d|^2], the square of E[d], their difference, and the floor of 2 u |E[d]|^2 beneath it). A
# second pass starts from deviations e = d - E[d], each with an absolute error of at most
# (h + 5) u R, and sums positive terms: |var - exact| <= (h + 7) u var + 2 std (h + 5) u R + square.


def unit_roundoff(dtype):
  """Of the accumulator for elements of this dtype: half the distance from 1 to the next number."""
  return float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps) / 2


def additions(n):
  """How many additions an element goes through in a sum of n.

  Never more than n - 1, in any order. Long sums over one axis are cut into windows of 32, whose
  sums are cut again (XLA's tree reduction).
  """
  return n if n <= 1024 else 32 * math.ceil(math.log(n, 32))


def measured_within(exact, pivot, n, dtype, fast=True):
  """The tolerances for mean and var of `moments` on n elements per channel, of the exact ones."""
  mean, std = np.abs(exact.mean), np.sqrt(exact.var)

  def tolerances(u, distance, fast):
    h, r = additions(n), np.hypot(std, distance)
    deviation = (h + 5) * u * r
    var = (h + 7) * u * std**2 + 2 * std * deviation + deviation**2
    return u * mean + (h + 3) * u * r, (3 * h + 18) * u * r**2 if fast else var

  # The oracle's own rounding: two passes in float64, around zero. Numbers below `tiny` are flushed.
  own = tolerances(2.0**-53, mean, fast=False)
  tiny = float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).tiny)
  given = tolerances(unit_roundoff(dtype), np.abs(exact.mean - pivot), fast)
  return tuple(a + b + 2 * tiny for a, b in zip(given, own, strict=True))


def shared_within(*pieces, steps=1):
  """The exact moments of several (x, mask) together, and the tolerances of `merge` or `sync`.

  Errors of at most e in the pieces' means move var by 2 std e + e^2 at most; those of their
  variances are averaged. Sharing is one pass over the pieces' means, with up to 8 more roundings
  than `moments` (counts as floating-point numbers, their products and quotients), and one of each
  mean on the way; and by `sync`, d^2 u^2 of each of three sums is lost (jaxbn/_digits.py). As many
  `steps` one after the other add up.
  """
  xs, masks = zip(*pieces, strict=True)
  exact = oracle.moments(np.concatenate(xs), mask=np.concatenate(masks))
  parts = [oracle.moments(x, mask=mask) for x, mask in pieces]

  def largest(values):
    return np.max([np.where(p.count > 0, v, 0) for p, v in zip(parts, values, strict=True)], axis=0)

  pivots = [np.take_along_axis(x, mask.argmax(0)[None], 0)[0] for x, mask in pieces]
  own = [
    measured_within(part, first, len(x), x.dtype)
    for part, first, x in zip(parts, pivots, xs, strict=True)
  ]
  own_mean, own_var = (largest(tolerances) for tolerances in zip(*own, strict=True))
  spread = largest([np.abs(part.mean - exact.mean) for part in parts])
  u, std = unit_roundoff(xs[0].dtype), np.sqrt(exact.var)
  c = len(pieces) + 8
  mean = own_mean + steps * (u * (np.abs(exact.mean) + spread) + c * u * spread)
  lost = (3 * len(pieces) ** 2 + 4) * (u * (np.abs(exact.mean) + spread)) ** 2
  var = (3 * c + 18) * u * std**2 + lost
  return exact, (mean, own_var + 2 * std * mean + mean**2 + steps * var)


def assert_within(got, exact, tolerances):
  for name, tolerance in zip(("mean", "var"), tolerances, strict=True):
    value, wanted = np.asarray(getattr(got, name)), getattr(exact, name)
    assert value.shape == wanted.shape, f"{name}: {value.shape}, not {wanted.shape}"
    error = np.abs(value.astype(wanted.dtype) - wanted)
    assert np.all(error <= tolerance), f"{name}: off by {error}, allowed {tolerance}"
  assert np.array_equal(np.broadcast_to(got.count, exact.count.shape), exact.count)


def samples(seed, shape, ratio=0.0, dtype=np.float32):
  """Normal numbers of standard deviation 1 around `ratio`, rounded to dtype before any use."""
  rng = np.random.default_rng(seed)
  x = ratio + rng.normal(size=shape)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    x = x + 1j * rng.normal(size=shape)
  return np.asarray(x).astype(dtype)


@functools.partial(jax.jit, static_argnames=("axis", "use_fast_variance"))
def measure(x, axis=-1, **kwargs):
  return jaxbn.moments(x, axis, **kwargs)


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
  got = jax.jit(lambda x: jaxbn.moments(x, axis))(x)
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
  found = jaxbn.moments(np.where(mask, x, np.float32(np.nan)), axis, mask=mask)
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


def known(count, mean, var):
  """Moments without data, of channels that share a traced count."""
  return Moments(jnp.asarray(count), jnp.float32(mean), jnp.float32(var))


@pytest.mark.parametrize("compiled", [False, True])
def test_merged_counts_stop_at_the_largest_int32_and_statistics_stay_right(compiled):
  a = Moments(np.int32(2**30), np.float32([1.0]), np.float32([2.0]))
  b = Moments(np.int32(INT32_MAX), np.float32([4.0]), np.float32([2.0]))
  got = jax.jit(jaxbn.merge)(a, b) if compiled else jaxbn.merge(a, b)
  assert got.count == INT32_MAX
  assert got.count.dtype == np.int32
  # Shares 1/3 and 2/3 (up to the -1): mean 3, var 2 + 9 * 2/9 = 4; six roundings each.
  np.testing.assert_allclose(got.mean, [3.0], rtol=6 * 2**-24)
  np.testing.assert_allclose(got.var, [4.0], rtol=6 * 2**-24)


@pytest.mark.parametrize(("a", "b"), [(2**24, 1), (INT32_MAX - 1, 1), (INT32_MAX, 0)])
@pytest.mark.parametrize("traced", [False, True])
def test_merged_counts_are_exact_as_far_as_int32_goes(a, b, traced):
  dtype = jnp.int32 if traced else np.int32
  got = jaxbn.merge(*(Moments(dtype(n), jnp.ones(2), jnp.ones(2)) for n in (a, b)))
  assert got.count == a + b
  assert isinstance(got.count, np.generic | np.ndarray) is not traced


@pytest.mark.parametrize("last", [2**24 + 1, INT32_MAX - 64, INT32_MAX - 1, INT32_MAX, None])
def test_synchronized_counts_are_exact_and_stop_at_the_largest_int32(last):
  # Float32 rounds whatever is above 2**31 - 64 up to 2**31. None: 8 * 2**30 in all.
  counts = np.full(8, 2**30) if last is None else np.array([last - 7 * 4095] + 7 * [4095])
  means = np.arange(8, dtype=np.float32)[:, None]
  parts = Moments(jnp.asarray(counts, jnp.int32), means, np.ones_like(means))
  got = over_vmap(lambda m: jaxbn.sync(m, "i"), 8)(parts)
  assert got.count.dtype == jnp.int32
  assert set(np.asarray(got.count).tolist()) == {last or INT32_MAX}
  shares = counts / counts.sum()
  mean = shares @ means
  var = shares @ (1 + (means - mean) ** 2)
  # Eight devices: 7 additions and as many roundings again on the way.
  np.testing.assert_allclose(got.mean[0], mean, rtol=16 * 2**-24)
  np.testing.assert_allclose(got.var[0], var, rtol=32 * 2**-24)


@pytest.mark.parametrize(
  ("count", "wanted"), [(np.int32(3), np.int32(12)), (5, np.int32(20)), (2**30, np.float32(2**32))]
)
def test_counts_known_on_all_devices_stay_known(count, wanted):
  seen = []

  def share_known(x):
    stats = jaxbn.sync(Moments(np.int32(count), x, x), "i")
    seen.append(stats.count)
    return stats.mean

  jax.eval_shape(jax.vmap(share_known, axis_name="i"), jnp.ones((4, 1)))
  assert (type(seen[0]), seen[0]) == (type(wanted), wanted)


# ---------------------------------------------------------------------------------------------
# merge: a commutative monoid

merge = jax.jit(jaxbn.merge)
# What the pieces of a merge are made of: how many of each channel's 6 elements exist, and where.
pieces = st.tuples(
  st.integers(0, 2**32 - 1),
  st.lists(st.integers(0, 6), min_size=3, max_size=3),
  st.sampled_from([0.0, 5.0, -1e3]),
)


def piece(drawn):
  """x of shape (6, 3) and a mask with the drawn number of elements per channel."""
  seed, counts, center = drawn
  return samples(seed, (6, 3), center), np.arange(6)[:, None] < np.array(counts)


def measure_piece(x, mask):
  return measure(x, mask=mask)


@given(pieces, pieces)
def test_merge_is_the_moments_of_the_concatenation(a, b):
  a, b = piece(a), piece(b)
  assert_within(merge(measure_piece(*a), measure_piece(*b)), *shared_within(a, b))


@given(pieces, pieces)
def test_merge_commutes_up_to_rounding(a, b):
  a, b = piece(a), piece(b)
  one = merge(measure_piece(*a), measure_piece(*b))
  other = merge(measure_piece(*b), measure_piece(*a))
  chex.assert_trees_all_equal(one.count, other.count)
  for x, y, tolerance in zip(one[1:], other[1:], shared_within(a, b)[1], strict=True):
    assert np.all(np.abs(x - y) <= 2 * tolerance)


@given(pieces, pieces, pieces)
def test_merge_associates_up_to_rounding(a, b, c):
  parts = piece(a), piece(b), piece(c)
  a, b, c = (measure_piece(*part) for part in parts)
  for got in (merge(merge(a, b), c), merge(a, merge(b, c))):
    assert_within(got, *shared_within(*parts, steps=len(parts)))


@pytest.mark.parametrize("value", [3.0, 1e30, 3e38, np.inf, np.nan])
def test_a_side_without_elements_leaves_exactly_the_other(value):
  a = Moments(np.int32(3), np.float32([1.1, value]), np.float32([0.7, 0.3]))
  empty = jaxbn.empty_moments(2)
  for got in (jaxbn.merge(a, empty), jaxbn.merge(empty, a)):
    chex.assert_trees_all_equal(got, a)


@pytest.mark.parametrize(
  ("shape", "dtype"), [(4, jnp.float32), ((4,), jnp.complex64), ([2, 3], jnp.float32)]
)
def test_two_sets_without_elements_merge_to_none(shape, dtype):
  empty = jaxbn.empty_moments(shape, dtype)
  chex.assert_type([empty.mean, empty.var, empty.count], [dtype, jnp.float32, jnp.int32])
  chex.assert_trees_all_equal(merge(empty, empty), empty)


def test_merge_works_channel_by_channel_with_unequal_counts():
  a = Moments(jnp.array([0, 1, 2]), jnp.array([0.0, 4.0, 4.0]), jnp.zeros(3))
  b = Moments(jnp.array([5, 0, 2]), jnp.array([7.0, 0.0, 8.0]), jnp.array([3.0, 0.0, 0.0]))
  wanted = Moments(jnp.array([5, 1, 4]), jnp.array([7.0, 4.0, 6.0]), jnp.array([3.0, 0.0, 4.0]))
  chex.assert_trees_all_equal(merge(a, b), wanted)
  chex.assert_trees_all_equal(jax.jit(jax.vmap(jaxbn.merge))(a, b), wanted)


def test_merge_accumulates_in_a_scan():
  x = samples(0, (10, 6, 3), 5.0)

  def step(total, batch):
    return jaxbn.merge(total, jaxbn.moments(batch)), None

  got, _ = jax.jit(lambda x: jax.lax.scan(step, jaxbn.empty_moments(3), x))(x)
  parts = [(batch, np.ones((6, 3), bool)) for batch in x]
  assert_within(got, *shared_within(*parts, steps=len(parts)))


def test_merge_weighs_by_floating_point_counts():
  x, w = samples(0, (6, 2), 2.0), np.float32([[0.5], [2], [0], [1], [1.25], [3]])
  got = jaxbn.merge(measure(x[:2], weights=w[:2]), measure(x[2:], weights=w[2:]))
  # 6 elements of order one: fewer than 64 roundings on the way to any of the three.
  for value, wanted in zip(got, oracle.moments(x, weights=w), strict=True):
    np.testing.assert_allclose(value, np.resize(wanted, value.shape), rtol=64 * 2**-24)


def test_merge_is_differentiable_with_and_without_elements():
  a = Moments(jnp.array([0, 2]), jnp.array([0.0, 4.0]), jnp.array([0.0, 1.0]))
  b = Moments(jnp.array([6, 6]), jnp.array([7.0, 8.0]), jnp.array([3.0, 1.0]))

  def total(mean_a, var_a):
    merged = jaxbn.merge(a._replace(mean=mean_a, var=var_a), b)
    return jnp.sum(merged.mean + merged.var)

  d_mean, d_var = jax.jit(jax.grad(total, (0, 1)))(a.mean, a.var)
  # Share 1/4: d mean = 1/4, d delta^2 3/16 = -2 * 4 * 3/16; powers of two, so exact.
  np.testing.assert_array_equal(d_mean, [0, 0.25 - 1.5])
  np.testing.assert_array_equal(d_var, [0, 0.25])


# ---------------------------------------------------------------------------------------------
# sync: the ways to bind an axis


def over_pmap(f, n):
  return jax.pmap(f, axis_name="i", devices=jax.devices()[:n])


def over_vmap(f, n):
  return jax.jit(jax.vmap(f, axis_name="i", axis_size=n))


def over_vmap_of_jit(f, n):
  return jax.vmap(jax.jit(f), axis_name="i", axis_size=n)


def over_shard_map(f, n, check_vma=True):
  mesh = Mesh(np.array(jax.devices()[:n]), ("i",))

  def one_device(*args):
    result = f(*jax.tree.map(lambda a: a[0], args))
    return jax.tree.map(lambda a: jnp.asarray(a)[None], result)

  mapped = jax.shard_map(
    one_device, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=check_vma
  )
  return jax.jit(mapped)


over_shard_map_unchecked = functools.partial(over_shard_map, check_vma=False)
WAYS = {
  "pmap": over_pmap,
  "shard_map": over_shard_map,
  "shard_map_unchecked": over_shard_map_unchecked,
  "vmap": over_vmap,
  "vmap_of_jit": over_vmap_of_jit,
}
every_way = pytest.mark.parametrize("over", WAYS.values(), ids=WAYS)


def on_device(stats, i):
  return jax.tree.map(lambda a: np.asarray(a)[i], stats)


def assert_shared(got, x, mask=None, groups=None):
  """Every device of a group has the same statistics: those of the group's elements together."""
  mask = np.ones(x.shape, bool) if mask is None else mask
  for group in groups or [range(len(x))]:
    members = list(group)
    for i in members:
      chex.assert_trees_all_equal(on_device(got, i), on_device(got, members[0]))
    pieces = [(x[i], mask[i]) for i in members]
    assert_within(on_device(got, members[0]), *shared_within(*pieces))


def share(x, mask=None, **kwargs):
  return jaxbn.sync(jaxbn.moments(x, mask=mask), "i", **kwargs)


share_over_vmap = jax.jit(jax.vmap(share, axis_name="i"))


def ragged(devices, n=6, channels=3):
  """x and mask with i valid elements on device i: the first has none, and holds NaN."""
  x = samples(0, (devices, n, channels), 4.0)
  x = x + np.arange(devices, dtype=np.float32)[:, None, None]
  mask = np.broadcast_to(np.arange(n)[None, :, None] < np.arange(devices)[:, None, None], x.shape)
  return np.where(mask, x, np.float32(np.nan)), np.array(mask)


@every_way
@pytest.mark.parametrize("devices", [1, 8])
def test_sync_gives_the_moments_of_all_devices(over, devices):
  x = samples(0, (devices, 6, 3), 4.0)
  assert_shared(over(share, devices)(x), x)


@pytest.mark.parametrize(
  ("over", "devices"), [(over_pmap, 2), (over_shard_map, 2), (over_shard_map, 4)]
)
def test_sync_weighs_any_number_of_devices(over, devices):
  x, mask = ragged(devices)
  assert_shared(over(share, devices)(x, mask), x, mask)


@every_way
def test_sync_weighs_devices_by_their_valid_elements(over):
  shared, (x, mask) = over(share, 4), ragged(4)
  assert_shared(shared(x, mask), x, mask)
  # All devices without elements: the moments of none.
  for leaf in shared(np.full_like(x, np.nan), np.zeros_like(mask)):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("count", [np.int32(0), jnp.int32(0)], ids=["known", "traced"])
def test_sync_of_devices_without_elements(count):
  def share_none(zero):
    return jaxbn.sync(Moments(count, zero, zero), "i")

  for leaf in over_vmap(share_none, 4)(np.zeros((4, 2), np.float32)):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("placeholder", [0, 1e30, np.nan])
def test_the_mean_of_a_device_without_elements_does_not_count(placeholder):
  one = Moments(np.int32([0, 4]), np.float32([[placeholder], [3]]), np.zeros((2, 1), np.float32))
  got = over_vmap(lambda m: jaxbn.sync(m, "i"), 2)(one)
  np.testing.assert_array_equal(got.mean, np.full((2, 1), np.float32(3)))
  np.testing.assert_array_equal(got.var, np.zeros((2, 1)))


def test_sync_sums_counts_per_channel():
  x = samples(0, (4, 6, 3))
  mask = np.random.default_rng(1).random(x.shape) < 0.5
  mask[:, :, 0] = [[False], [True], [False], [False]]
  mask[:, :, 2] = False
  got = over_vmap(share, 4)(np.where(mask, x, np.inf), mask)
  exact = oracle.moments(np.concatenate(x), mask=np.concatenate(mask))
  np.testing.assert_array_equal(got.count[0], exact.count)
  for leaf in on_device(got, 0)[1:]:
    assert leaf[2] == 0
  np.testing.assert_allclose(got.mean[0], exact.mean, atol=32 * 2**-24)
  np.testing.assert_allclose(got.var[0], exact.var, rtol=96 * 2**-24)


def test_sync_weighs_by_floating_point_counts():
  x, w = samples(0, (4, 6, 3), 1.0), samples(1, (4, 6, 1)) ** 2
  got = over_vmap(lambda x, w: jaxbn.sync(jaxbn.moments(x, weights=w), "i"), 4)(x, w)
  exact = oracle.moments(np.concatenate(x), weights=np.concatenate(w))
  # As above.
  for value, wanted in zip(on_device(got, 0), exact, strict=True):
    np.testing.assert_allclose(value, np.resize(wanted, value.shape), rtol=64 * 2**-24)


def test_sync_of_complex_moments():
  x = samples(0, (4, 6, 3), 2.0 - 1.0j, np.complex64)
  got = over_pmap(share, 4)(x)
  chex.assert_type([got.mean, got.var], [jnp.complex64, jnp.float32])
  assert_shared(got, x)


GROUPS = {"equal": [[0, 2], [1, 3]], "unequal": ((3,), (0, 2, 1))}


@pytest.mark.parametrize(
  ("over", "groups"),
  [(over, GROUPS["unequal"]) for over in WAYS.values()] + [(over_pmap, GROUPS["equal"])],
  ids=[f"{way}-unequal" for way in WAYS] + ["pmap-equal"],
)
def test_groups_share_among_themselves(over, groups):
  x = samples(0, (4, 6, 3)) + 10 * np.arange(4, dtype=np.float32)[:, None, None]
  got = over(functools.partial(share, axis_index_groups=groups), 4)(x)
  assert_shared(got, x, groups=groups)


@pytest.mark.parametrize("over", [over_pmap, over_vmap])
def test_groups_weigh_by_valid_elements(over):
  x, mask = ragged(4)
  groups = GROUPS["unequal"]
  got = over(functools.partial(share, axis_index_groups=groups), 4)(x, mask)
  assert_shared(got, x, mask, groups=groups)


def over_mesh(f, x):
  """f on a 2 x 2 mesh; device k in row-major order has x[k]."""
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
  spec = P(("a", "b"))
  mapped = jax.shard_map(
    lambda x: jax.tree.map(lambda a: jnp.asarray(a)[None], f(x[0])),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
  )
  return jax.jit(mapped)(x)


def over_vmap_of(inner, f, x):
  mapped = jax.vmap(inner(f), axis_name="a")
  return jax.tree.map(lambda a: a.reshape(4, *a.shape[2:]), mapped(x.reshape(2, 2, *x.shape[1:])))


over_vmap_of_pmap = functools.partial(
  over_vmap_of, lambda f: jax.pmap(f, axis_name="b", devices=jax.devices()[:2])
)
over_vmap_of_vmap = functools.partial(
  over_vmap_of, lambda f: jax.jit(jax.vmap(f, axis_name="b", axis_size=2))
)


@pytest.mark.parametrize(
  "over", [over_mesh, over_vmap_of_pmap, over_vmap_of_vmap], ids=["mesh", "vmap-pmap", "vmap-vmap"]
)
@pytest.mark.parametrize("groups", [None, [[0, 2, 3], [1]]])
def test_sync_over_several_names_takes_all_their_devices(over, groups):
  x = samples(0, (4, 6, 3)) + 10 * np.arange(4, dtype=np.float32)[:, None, None]
  got = over(lambda x: jaxbn.sync(jaxbn.moments(x), ("a", "b"), groups), x)
  assert_shared(got, x, groups=groups)


@pytest.mark.parametrize("name", ["a", "b"])
def test_sync_over_one_of_two_names_takes_that_axis_only(name):
  x = samples(0, (4, 6, 3)) + 10 * np.arange(4, dtype=np.float32)[:, None, None]
  got = over_mesh(lambda x: jaxbn.sync(jaxbn.moments(x), name), x)
  assert_shared(got, x, groups={"a": [[0, 2], [1, 3]], "b": [[0, 1], [2, 3]]}[name])


# ---------------------------------------------------------------------------------------------
# sync: accuracy


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("ratio", [1e3, -1e4, 1e6])
def test_sharing_keeps_the_digits_of_the_variance(ratio, devices):
  x = samples(0, (devices, 512, 3), ratio)
  assert_shared(share_over_vmap(x), x)


@pytest.mark.parametrize("far", [-5.0, 0.0, 2.0**-40, 0.9, 7.0, 1e3])
def test_devices_whose_means_are_far_from_each_other(far):
  # One of 64 devices has other exponents than all others: in its digits, too, nothing is lost.
  x = samples(0, (64, 16, 3), 1e4)
  x[5] *= np.float32(far)
  assert_shared(share_over_vmap(x), x)


def shared_exactly(count, mean, var):
  """In float64, of the float32 moments of devices as they are: the mean and the variance."""
  n, mean, var = (np.asarray(v, np.float64) for v in (count, mean, var))
  whole = (n * mean).sum(0) / n.sum(0)
  return whole, (n * (var + (mean - whole) ** 2)).sum(0) / n.sum(0)


@pytest.mark.parametrize(
  ("counts", "devices"),
  [
    ("one", 2048),
    ("integers", 2048),
    ("beyond float32", 16),
    ("of 1 in all", 2048),
    ("large weights", 16),
  ],
)
def test_counts_of_any_size(counts, devices):
  rng = np.random.default_rng(0)
  count = {
    "one": np.ones(devices, np.int32),
    "integers": rng.integers(0, 1000, devices).astype(np.int32),
    # Odd, so that none of them is a float32.
    "beyond float32": 2**25 // (devices // 16)
    + 2 * rng.integers(0, 2**16, devices).astype(np.int32)
    + 1,
    "of 1 in all": rng.random(devices).astype(np.float32) / devices,
    "large weights": 1e6 * rng.random(devices).astype(np.float32),
  }[counts][:, None]
  mean = (1e4 + rng.normal(size=(devices, 64))).astype(np.float32)
  var = rng.random((devices, 64)).astype(np.float32)
  got = over_vmap(lambda m: jaxbn.sync(m, "i"), devices)(Moments(count, mean, var))
  whole, spread = shared_exactly(count, mean, var)
  u, far = 2.0**-24, 1.001e4
  np.testing.assert_allclose(got.mean[0], whole, rtol=2 * u)
  # Sums in any order; their errors are random here (Higham & Mary 2019, as in tests/bounds.py).
  lost = 6 * devices**0.5 * devices * (u * far) ** 2
  np.testing.assert_allclose(
    got.var[0], spread, atol=min(3 * devices**2 * (u * far) ** 2, lost), rtol=16 * u
  )
  total = np.sum(count, dtype=np.float64)
  np.testing.assert_allclose(
    got.count[0], min(total, 2**31 - 1), rtol=0 if count.dtype == np.int32 else 8 * u
  )


SIZE = re.compile(r"f32\[(\d+)\]")


def reductions(f, *args):
  """The shapes of all all-reduces in the program compiled for f on 4 devices."""
  text = over_shard_map_unchecked(f, 4).lower(*args).compile().as_text()
  return re.findall(r" = (.*?) all-reduce(?:-start)?\(", text)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [None, GROUPS["equal"]])
def test_one_small_all_reduce_does_it(masked, groups):
  x, mask = ragged(4)
  args = (x, mask[..., :1]) if masked else (x,)
  (shape,) = reductions(functools.partial(share, axis_index_groups=groups), *args)
  # Two sums per channel in four pieces, and where counts depend on data their high and low bits.
  assert shape.startswith("f32[26]" if masked else "f32[24]")


@pytest.mark.parametrize("masked", [False, True])
def test_the_backward_pass_takes_one_all_reduce_too(masked):
  x, mask = ragged(4)

  def pull_back(x, mask, cotangent):
    def stats(x):
      return share(x, mask[:, :1] if masked else None)[1:]

    return jax.vjp(stats, x)[1](cotangent)

  cotangent = (np.ones((4, 3), np.float32), np.ones((4, 3), np.float32))
  # Two sums per channel; and that of the forward pass, whose mean the rule needs.
  numbers = [
    int(n) for shape in reductions(pull_back, x, mask, cotangent) for n in SIZE.findall(shape)
  ]
  assert sorted(numbers) == [6, 26 if masked else 24]


# ---------------------------------------------------------------------------------------------
# What is masked does not exist

MASKS = {
  "first": np.repeat([[False], [True], [True], [True]], 3, axis=1),
  "channel": np.repeat([[True, False, True]], 4, axis=0),
  "per channel": np.array([[1, 0, 0], [0, 0, 1], [1, 0, 1], [1, 0, 0]], bool),
  "all": np.zeros((4, 3), bool),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def total(x, mask=None, weights=None, fast=True):
  stats = jaxbn.moments(x, mask=mask, weights=weights, use_fast_variance=fast)
  return jnp.sum(stats.mean + stats.var)


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


# ---------------------------------------------------------------------------------------------
# Gradients: d mean/dx = w / count, d var/dx = 2 w (x - mean) / count


def assert_gradient(got, x, a, b, pivot, mask=None, weights=None):
  """got is the gradient of sum(a mean + b var), up to its roundings.

  a/count + b/count 2 (d - E[d]), times the weight: E[d] has h + 3 roundings, the rest fewer than 8;
  they are relative to |a| + 2 |b| (|d| + R).
  """
  exact = oracle.moments(x, mask=mask, weights=weights)
  w = oracle.weights_of(x, mask, weights)
  share = w / np.where(exact.count > 0, exact.count, 1)
  d = np.where(w > 0, oracle.wide(x) - exact.mean, 0)
  wanted = share * (a + 2 * b * d)
  scale = np.abs(a) + 2 * np.abs(b) * (np.abs(d) + 2 * np.abs(exact.mean - pivot) + exact.var**0.5)
  tolerance = (additions(len(x)) + 11) * unit_roundoff(x.dtype) * share * scale
  error = np.abs(np.asarray(got, wanted.dtype) - wanted)
  assert np.all(error <= tolerance), f"off by {error}, allowed {tolerance}"


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


@pytest.mark.parametrize("over", ["vmap", "pmap", "shard_map", "shard_map_unchecked"])
def test_gradients_flow_across_devices(over):
  x, mask = ragged(4)
  a, b = samples(1, (2, 4, 3))

  def loss(x, mask, a, b):
    stats = share(x, mask)
    return jnp.sum(a * stats.mean + b * stats.var)

  got = jax.jit(jax.grad(lambda x: jnp.sum(WAYS[over](loss, 4)(x, mask, a, b))))(x)
  flat = np.concatenate(x)
  around = np.nanmin(flat)
  # Each device's loss is one of the same statistics: their sum has the sums of a and b.
  a, b = a.sum(0, dtype=np.float64), b.sum(0, dtype=np.float64)
  assert_gradient(np.concatenate(got), flat, a, b, around, mask=np.concatenate(mask))


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


def test_sharing_squares_that_overflow_gives_an_infinite_variance():
  x = np.full((2, 3, 1), 1e30, np.float32)
  got = share_over_vmap(x)
  np.testing.assert_array_equal(got.var, np.full((2, 1), np.inf))
  np.testing.assert_allclose(got.mean, np.full((2, 1), 1e30), rtol=16 * 2**-24)


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


def test_merge_refuses_other_channels():
  with pytest.raises(ValueError, match=r"channels of shape \(2,\) and \(3,\).*same channels"):
    jaxbn.merge(jaxbn.empty_moments(2), jaxbn.empty_moments(3))


@pytest.mark.parametrize(
  ("axis_name", "message"),
  [
    ("j", r"axis_name='j' is not bound here \(bound: 'i'\).*with the axis 'j'"),
    (("i", "j"), r"axis_name=\('i', 'j'\) is not bound here.*with the axis 'j'"),
  ],
)
def test_sync_refuses_a_name_that_is_not_bound_and_tells_which_are(axis_name, message):
  def share_over(m):
    return jaxbn.sync(m, axis_name)

  with pytest.raises(ValueError, match=message):
    jax.vmap(share_over, axis_name="i")(Moments(jnp.ones(2), jnp.ones((2, 3)), jnp.ones((2, 3))))
  with pytest.raises(ValueError, match=r"is not bound here \(bound: none\)"):
    share_over(jaxbn.empty_moments(3))


@pytest.mark.parametrize(
  "groups",
  [[[0, 1], [2]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 4]], [[0, 1, 2, 3], []], [0, 1, 2, 3], 4, "ab"],
)
def test_sync_refuses_groups_that_do_not_partition(groups):
  message = rf"axis_index_groups={re.escape(repr(groups))} do not partition the axis 'i' of size 4"
  with pytest.raises(ValueError, match=message):
    over_vmap(functools.partial(share, axis_index_groups=groups), 4)(np.ones((4, 2, 3), np.float32))


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
