"""Statistics of each domain: against one batch normalization for each domain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.variants.domain import domain_batch_norm, split_domains
from tests import oracle
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 3, 2))
DOMAINS = np.array([2, 0, 0, 1, 2, 2, 1, 0])
SCALE, BIAS = RNG.normal(1, 0.3, (2, 2))
SCALES, BIASES = RNG.normal(1, 0.3, (2, 3, 2))
STATE = jaxbn.RunningStats(RNG.normal(size=(3, 2)), RNG.uniform(0.5, 2, (3, 2)))
MASK = RNG.uniform(size=(8, 3, 1)) < 0.7
WEIGHTS = RNG.uniform(size=(8, 3, 2))
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
TRAINING = {"use_running_average": False}


def norm(x=X, scale=SCALE, bias=BIAS, state=STATE, domains=DOMAINS, **options):
  return domain_batch_norm(x, scale, bias, state, domains=domains, **TRAINING | options)


def members(d, *arrays):
  """The part of a domain; arrays with a row for all are as they are."""
  return [a if a is None or len(a) != len(DOMAINS) else a[d == DOMAINS] for a in arrays]


def expected(x, scales, biases, axis=-1, mask=None, weights=None):
  """y and Stats, domain by domain."""
  y, stats = np.empty(x.shape), []
  for d in range(3):
    part, mask_d, weights_d = members(d, x, mask, weights)
    stats.append(oracle.moments(part, axis, mask_d, weights_d))
    y[d == DOMAINS] = oracle.normalize(part, *stats[d][1:], scales[d], biases[d], axis=axis)
  return y, stats


# Values


COUNTED = {
  "all": {},
  "mask": {"mask": MASK},
  "weights": {"weights": WEIGHTS},
  "both": {"mask": MASK, "weights": WEIGHTS},
}


@pytest.mark.parametrize("per_domain", [False, True])
@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("two_passes", [False, True])
def test_each_domain_is_normalized_by_itself(per_domain, counted, two_passes):
  counted = COUNTED[counted]
  scales, biases = (SCALES, BIASES) if per_domain else ([SCALE] * 3, [BIAS] * 3)
  y, state = norm(
    scale=SCALES if per_domain else SCALE,
    bias=BIASES if per_domain else BIAS,
    use_fast_variance=not two_passes,
    **counted,
  )
  expected_y, stats = expected(X, scales, biases, **counted)
  np.testing.assert_allclose(y, expected_y, **CLOSE)
  for d in range(3):
    np.testing.assert_allclose(state.mean[d], 0.99 * STATE.mean[d] + 0.01 * stats[d].mean, **CLOSE)
    np.testing.assert_allclose(state.var[d], 0.99 * STATE.var[d] + 0.01 * stats[d].var, **CLOSE)


@pytest.mark.parametrize(
  "options",
  [
    {"momentum": 0.6},
    {"momentum": None},
    {"debias": True},
    {"unbiased": True},
    {"unbiased": True, "mask": MASK},
    {"skip_nonfinite": True},
  ],
  ids=" ".join,
)
def test_each_domain_tracks_as_a_layer_of_its_own(options):
  start = {k: v for k, v in options.items() if k in ("momentum", "debias")}
  state = jaxbn.init((3, 2), **start)
  alone = [jaxbn.init(2, **start) for _ in range(3)]
  for x in (X, 2 * X - 1, np.where(np.arange(8)[:, None, None] == 3, np.nan, X)):
    _, state = norm(x, state=state, **options)
    for d in range(3):
      (part,) = members(d, x)
      counted = {"mask": MASK[d == DOMAINS]} if "mask" in options else {}
      _, alone[d] = jaxbn.batch_norm(part, SCALE, BIAS, alone[d], **TRAINING | options | counted)
  together = jax.tree.map(lambda *rows: np.stack(rows), *alone)
  jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), state, together)
  assert np.isfinite(state.mean[0]).all()


def test_an_absent_domain_stays_as_it_was():
  domains = np.where(DOMAINS == 1, 0, DOMAINS)
  _, state = norm(domains=domains, state=STATE._replace(count=np.full((3, 2), 4)), debias=True)
  for leaf, start in zip(state, (*STATE[:2], np.full((3, 2), 4)), strict=True):
    np.testing.assert_array_equal(leaf[1], start[1])
    assert np.all(leaf[::2] != start[::2])


def test_what_is_not_finite_stays_in_its_domain():
  x = np.where((np.arange(8) == 3)[:, None, None], np.nan, X)
  y, state = norm(x)
  clean, clean_state = norm()
  elsewhere = DOMAINS != 1
  np.testing.assert_array_equal(y[elsewhere], clean[elsewhere])
  np.testing.assert_array_equal(state.mean[::2], clean_state.mean[::2])
  assert np.isnan(y[~elsewhere]).all()
  elsewhere_only = elsewhere[:, None, None]
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.where(elsewhere_only, norm(x)[0], 0) ** 3)))
  np.testing.assert_allclose(gradient(x)[elsewhere], gradient(X)[elsewhere], **CLOSE)
  assert np.isfinite(gradient(x)[elsewhere]).all()


def test_in_evaluation_each_is_normalized_by_its_domain_s_running_statistics():
  y, state = norm(use_running_average=True, scale=SCALES, bias=BIASES)
  for d in range(3):
    (part,) = members(d, X)
    alone = oracle.normalize(part, STATE.mean[d], STATE.var[d], SCALES[d], BIASES[d])
    np.testing.assert_allclose(y[d == DOMAINS], alone, **CLOSE)
  assert state is STATE


def test_evaluation_with_one_domain_for_all():
  y, _ = norm(use_running_average=True, domains=1, scale=SCALES)
  one = jaxbn.RunningStats(STATE.mean[1], STATE.var[1])
  plain, _ = jaxbn.batch_norm(X, SCALES[1], BIAS, one, use_running_average=True)
  np.testing.assert_allclose(y, plain, **CLOSE)


def test_one_domain_is_plain_batch_norm():
  state = jaxbn.RunningStats(STATE.mean[:1], STATE.var[:1])
  y, new = norm(domains=0, state=state)
  one = jaxbn.RunningStats(STATE.mean[0], STATE.var[0])
  plain, plain_new = jaxbn.batch_norm(X, SCALE, BIAS, one, **TRAINING)
  np.testing.assert_allclose(y, plain, **CLOSE)
  np.testing.assert_allclose(new.var[0], plain_new.var, **CLOSE)


def test_consecutive_parts_are_virtual_batches():
  y, _ = norm(domains=split_domains(8, 2), state=jaxbn.init((2, 2)))
  ghost, _ = jaxbn.batch_norm(X, SCALE, BIAS, **TRAINING, virtual_batch_size=4)
  np.testing.assert_allclose(y, ghost, **CLOSE)


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (-1, -2)])
def test_the_channels_may_lie_on_any_axes(axis):
  x = RNG.normal(1, 2, (4, 4, 4, 4))
  first = min({0, 1, 2, 3} - {a % 4 for a in np.atleast_1d(axis)})
  domains = np.array([1, 0, 1, 1])
  state = jaxbn.init((2, *[4] * np.size(axis)))
  y, new = norm(x, None, None, state, domains, axis=axis, momentum=0.0)
  for d in range(2):
    part = np.compress(domains == d, x, first)
    np.testing.assert_allclose(
      np.compress(domains == d, y, first), oracle.batch_norm(part, axis=axis), **CLOSE
    )
    np.testing.assert_allclose(new.mean[d], oracle.moments(part, axis).mean, **CLOSE)


def test_a_domain_without_valid_elements_and_any_domain_under_the_mask():
  mask = (DOMAINS != 1)[:, None, None]
  x, domains = np.where(mask, X, np.nan), np.where(DOMAINS == 1, -7, DOMAINS)

  def loss(x, scale):
    y, state = norm(x, scale, domains=domains, mask=mask, masked_value=0.0)
    return jnp.sum(y**3), (y, state)

  gradients, (y, state) = jax.grad(loss, (0, 1), has_aux=True)(jnp.asarray(x), jnp.asarray(SCALES))
  reference, _ = norm(scale=SCALES)
  np.testing.assert_allclose(y, np.where(mask, reference, 0), **CLOSE)
  np.testing.assert_array_equal(state.mean[1], STATE.mean[1])
  assert all(np.isfinite(g).all() for g in gradients)
  assert not gradients[1][1].any()


def test_a_domain_out_of_range_that_cannot_be_seen_makes_its_example_nan_alone():
  domains = np.where(np.arange(8) == 3, 9, DOMAINS)
  y, state = jax.jit(lambda d: norm(domains=d))(domains)
  np.testing.assert_array_equal(np.isnan(y).all((1, 2)), np.arange(8) == 3)
  _, without = norm(mask=(np.arange(8) != 3)[:, None, None])
  np.testing.assert_allclose(state.mean, without.mean, **CLOSE)


def test_a_large_mean_costs_no_digits():
  with jax.enable_x64(False):
    x = np.float32(RNG.normal(size=(64, 16, 3)) + 1e4)
    domains = np.arange(64) % 2
    y, _ = norm(x, None, None, jaxbn.init((2, 3)), domains)
  for d in range(2):
    # x and the mean are rounded to 2**-11 and half of that.
    exact = oracle.batch_norm(np.float64(x[domains == d]))
    np.testing.assert_allclose(y[domains == d], exact, rtol=1e-3, atol=2**-10)


def test_the_parts_of_a_half_precision_gradient_are_added_before_they_are_rounded():
  x = jnp.asarray(X, jnp.bfloat16)

  def loss(x):
    return jnp.sum(norm(x, dtype=jnp.float32)[0].astype(float) ** 3)

  exact = jax.grad(loss)(x.astype(float))
  largest = np.max(np.abs(exact))
  np.testing.assert_allclose(np.float64(jax.grad(loss)(x)), exact, rtol=2**-8, atol=1e-5 * largest)


def test_detached_statistics():
  gradient = jax.grad(lambda x: jnp.sum(norm(x, detach_stats=True, scale=None)[0]))(X)
  _, stats = expected(X, [1] * 3, [0] * 3)
  slopes = np.stack([1 / np.sqrt(s.var + 1e-5) for s in stats])
  np.testing.assert_allclose(gradient, np.broadcast_to(slopes[DOMAINS][:, None], X.shape), **CLOSE)


# Every transformation, every kind of devices


def formula(x, scales, biases):
  one_hot = jax.nn.one_hot(DOMAINS, 3, dtype=x.dtype)
  n = one_hot.sum(0)[:, None]
  mean = one_hot.T @ x.mean(1) / n
  centered = x - (one_hot @ mean)[:, None]
  var = one_hot.T @ (centered**2).mean(1) / n
  z = centered / jnp.sqrt(one_hot @ var + 1e-5)[:, None]
  return z * (one_hot @ scales)[:, None] + (one_hot @ biases)[:, None]


def test_transformations():
  table.compare_all(lambda *args: norm(*args)[0], formula, (X, SCALES, BIASES))


def test_without_places_as_well():
  def f(x, scales, biases):
    return norm(x, scales, biases)[0]

  def plain(x, scales, biases):
    return formula(x[:, None], scales, biases)[:, 0]

  table.compare("grad of grad", f, plain, (X[:, 0], SCALES, BIASES))


def on_device(axis_name, x):
  """The part of the domains that goes with a device's part of x."""
  if axis_name is None:
    return jnp.asarray(DOMAINS)
  first = jax.lax.axis_index(axis_name) * len(x)
  return jax.lax.dynamic_slice_in_dim(jnp.asarray(DOMAINS), first, len(x))


