"""Share: merge and sync against the float64 oracle, to derived tolerances."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Moments
from tests import oracle
from tests.moments import (
  assert_gradient,
  assert_within,
  measure,
  on_device,
  samples,
  shared_within,
)

INT32_MAX = 2**31 - 1


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


def test_sharing_squares_that_overflow_gives_an_infinite_variance():
  x = np.full((2, 3, 1), 1e30, np.float32)
  got = share_over_vmap(x)
  np.testing.assert_array_equal(got.var, np.full((2, 1), np.inf))
  np.testing.assert_allclose(got.mean, np.full((2, 1), 1e30), rtol=16 * 2**-24)


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
