"""Track: running statistics against the float64 oracle, to derived tolerances."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import jaxbn
from jaxbn import Moments, RunningStats
from jaxbn.alternatives import weight_norm
from jaxbn.variants import (
  conditional,
  domain,
  input_norm,
  prediction_time,
  recurrent,
  renorm,
)
from tests import oracle

with warnings.catch_warnings():
  warnings.simplefilter("ignore")  # Flax's own deprecations are not ours
  import flax.linen as nn

U = 2.0**-24  # unit roundoff of float32

OPTIONS = {
  "exponential": {},
  "momentum 0": {"momentum": 0.0},
  "momentum 1": {"momentum": 1.0},
  "unbiased": {"unbiased": True},
  "cumulative": {"momentum": None},
  "cumulative, unbiased": {"momentum": None, "unbiased": True},
  "debiased": {"debias": True},
  "debiased, slow": {"debias": True, "momentum": 0.9999},
  "debiased, momentum 0": {"debias": True, "momentum": 0.0},
  "debiased, unbiased": {"debias": True, "unbiased": True, "momentum": 0.5},
}


def fresh(shape=3, **options):
  return jaxbn.init(shape, **{k: v for k, v in options.items() if k in ("momentum", "debias")})


@functools.partial(jax.jit, static_argnames=("momentum", "debias", "unbiased", "skip_nonfinite"))
def track(state, moments, **options):
  return jaxbn.update(state, moments, **options)


def batch_stats(steps, n=8, channels=3):
  """Exact statistics of a few batches, whose means and variances are of order one."""
  rng = np.random.default_rng(0)
  x = rng.normal(2.0, 1.5, (steps, n, channels)).astype(np.float32)
  return [oracle.moments(batch) for batch in x]


def as_moments(stats):
  return Moments(jnp.asarray(stats.count, jnp.int32), *(jnp.float32(s) for s in stats[1:]))


def assert_tracked(state, batches, **options):
  """Within the roundings of len(batches) blends of numbers no larger than the largest.

  An update rounds its inputs, gain, n / (n - 1), products and sum: fewer than 12 roundings, of a
  convex combination. Debiasing divides by 1 - momentum^t, whose expm1, log and quotient are right
  to a few units; what is left of the first value is the rounding of 1 - gain, times it.
  """
  mean, var = oracle.running(batches, **options)
  largest = [
    max(1.0, *(2 * np.max(np.abs(s)) for s in kind)) for kind in zip(*batches, strict=True)
  ]
  for got, wanted, size in zip(state[:2], (mean, var), largest[1:], strict=True):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=16 * len(batches) * U * size)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("steps", [1, 20])
def test_running_statistics_match_the_oracle(options, steps):
  batches = batch_stats(steps)
  state = fresh(**options)
  for batch in batches:
    state = track(state, as_moments(batch), **options)
  assert_tracked(state, batches, **options)
  if state.count is not None:
    np.testing.assert_array_equal(state.count, np.full(3, steps))


@pytest.mark.parametrize("momentum", [0.5, 0.99, 0.9999, 0.999999])
def test_the_first_debiased_update_is_the_batch_itself(momentum):
  # However little of it an undebiased update would take.
  (batch,) = batch_stats(1)
  options = {"momentum": momentum, "debias": True}
  state = track(fresh(**options), as_moments(batch), **options)
  # expm1 and log cancel up to a few units in the last place; 1 - gain is then as small.
  np.testing.assert_allclose(state.mean, batch.mean, rtol=8 * U)
  np.testing.assert_allclose(state.var, batch.var, rtol=8 * U, atol=8 * U)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.9, "debias": True}])
def test_constant_statistics_are_a_fixed_point(options):
  batch = Moments(np.int32(4), jnp.float32([3.0]), jnp.float32([5.0]))
  state = fresh(1, **options)
  for _ in range(10):
    state = track(state, batch, **options)
  np.testing.assert_allclose(state.mean, [3.0], rtol=30 * U)
  np.testing.assert_allclose(state.var, [5.0], rtol=30 * U)


def test_momentum_zero_takes_the_batch_and_one_keeps_the_state():
  state = RunningStats(jnp.float32([7.0]), jnp.float32([9.0]))
  batch = Moments(np.int32(4), jnp.float32([0.3]), jnp.float32([0.7]))
  chex.assert_trees_all_equal(jaxbn.update(state, batch, momentum=1.0), state)
  taken = jaxbn.update(state, batch, momentum=0.0)
  chex.assert_trees_all_equal(taken, RunningStats(batch.mean, batch.var))


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_the_default_is_the_update_of_flax(momentum):
  x = np.random.default_rng(0).normal(3.0, 2.0, (32, 3)).astype(np.float32)
  layer = nn.BatchNorm(use_running_average=False, momentum=momentum, use_fast_variance=False)
  # Flax's own statistics of the batch, so that only the update is compared.
  mean = jnp.mean(x, 0)
  batch = Moments(np.int32(32), mean, jnp.mean(jnp.square(x - mean), 0))
  variables = layer.init(jax.random.key(0), x)
  for _ in range(2):
    ours = jaxbn.update(RunningStats(**variables["batch_stats"]), batch, momentum=momentum)
    _, changed = layer.apply(variables, x, mutable="batch_stats")
    for name, theirs in changed["batch_stats"].items():
      np.testing.assert_array_max_ulp(np.asarray(getattr(ours, name)), np.asarray(theirs), 1)
    variables = {**variables, **changed}


# ---------------------------------------------------------------------------------------------
# Unbiased


@pytest.mark.parametrize(
  ("count", "factor"),
  [(np.int32(2), 2.0), (np.int32(5), 1.25), (np.int32(1), 1.0), (np.float32(1.5), 3.0)],
)
def test_unbiased_multiplies_the_variance_by_n_over_n_less_one(count, factor):
  batch = Moments(count, jnp.ones(2), jnp.full(2, 4.0))
  state = jaxbn.update(fresh(2), batch, momentum=0.0, unbiased=True)
  np.testing.assert_array_equal(state.var, np.full(2, 4 * factor))
  np.testing.assert_array_equal(state.mean, np.ones(2))


def test_unbiased_takes_each_channel_s_own_count():
  batch = Moments(jnp.array([0, 1, 3]), jnp.zeros(3), jnp.array([0.0, 0.0, 2.0]))
  state = jaxbn.update(fresh(3), batch, momentum=0.0, unbiased=True)
  np.testing.assert_array_equal(state.var, [1.0, 0.0, 3.0])


WEIGHTS = np.random.default_rng(4).uniform(0.1, 1, (9, 3)).astype(np.float32)


@pytest.mark.parametrize(
  "weights",
  [
    WEIGHTS,
    WEIGHTS / WEIGHTS.sum(0),
    WEIGHTS[:, :1],
    1000 * WEIGHTS,
    np.eye(9, 3, dtype=np.float32),
  ],
  ids=["any", "summing to one", "of examples", "large", "of one element"],
)
def test_unbiased_takes_what_reliabilities_are_worth(weights):
  x = np.random.default_rng(5).normal(3, 2, (9, 3)).astype(np.float32)
  options = {"use_running_average": False, "unbiased": True, "momentum": 0.0}
  _, state = jaxbn.batch_norm(x, state=jaxbn.init(3), weights=weights, **options)
  several = np.broadcast_to(weights > 0, x.shape).sum(0) > 1
  with np.errstate(divide="ignore"):
    factor = np.where(several, oracle.reliability(x, weights=weights), 1)
  np.testing.assert_allclose(state.var, oracle.moments(x, weights=weights).var * factor, rtol=2e-5)


def test_weights_of_all_devices_are_worth_what_they_are_together():
  x = np.random.default_rng(5).normal(3, 2, (8, 3)).astype(np.float32)
  options = {"use_running_average": False, "unbiased": True, "momentum": 0.0}

  def step(x, weights, **more):
    return jaxbn.batch_norm(x, state=jaxbn.init(3), weights=weights, **options, **more)[1].var

  weights = WEIGHTS[:8]
  wanted = oracle.moments(x, weights=weights).var * oracle.reliability(x, weights=weights)
  np.testing.assert_allclose(step(x, weights), wanted, rtol=1e-5)
  split = functools.partial(step, axis_name="i")
  shared = jax.pmap(split, axis_name="i")(x.reshape(4, 2, 3), weights.reshape(4, 2, 3))
  np.testing.assert_allclose(shared, np.tile(wanted, (4, 1)), rtol=1e-5)


def test_whole_numbers_are_counts():
  x = np.random.default_rng(5).normal(3, 2, (9, 3)).astype(np.float32)
  times = np.random.default_rng(6).integers(0, 4, 9)
  options = {"use_running_average": False, "unbiased": True, "momentum": 0.0}
  _, state = jaxbn.batch_norm(x, state=jaxbn.init(3), weights=times[:, None], **options)
  wanted = np.var(np.repeat(x.astype(np.float64), times, 0), 0, ddof=1)
  np.testing.assert_allclose(state.var, wanted, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_unbiased_takes_the_count_of_all_devices(masked):
  x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
  # All of the elements, or one on each device, whose own n - 1 is zero.
  mask = np.broadcast_to(np.arange(2)[:, None] < (1 if masked else 2), x.shape)

  def step(x, mask):
    kept = {"mask": mask} if masked else {}
    batch = jaxbn.sync(jaxbn.moments(x, **kept), "i")
    return jaxbn.update(jaxbn.init(3), batch, momentum=0.0, unbiased=True)

  state = jax.jit(jax.vmap(step, axis_name="i"))(x, mask)
  exact = oracle.moments(np.concatenate(x), mask=np.concatenate(mask))
  wanted = exact.var * exact.count / (exact.count - 1)
  # Eight elements of order one: fewer than 64 roundings.
  np.testing.assert_allclose(state.var[0], wanted, rtol=64 * U)


# ---------------------------------------------------------------------------------------------
# What is left out


def state_with_count():
  return RunningStats(jnp.float32([1, 2, 3]), jnp.float32([4, 5, 6]), jnp.int32([7, 8, 9]))


every_kind = pytest.mark.parametrize(
  "options",
  [{}, {"unbiased": True}, {"momentum": None}, {"debias": True}],
  ids=["exponential", "unbiased", "cumulative", "debiased"],
)


@every_kind
@pytest.mark.parametrize("run", [jaxbn.update, track], ids=["eager", "jit"])
def test_a_batch_without_elements_leaves_the_state(options, run):
  state = state_with_count()
  for count in (np.int32(0), jnp.int32(0), jnp.float32([0, 0, 0])):
    empty = jaxbn.empty_moments(3)._replace(count=count)
    kept = run(state, empty, **options)
    chex.assert_trees_all_equal(kept[:2], state[:2])
    np.testing.assert_array_equal(kept.count, state.count)


@every_kind
def test_a_channel_without_elements_stays_while_others_move(options):
  state = state_with_count()
  batch = Moments(jnp.int32([4, 0, 4]), jnp.float32([9, 0, 9]), jnp.float32([9, 0, 9]))
  moved = track(state, batch, **options)
  for old, new in zip(state, moved, strict=True):
    assert old[1] == new[1]
    assert np.all(np.asarray(old != new)[::2])


@every_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["mean", "var"])
def test_skip_nonfinite_leaves_a_channel_and_its_count(options, value, leaf):
  state = state_with_count()
  batch = Moments(np.int32(4), jnp.float32([9, 9, 9]), jnp.float32([9, 9, 9]))
  bad = batch._replace(**{leaf: jnp.float32([9, value, 9])})
  skipped = track(state, bad, skip_nonfinite=True, **options)
  clean = track(state, batch, skip_nonfinite=True, **options)
  for old, new, wanted in zip(state, skipped, clean, strict=True):
    assert old[1] == new[1]
    np.testing.assert_array_equal(new[::2], wanted[::2])
  assert not np.isfinite(getattr(track(state, bad, **options), leaf)[1])


@every_kind
def test_the_gradient_of_a_skipped_batch_is_zero(options):
  state = state_with_count()
  batch = Moments(jnp.int32([4, 4, 0]), jnp.float32([9, np.nan, 0]), jnp.float32([9, np.inf, 0]))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(mean, var):
    batch_now = batch._replace(mean=mean, var=var)
    new = jaxbn.update(state, batch_now, skip_nonfinite=True, **options)
    return jnp.sum(new.mean + new.var)

  for leaf in gradient(batch.mean, batch.var):
    assert np.all(np.isfinite(leaf))
    assert leaf[0] > 0
    np.testing.assert_array_equal(leaf[1:], [0, 0])


def test_a_skipped_batch_gives_momentum_no_gradient():
  state = state_with_count()
  batch = Moments(jnp.int32([4, 4, 0]), jnp.float32([9, np.nan, 0]), jnp.float32([9, 9, 0]))

  @jax.jit
  @jax.grad
  def gradient(momentum):
    return jnp.sum(jaxbn.update(state, batch, momentum=momentum, skip_nonfinite=True).mean)

  assert gradient(0.5) == 1 - 9  # old less new, of the one channel that moves


# ---------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.99}, {"debias": True}])
def test_half_precision_state_becomes_single(dtype, options):
  rng = np.random.default_rng(0)
  old, new = rng.uniform(1, 2, (2, 64)).astype(np.float32)
  single = fresh(64, **options)._replace(mean=jnp.asarray(old, dtype), var=jnp.asarray(new, dtype))
  batch = Moments(np.int32(4), jnp.asarray(new), jnp.asarray(old))
  if single.count is not None:
    single = single._replace(count=jnp.full(64, 30, jnp.int32))
  state = jaxbn.update(single, batch, **options)
  chex.assert_type([state.mean, state.var], jnp.float32)
  wide = single._replace(mean=single.mean.astype("float32"), var=single.var.astype("float32"))
  wanted = jaxbn.update(wide, batch, **options)
  chex.assert_trees_all_equal(state, wanted)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_averages_arrive_whatever_the_state_started_in(dtype):
  # A step of 1 % of what is left is below half an ulp of bfloat16 long before nothing is left.
  x = jnp.array([[1.0], [2.0], [4.0]])
  state = jaxbn.init(1, dtype=dtype)
  _, state = jaxbn.batch_norm(x, state=state, use_running_average=False)
  step = lambda state, _: (jaxbn.update(state, jaxbn.moments(x)), None)  # noqa: E731
  state, _ = jax.lax.scan(step, state, length=2000)
  # 0.99^2001 = 2e-9 of the start is left. An update rounds 0.99, its product with the average, and
  # the sum, where the compiler fuses no two of them; and 1 / (1 - 0.99) such roundings add up.
  exact = oracle.moments(x)
  for name in ("mean", "var"):
    np.testing.assert_allclose(getattr(state, name), getattr(exact, name), rtol=100 * 3 * U)


def test_single_and_double_precision_promote():
  with jax.enable_x64(True):
    for state_dtype, batch_dtype in [("float32", "float64"), ("float64", "float32")]:
      state = jaxbn.init(2, dtype=state_dtype)
      batch = Moments(np.int32(4), jnp.ones(2, batch_dtype), jnp.ones(2, batch_dtype))
      updated = jaxbn.update(state, batch)
      chex.assert_type([updated.mean, updated.var], jnp.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_complex_batches_have_complex_means_and_real_variances(dtype):
  batch = Moments(np.int32(4), jnp.array([2 + 4j], jnp.complex64), jnp.float32([8]))
  state = jaxbn.update(jaxbn.init(1, dtype=dtype), batch, momentum=0.5)
  chex.assert_type([state.mean, state.var], [jnp.complex64, jnp.float32])
  np.testing.assert_array_equal(state.mean, [1 + 2j])
  np.testing.assert_array_equal(state.var, [4.5])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_keeps_its_types_in_a_scan(options, dtype):
  state = fresh(**options)
  x = jax.ShapeDtypeStruct((5, 6, 3), dtype)

  def step(state, batch):
    return jaxbn.update(state, jaxbn.moments(batch), **options), None

  after, _ = jax.eval_shape(lambda s, x: jax.lax.scan(step, s, x), state, x)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
    lambda a: (a.shape, a.dtype), state
  )


def test_leaves_are_those_of_flax_unless_a_count_is_needed():
  assert jaxbn.init(3).count is None
  assert len(jax.tree.leaves(jaxbn.update(jaxbn.init(3), jaxbn.empty_moments(3)))) == 2
  for options in ({"momentum": None}, {"debias": True}):
    state = fresh((2, 3), **options)
    chex.assert_trees_all_equal(state.count, jnp.zeros((2, 3), jnp.float32))
  chex.assert_trees_all_equal(jaxbn.init(2)[:2], (jnp.zeros(2), jnp.ones(2)))
  complex_state = jaxbn.init([2], dtype=jnp.complex64)
  chex.assert_type(complex_state[:2], [jnp.complex64, jnp.float32])


def test_a_count_that_is_not_needed_is_counted_all_the_same():
  # So that a state made for debiasing may be read on without.
  batch = as_moments(batch_stats(1)[0])
  np.testing.assert_array_equal(jaxbn.update(state_with_count(), batch).count, [8, 9, 10])


# ---------------------------------------------------------------------------------------------
# Transformations


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9999])
def test_momentum_may_be_an_array(momentum, debias):
  batches = batch_stats(2)

  @jax.jit
  def step(state, batch, momentum):
    return jaxbn.update(state, batch, momentum=momentum, debias=debias)

  state = jaxbn.init(3, debias=debias)
  for batch in batches:
    state = step(state, as_moments(batch), jnp.float32(momentum))
  # float32 has another momentum than the float64 one asked for: compare with what it is given.
  exact_momentum = float(np.float32(momentum))
  if debias and momentum == 0.9999:
    # 1 - momentum and log(momentum) agree to u / (1 - momentum) only by way of 1 - momentum^t.
    assert np.all(np.isfinite(state.mean))
    np.testing.assert_allclose(state.mean, np.mean([b.mean for b in batches], 0), rtol=1e-3)
    return
  assert_tracked(state, batches, momentum=exact_momentum, debias=debias)


def test_momentum_has_a_gradient():
  batch = Moments(np.int32(4), jnp.float32([3.0]), jnp.float32([1.0]))
  gradient = jax.grad(lambda m: jaxbn.update(jaxbn.init(1), batch, momentum=m).mean[0])
  assert gradient(0.75) == -3.0


class Variants(chex.TestCase):
  """The same numbers, whichever way the function is run."""

  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.named_parameters(
    ("exponential", {"momentum": 0.9}),
    ("cumulative", {"momentum": None}),
    ("debiased", {"momentum": 0.9, "debias": True}),
  )
  def test_update(self, options):
    batches = batch_stats(3)
    step = self.variant(functools.partial(jaxbn.update, **options))
    state = fresh(**options)
    for batch in batches:
      state = step(state, as_moments(batch))
    assert_tracked(state, batches, **options)


def test_new_values_are_not_traced_again():
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(state, batch, momentum):
    return jaxbn.update(state, batch, momentum=momentum, debias=True, skip_nonfinite=True)

  state = jaxbn.init(3, debias=True)
  for i, batch in enumerate(batch_stats(3)):
    state = step(state, as_moments(batch), 0.9 - i / 10)


def test_states_of_several_layers_update_under_vmap():
  batches = batch_stats(2)
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *map(as_moments, batches))
  states = jax.vmap(lambda m: jaxbn.update(jaxbn.init(3), m))(stacked)
  for i, batch in enumerate(batches):
    chex.assert_trees_all_equal(
      jax.tree.map(lambda a, i=i: a[i], states), track(jaxbn.init(3), as_moments(batch))
    )


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("momentum", [-0.1, 1.1, np.nan, np.inf, np.float32(2)])
def test_momentum_out_of_range_is_refused(momentum):
  for call in (jaxbn.init, functools.partial(jaxbn.update, jaxbn.init(3), jaxbn.empty_moments(3))):
    args = (3,) if call is jaxbn.init else ()
    with pytest.raises(ValueError, match=r"momentum=.* is out of range.*from 0 to 1"):
      call(*args, momentum=momentum)


def test_a_momentum_that_is_not_a_number_is_refused():
  with pytest.raises(TypeError, match=r"momentum=\[0\.1\] is not a number"):
    jaxbn.init(3, momentum=[0.1])


@pytest.mark.parametrize("momentum", [None, 1.0])
def test_debias_is_refused_where_there_is_nothing_to_remove(momentum):
  message = rf"debias=True with momentum={momentum}"
  with pytest.raises(ValueError, match=message):
    jaxbn.init(3, momentum=momentum, debias=True)
  with pytest.raises(ValueError, match=message):
    jaxbn.update(state_with_count(), jaxbn.empty_moments(3), momentum=momentum, debias=True)


@pytest.mark.parametrize("options", [{"momentum": None}, {"debias": True}])
def test_a_state_without_the_count_that_an_option_needs_is_refused(options):
  option = "momentum=None" if "momentum" in options else "debias=True"
  with pytest.raises(
    ValueError, match=rf"{option} needs the number of updates.*jaxbn\.init\("
  ) as e:
    jaxbn.update(jaxbn.init(3), jaxbn.empty_moments(3), **options)
  assert "state.count is None" in str(e.value)


@pytest.mark.parametrize("shape", [(), 2, (1, 3), (3, 3)])
def test_a_state_of_other_channels_is_refused(shape):
  with pytest.raises(ValueError, match=r"state has channels of shape .*moments \(3,\).*init\(3,\)"):
    jaxbn.update(jaxbn.init(shape), jaxbn.empty_moments(3))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32, jnp.uint8])
@pytest.mark.parametrize("options", [{"momentum": None}, {"debias": True}], ids=str)
def test_a_count_of_any_dtype_counts_and_keeps_it(options, dtype):
  # Checkpoints have integers; and a mean over devices makes them floating-point.
  batch = as_moments(batch_stats(1)[0])
  state, expected = (
    state_with_count()._replace(count=jnp.array([7, 8, 9], d)) for d in (dtype, jnp.int32)
  )
  for _ in range(3):
    state, expected = (track(s, batch, **options) for s in (state, expected))
    assert state.count.dtype == dtype
    chex.assert_trees_all_equal(state[:2], expected[:2])
    np.testing.assert_array_equal(state.count, expected.count)


def test_the_mean_of_a_state_over_devices_is_a_state():
  # What Flax's examples do before they save: the leaves keep their types, and a scan its carry.
  xs = jax.random.normal(jax.random.key(0), (4, 5, 8, 3))  # devices, steps, examples, channels

  def steps(xs):
    def step(state, x):
      state = jaxbn.update(state, jaxbn.moments(x), debias=True)
      return jax.lax.pmean(state, "devices"), None

    return jax.lax.scan(step, fresh(debias=True), xs)[0]

  state = jax.vmap(steps, axis_name="devices")(xs)
  np.testing.assert_array_equal(state.count, np.full((4, 3), 5))


@every_kind
@pytest.mark.parametrize("valid", [True, False])
def test_a_count_at_its_end_stays_there(options, valid):
  end = jnp.full(3, 2.0**24, jnp.float32)
  state = state_with_count()._replace(count=end)
  batch = as_moments(batch_stats(1)[0]) if valid else jaxbn.empty_moments(3)
  after = track(state, batch, **options)
  np.testing.assert_array_equal(after.count, end)
  assert np.all(np.isfinite(after.mean))
  if options.get("momentum", 0) is None:  # no batch of that many is seen in a float32 average
    np.testing.assert_allclose(after.mean, state.mean, rtol=2 * U)


def test_a_count_is_no_path_for_gradients():
  batch = as_moments(batch_stats(1)[0])

  def mean(count):
    state = jaxbn.init(3)._replace(count=count)
    return jnp.sum(jaxbn.update(state, batch, debias=True, momentum=0.0).mean)

  np.testing.assert_array_equal(jax.grad(mean)(jnp.ones(3)), np.zeros(3))


def test_a_batch_that_is_not_moments_is_refused():
  with pytest.raises(TypeError, match=r"a tuple was given; jaxbn\.Moments are needed"):
    jaxbn.update(jaxbn.init(3), (8, jnp.zeros(3), jnp.ones(3)))


def test_a_count_that_is_known_needs_no_selection():
  # Every layer has one, and all that is traced is lowered and compiled.
  def update(state, mean, var):
    return jaxbn.update(state, jaxbn.Moments(np.int32(8), mean, var))

  assert "select_n" not in str(jax.make_jaxpr(update)(jaxbn.init(3), jnp.ones(3), jnp.ones(3)))


X = jax.random.normal(jax.random.key(0), (6, 4, 2)) + 1
LABELS = jnp.array([0, 1, 0, 1, 0, 1])
STEP = {
  "params": recurrent.GRUParams(
    jnp.ones((2, 3)), jnp.ones((1, 3)), jnp.zeros(3), jnp.ones(3), jnp.ones(3)
  ),
  "carry": recurrent.gru_carry(6, 1),
}
# Every function that takes a state, of the statistics of a channel, a domain or a step.
OF_A_STATE = {
  "update": lambda state, train: jaxbn.update(state, jaxbn.moments(X), debias=True),
  "batch_norm": lambda state, train: jaxbn.batch_norm(
    X, state=state, use_running_average=not train, debias=True
  ),
  "renorm": lambda state, train: renorm.batch_renorm(
    X, None, None, state, use_running_average=not train
  ),
  "mean only": lambda state, train: weight_norm.mean_only_batch_norm(
    X, state=state, use_running_average=not train
  ),
  "prediction time": lambda state, train: prediction_time.prediction_time_batch_norm(
    X, None, None, state, prior=2.0
  ),
  "conditional": lambda state, train: conditional.conditional_batch_norm(
    X, jnp.ones((2, 2)), None, state, labels=LABELS, use_running_average=not train
  ),
  "domain": lambda state, train: domain.domain_batch_norm(
    X, None, None, _each([state] * 2), domains=LABELS, use_running_average=not train
  ),
  "sequence": lambda state, train: input_norm.sequence_norm(
    X, state=state, use_running_average=not train
  ),
  "frames": lambda state, train: input_norm.sequence_norm(
    X, state=_each([state] * 4), use_running_average=not train, frame_wise=True
  ),
  "recurrent": lambda state, train: recurrent.gru_step(
    STEP["params"],
    recurrent.GRUStats(*[_each([_wider(state)] * 2)] * 2),
    STEP["carry"],
    X[:, 0],
    use_running_average=not train,
  ),
}


def _each(states):
  """A state of lists, or arrays, with a row for each."""
  stack = list if isinstance(states[0].mean, list) else jnp.stack
  return RunningStats(*(stack(leaf) for leaf in zip(*states, strict=True)))


def _wider(state):
  return RunningStats(
    *(jnp.concatenate([v, v[:1]]) if hasattr(v, "shape") else v + v[:1] for v in state)
  )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", OF_A_STATE)
def test_a_state_of_lists_is_one_of_arrays(name, train):
  lists = RunningStats(mean=[0.25, 0.5], var=[1.0, 2.0], count=[3.0, 4.0])
  arrays = RunningStats(*map(jnp.array, lists))
  chex.assert_trees_all_equal(OF_A_STATE[name](lists, train), OF_A_STATE[name](arrays, train))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("leaf", ["mean", "var"])
@pytest.mark.parametrize("name", OF_A_STATE)
def test_integer_statistics_are_refused(name, leaf, train):
  state = RunningStats(jnp.zeros(2), jnp.ones(2), jnp.ones(2))
  state = state._replace(**{leaf: jnp.array([1, 2])})
  with pytest.raises(TypeError, match=rf"state\.{leaf} has dtype int32.*convert it first"):
    OF_A_STATE[name](state, train)


@pytest.mark.parametrize(
  "value", [None, "0", [[1.0], [1.0, 2.0]], object()], ids=lambda v: type(v).__name__
)
def test_statistics_that_are_no_numbers_are_refused(value):
  with pytest.raises(TypeError, match=r"state\.var=.* is not an array.*jaxbn\.init"):
    jaxbn.batch_norm(X, state=RunningStats(jnp.zeros(2), value), use_running_average=True)


def test_a_state_that_is_evaluated_is_itself():
  state = jaxbn.init(2)
  assert jaxbn.batch_norm(X, state=state, use_running_average=True)[1] is state