@pytest.mark.parametrize(
  ("devices", "two_passes"), [*((d, False) for d in table.DEVICES), ("shard_map", True)]
)
def test_devices(devices, two_passes):
  def make(axis_name):
    def f(x, scales, biases):
      domains = on_device(axis_name, x)
      options = {"axis_name": axis_name, "use_fast_variance": not two_passes}
      return norm(x, scales, biases, domains=domains, **options)[0]

    return f

  table.compare_on_devices(devices, make, formula, (X, SCALES, BIASES))


@pytest.mark.parametrize("transform", [jax.vmap, jax.pmap])
def test_devices_in_groups_of_which_one_lacks_a_domain(transform):
  x, mask = X.reshape(4, 2, 3, 2), MASK.reshape(4, 2, 3, 1)
  groups = [[0, 2], [1, 3]]

  def f(x, domains, mask):
    options = {"axis_name": "b", "axis_index_groups": groups, "mask": mask, "masked_value": 0.0}
    return norm(x, domains=domains, **options)

  y, state = jax.jit(transform(f, axis_name="b"))(x, DOMAINS.reshape(4, 2), mask)
  for group in groups:
    parts = x[group].reshape(4, 3, 2), DOMAINS.reshape(4, 2)[group].ravel(), mask[group]
    alone, alone_state = norm(
      parts[0], domains=parts[1], mask=parts[2].reshape(4, 3, 1), masked_value=0.0
    )
    np.testing.assert_allclose(y[np.array(group)].reshape(4, 3, 2), alone, **CLOSE)
    for i in group:
      np.testing.assert_allclose(state.mean[i], alone_state.mean, **CLOSE)
      np.testing.assert_allclose(state.var[i], alone_state.var, **CLOSE)


@pytest.mark.optimized
def test_all_domains_share_one_all_reduce():
  def f(x, domains):
    return norm(x, domains=domains, mask=MASK[:4], axis_name="b")[0]

  shards = X.reshape(2, 4, 3, 2), DOMAINS.reshape(2, 4)
  text = jax.pmap(f, axis_name="b").lower(*shards).as_text()
  assert text.count("all_reduce") == 1


def test_nothing_is_traced_again():
  table.assert_traced_once(lambda *args: norm(*args)[0], (X, SCALES, BIASES))


# Errors


@pytest.mark.parametrize(
  ("given", "error", "says"),
  [
    ({"domains": DOMAINS + 1}, ValueError, "domains hold 3, but there are rows from 0 to 2"),
    ({"domains": DOMAINS * 1.0}, TypeError, "domains has dtype float64"),
    ({"domains": DOMAINS[:3]}, ValueError, r"domains has shape \(3,\).* holds 8 examples"),
    ({"scale": np.ones((2, 2))}, ValueError, r"scale has shape \(2, 2\), but for 3 rows"),
    ({"bias": np.ones((8, 1, 2))}, ValueError, r"bias has shape \(8, 1, 2\), but for 3 rows"),
    ({"state": jaxbn.init(2)}, ValueError, r"jaxbn.init\(\(domains, 2\)\)"),
    ({"state": None}, TypeError, "state is a NoneType"),
    ({"state": STATE, "debias": True}, ValueError, "state.count is None"),
    ({"x": X[:0], "domains": DOMAINS[:0]}, ValueError, "empty batch"),
    ({"use_running_average": None}, TypeError, "use_running_average=None"),
    ({"axis_index_groups": [[0]]}, ValueError, "axis_name, which is None"),
    ({"axis_name": "b"}, ValueError, "axis_name='b' is not bound here"),
    ({"masked_value": 0.0}, ValueError, "there is no mask"),
    ({"momentum": 2.0}, ValueError, "momentum=2.0 is out of range"),
  ],
  ids=str,
)
def test_what_cannot_be_is_refused(given, error, says):
  with pytest.raises(error, match=says):
    norm(**given)


def test_parts_of_different_sizes_are_refused():
  np.testing.assert_array_equal(split_domains(6, 3), [0, 0, 1, 1, 2, 2])
  with pytest.raises(ValueError, match="parts=3 do not divide number=8"):
    split_domains(8, 3)


def test_unbiased_takes_what_reliabilities_are_worth_in_each_domain():
  rng = np.random.default_rng(7)
  x = rng.normal(3, 2, (8, 5, 3)).astype(np.float32)
  weights = rng.uniform(0.1, 1, (8, 5, 3)).astype(np.float32)
  domains = np.array([0, 1, 0, 0, 1, 1, 0, 1])
  options = {"use_running_average": False, "unbiased": True, "momentum": 0.0}

  def var(x, weights, domains, **more):
    state = jaxbn.init((2, 3))
    return domain_batch_norm(
      x, None, None, state, domains=domains, weights=weights, **options, **more
    )[1].var

  wanted = np.stack(
    [
      oracle.moments(x[of], weights=weights[of]).var
      * oracle.reliability(x[of], weights=weights[of])
      for of in (domains == 0, domains == 1)
    ]
  )
  np.testing.assert_allclose(var(x, weights, domains), wanted, rtol=1e-5)
  shards = (v.reshape(4, 2, *v.shape[1:]) for v in (x, weights, domains))
  shared = jax.pmap(functools.partial(var, axis_name="i"), axis_name="i")(*shards)
  np.testing.assert_allclose(shared, np.stack([wanted] * 4), rtol=1e-5)
