"""batch_norm: values, accuracy, masks and weights, special values, dtypes, refusals."""

import functools
import itertools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
from benchmarks import hlo
from tests import bounds, oracle
from tests.cases import DTYPES, channels, precision

LAYOUTS = [
  ((12,), ()),
  ((12, 3), -1),
  ((3, 12), 0),
  ((6, 3, 4), 1),
  ((6, 3, 4), (0, -1)),
  ((4, 3, 3, 5), -1),
  ((4, 5, 3, 3), -3),
  ((3, 2, 3, 3, 2), (1, 4)),
  ((3, 2, 3, 3, 2), (-1, 0, -4)),
]


def inputs(shape, axis=-1, dtype=jnp.float32, seed=0, ratio=0.5):
  """x with standard deviation 2 and mean 2 ratio, and scale and bias in the accumulator's dtype."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(2 * (ratio + rng.normal(size=shape)), dtype)
  of_channels = channels(shape, axis)
  parameters = rng.normal(1, 0.5, of_channels), rng.normal(0, 1, of_channels)
  return x, *(jnp.asarray(p, bounds.accumulator(dtype)) for p in parameters)


def train(x, *args, **options):
  """y in training."""
  return jaxbn.batch_norm(x, *args, use_running_average=False, **options)[0]


def check(y, x, scale, bias, axis=-1, mask=None, weights=None, epsilon=1e-5):
  """y is the oracle's at all elements that count."""
  expected = oracle.batch_norm(x, scale, bias, epsilon, axis, mask, weights)
  bound = bounds.output(x, scale, bias, y.dtype, epsilon, axis, mask=mask, weights=weights)
  valid = oracle.weights_of(x, mask, weights) > 0
  bounds.assert_within(y, expected, bound, valid)


# Values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_training_is_the_formula_in_every_layout_and_dtype(shape, axis, dtype):
  with precision(dtype):
    x, scale, bias = inputs(shape, axis, dtype)
    y = jax.jit(lambda *a: train(*a, axis=axis, dtype=dtype))(x, scale, bias)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    check(y, x, scale, bias, axis)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_scale", [True, False])
def test_scale_and_bias_may_be_left_out(has_scale, has_bias, epsilon):
  x, scale, bias = inputs((12, 3))
  y = train(x, scale if has_scale else None, bias if has_bias else None, epsilon=epsilon)
  check(
    y, x, scale if has_scale else np.ones(3), bias if has_bias else np.zeros(3), epsilon=epsilon
  )


@pytest.mark.parametrize("option", [{"debias": True}, {"momentum": 0.9}, {"unbiased": True}])
def test_the_new_state_holds_the_batch_and_evaluation_reads_it(option):
  x, scale, bias = inputs((12, 3))
  momentum = option.get("momentum", 0.99)
  state = jaxbn.init(3, momentum=momentum, debias="debias" in option)
  _, state = jaxbn.batch_norm(x, scale, bias, state, use_running_average=False, **option)
  mean, var = oracle.running([oracle.moments(x)], **option)
  np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
  np.testing.assert_allclose(state.var, var, rtol=1e-5)
  y, same = jaxbn.batch_norm(x, scale, bias, state, use_running_average=True)
  assert same is state
  expected = oracle.normalize(x, state.mean, state.var, scale, bias)
  scaled_z = oracle.normalize(x, state.mean, state.var, scale)
  bounds.assert_within(y, expected, bounds.normalized(expected, scaled_z, bias, x.dtype, y.dtype))


def test_without_a_state_nothing_is_tracked():
  x, scale, bias = inputs((12, 3))
  y, state = jaxbn.batch_norm(x, scale, bias, use_running_average=False)
  assert state is None
  y_tracked, _ = jaxbn.batch_norm(x, scale, bias, jaxbn.init(3), use_running_average=False)
  np.testing.assert_array_equal(y, y_tracked)


@pytest.mark.parametrize("use_running_average", [False, True])
def test_complex_input_agrees_with_flax_and_with_the_formula(use_running_average):
  x, scale, bias = inputs((16, 3))
  x = x + 1j * jnp.roll(x, 3, 0) ** 2
  layer = flax.linen.BatchNorm(use_running_average=use_running_average, dtype=jnp.complex64)
  params = {"scale": scale, "bias": bias}
  stats = {"mean": jnp.array([1, 1j, 0.5 + 2j]), "var": jnp.array([0.5, 1.0, 4.0])}
  theirs, _ = layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
  ours, state = jaxbn.batch_norm(
    x, scale, bias, jaxbn.RunningStats(**stats), use_running_average=use_running_average
  )
  assert ours.dtype == jnp.complex64
  assert state.var.dtype == jnp.float32
  if use_running_average:
    expected = oracle.normalize(x, stats["mean"], stats["var"], scale, bias)
  else:
    expected = oracle.batch_norm(x, scale, bias)
  bound = bounds.output(x, scale, bias) + 20 * bounds.roundoff(jnp.float32) * np.abs(expected)
  bounds.assert_within(ours, expected, bound)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_numpy_arrays_and_lists_are_accepted():
  x, scale, bias = inputs((6, 3))
  expected = train(x, scale, bias)
  for convert in (np.asarray, lambda a: np.asarray(a).tolist()):
    np.testing.assert_array_equal(train(*map(convert, (x, scale, bias))), expected)


DTYPE_CHOICES = [jnp.float16, jnp.bfloat16, jnp.float32]
COMBINATIONS = list(itertools.product(DTYPE_CHOICES, DTYPE_CHOICES, [None, *DTYPE_CHOICES]))


def test_the_output_dtype_is_that_of_flax():
  for x_dtype, param_dtype, dtype in COMBINATIONS:
    layer = flax.linen.BatchNorm(use_running_average=True, dtype=dtype, param_dtype=param_dtype)
    x = jax.ShapeDtypeStruct((4, 3), x_dtype)
    theirs, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    params = variables["params"]
    ours, _ = jax.eval_shape(
      lambda x, p, s, dtype=dtype: jaxbn.batch_norm(
        x, p["scale"], p["bias"], s, use_running_average=False, dtype=dtype
      ),
      *(x, params, jaxbn.init(3)),
    )
    assert ours.dtype == theirs.dtype, (x_dtype, param_dtype, dtype)


# Accuracy

# Many channels, so that some of them show whatever can go wrong.
BATCHES = {"NC": ((2048, 16), -1), "NHWC": ((32, 8, 8, 16), -1), "NCHW": ((32, 16, 8, 8), 1)}


def far_data(ratio, layout, seed=0):
  shape, axis = BATCHES[layout]
  noise = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(ratio + noise, jnp.float32), axis


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize(("ratio", "claim"), [(1e3, 1e-3), (1e4, 1e-2)])
def test_a_mean_of_thousands_of_deviations_is_normalized_right(ratio, claim, layout, jit):
  x, axis = far_data(ratio, layout)
  ones, zeros = np.ones(16), np.zeros(16)
  run = jax.jit(train, static_argnames="axis") if jit else train
  y = run(x, axis=axis)
  assert np.max(np.abs(y - oracle.batch_norm(x, axis=axis))) <= claim
  check(y, x, ones, zeros, axis)


def test_flax_by_default_is_off_by_hundreds_on_the_same_data():
  # The comparison that this library exists for.
  x, _ = far_data(1e4, "NC")
  layer = flax.linen.BatchNorm(use_running_average=False)
  y, _ = layer.init_with_output(jax.random.key(0), x)
  assert np.max(np.abs(y - oracle.batch_norm(x))) > 100


@pytest.mark.parametrize("use_fast_variance", [True, False])
def test_an_outlier_in_front_costs_digits_in_one_pass_and_none_in_two(use_fast_variance):
  # The pivot is then sqrt(n - 1) deviations from the mean: as far as Samuelson lets it be.
  outliers = jnp.array([1.0, 1.7, 3.3, 0.77]) * 1e6
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2**16, 4)), jnp.float32)
  x = x.at[0].set(outliers)
  ones, zeros = np.ones(4), np.zeros(4)
  y = train(x, use_fast_variance=use_fast_variance)
  bound = bounds.output(x, ones, zeros, two_passes=not use_fast_variance)
  bounds.assert_within(y, oracle.batch_norm(x), bound)


# Masks and weights


def broadcastable_shapes(shape):
  """Every shape that broadcasts against `shape`, down to ()."""
  for start in range(len(shape) + 1):
    yield from itertools.product(*({1, n} for n in shape[start:]))


@pytest.mark.parametrize(("existing", "axis"), [("mask", 1), ("weights", (0, 2))])
def test_masks_and_weights_of_every_broadcastable_shape(existing, axis):
  x, scale, bias = inputs((5, 4, 3), axis)
  rng = np.random.default_rng(0)
  run = jax.jit(train, static_argnames="axis")
  for shape in broadcastable_shapes(x.shape):
    options = {"mask": rng.random(shape) < 0.7, "weights": rng.integers(0, 4, shape) / 2}
    given = {existing: options[existing]}
    check(run(x, scale, bias, axis=axis, **given), x, scale, bias, axis, **given)


@settings(max_examples=12)  # each compiles a program
@given(
  layout=st.sampled_from(LAYOUTS),
  dtype=st.sampled_from(DTYPES[:3]),
  kind=st.sampled_from(["mask", "weights", "both"]),
  garbage=st.sampled_from([np.nan, np.inf, -np.inf, 6e4]),
  data=st.data(),
)
def test_what_does_not_exist_may_hold_anything(layout, dtype, kind, garbage, data):
  shape, axis = layout
  seed = data.draw(st.integers(0, 999))
  x, scale, bias = inputs(shape, axis, dtype, seed)
  shared = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
  small = tuple(1 if one else n for n, one in zip(shape, shared, strict=True))
  rng = np.random.default_rng(seed)
  options = {"mask": rng.random(small) < 0.7, "weights": rng.integers(0, 3, small) / 2}
  options = {k: v for k, v in options.items() if kind in (k, "both")}
  valid = oracle.weights_of(x, **options) > 0
  dirty = jnp.where(valid, x, garbage).astype(dtype)
  run = jax.jit(lambda x, options: train(x, scale, bias, axis=axis, dtype=dtype, **options))
  y = run(dirty, options)
  check(y, x, scale, bias, axis, **options)
  assert np.isfinite(oracle.wide(y)[valid]).all()


MASK = np.arange(24).reshape(8, 3) % 5 > 0  # different counts in different channels
WEIGHTS = np.where(MASK, np.linspace(0.5, 2, 24).reshape(8, 3), 0).astype(np.float32)
EXISTING = ["mask", "weights"]


@functools.cache  # one program for all the x of a test
def everything(existing, masked_value, use_running_average, everywhere=False):
  """A function from x to y, the new state, and the gradients of x, scale, bias and weights."""
  scale, bias = jnp.array([0.5, 1.0, 2.0]), jnp.array([0.0, 1.0, -1.0])
  state = jaxbn.RunningStats(jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 0.5, 2.0]))

  def loss(x, scale, bias, options):
    y, new_state = jaxbn.batch_norm(
      *(x, scale, bias, state),
      use_running_average=use_running_average,
      masked_value=masked_value,
      **options,
    )
    read = jnp.cos(y) if everywhere else jnp.where(MASK, jnp.cos(y), 0)
    return jnp.sum(read), (y, new_state)

  @jax.jit
  def run(x):
    if existing == "mask":
      masked = functools.partial(loss, options={"mask": MASK})
      gradients, (y, new_state) = jax.grad(masked, (0, 1, 2), has_aux=True)(x, scale, bias)
    else:
      options = {"weights": jnp.asarray(WEIGHTS)}
      gradient = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
      gradients, (y, new_state) = gradient(x, scale, bias, options)
    return y, new_state, jax.tree.leaves(gradients)

  return run


@pytest.mark.parametrize("use_running_average", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("masked_value", [None, 0.0])
@pytest.mark.parametrize("existing", EXISTING)
def test_masked_elements_reach_no_output_no_state_and_no_gradient(
  existing, masked_value, use_running_average
):
  x, *_ = inputs((8, 3))
  run = everything(existing, masked_value, use_running_average)
  clean = run(x)
  for garbage in (np.nan, np.inf, -np.inf, 1e38):
    dirty = run(jnp.where(MASK, x, garbage))
    np.testing.assert_array_equal(np.asarray(dirty[0])[MASK], np.asarray(clean[0])[MASK])
    jax.tree.map(np.testing.assert_array_equal, dirty[1:], clean[1:])
    assert all(np.isfinite(g).all() for g in dirty[2])
    assert not np.any(np.asarray(dirty[2][0])[~MASK])


@pytest.mark.parametrize("use_running_average", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("existing", EXISTING)
def test_a_masked_value_is_held_exactly_and_passes_no_gradient(existing, use_running_average):
  x, *_ = inputs((8, 3))
  x = jnp.where(MASK, x, np.nan)
  y, _, gradients = everything(existing, 0.25, use_running_average, everywhere=True)(x)
  assert np.all(np.asarray(y)[~MASK] == 0.25)
  *_, expected = everything(existing, 0.25, use_running_average)(x)
  jax.tree.map(np.testing.assert_array_equal, gradients, expected)


@pytest.mark.parametrize("use_running_average", [False, True], ids=["training", "evaluation"])
def test_by_default_masked_positions_hold_the_formula_or_bias(use_running_average):
  x, scale, bias = inputs((8, 3))
  x = x.at[0].set(np.nan).at[1].set(7.0)
  mask = np.arange(8)[:, None] > 1
  state = jaxbn.init(3)
  y, _ = jaxbn.batch_norm(x, scale, bias, state, use_running_average=use_running_average, mask=mask)
  stats = state if use_running_average else oracle.moments(x, mask=mask)
  np.testing.assert_array_equal(y[0], bias)
  expected = oracle.normalize(x[1:2], stats.mean, stats.var, scale, bias)
  np.testing.assert_allclose(y[1:2], expected, rtol=1e-4)


def test_a_loss_that_reads_masked_nans_has_finite_gradients():
  x, *_ = inputs((8, 3))
  for garbage in (np.nan, np.inf):
    run = everything("mask", None, False, everywhere=True)
    _, _, gradients = run(jnp.where(MASK, x, garbage))
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.any(np.asarray(gradients[0])[~MASK])


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf, 1e38])
@pytest.mark.parametrize("option", [{}, {"debias": True}, {"momentum": None}])
def test_a_batch_that_is_all_masked_leaves_the_state_and_gives_finite_outputs(option, garbage):
  x, scale, bias = inputs((8, 3))
  state = jaxbn.init(3, **option)
  _, state = jaxbn.batch_norm(x, scale, bias, state, use_running_average=False, **option)
  nothing = np.zeros((8, 1), bool)

  def loss(x, scale, bias):
    y, new_state = jaxbn.batch_norm(
      *(x, scale, bias, state), use_running_average=False, mask=nothing, **option
    )
    return jnp.sum(jnp.where(nothing, y, 0)), (y, new_state)

  gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  gradients, (y, new_state) = gradient(jnp.full_like(x, garbage), scale, bias)
  assert np.isfinite(y).all()
  jax.tree.map(np.testing.assert_array_equal, new_state, state)
  assert not any(np.any(g) for g in gradients)


def test_a_channel_that_is_all_masked_stays_while_the_others_learn():
  x, scale, bias = inputs((8, 3))
  mask = np.array([True, False, True])
  _, state = jaxbn.batch_norm(x, scale, bias, jaxbn.init(3), use_running_average=False, mask=mask)
  np.testing.assert_array_equal(state.mean == 0, ~mask)
  np.testing.assert_array_equal(state.var == 1, ~mask)


def test_weights_of_an_integer_dtype_are_repetitions():
  x, scale, bias = inputs((6, 3))
  times = np.array([1, 3, 0, 2, 1, 4])
  state = jaxbn.init(3)
  options = {"use_running_average": False, "unbiased": True}
  y, weighted = jaxbn.batch_norm(x, scale, bias, state, weights=times[:, None], **options)
  repeated = jnp.repeat(x, times, 0)
  _, plain = jaxbn.batch_norm(repeated, scale, bias, state, **options)
  # A hundredth of a mean that may cancel: to float32's last places of the elements.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)
  jax.tree.map(close, weighted, plain)
  check(y, x, scale, bias, weights=times[:, None])


# Special values


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1.0, 12345.678, 1e18, 1e30, -1e38])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_a_constant_channel_gives_bias(value, rows):
  # d = x - pivot is 0 exactly, so that no rounding is left for 1/sqrt(epsilon) to enlarge.
  x, bias = jnp.full((rows, 2), value, jnp.float32), jnp.array([0.0, 3.0])
  y, state = jaxbn.batch_norm(x, jnp.ones(2), bias, jaxbn.init(2), use_running_average=False)
  np.testing.assert_array_equal(y, jnp.broadcast_to(bias, x.shape))
  np.testing.assert_allclose(state.var, 0.99, rtol=1e-6)


def test_one_element_has_finite_gradients_even_without_epsilon_to_speak_of():
  x, scale, bias = inputs((1, 3))

  def loss(x, scale, bias):
    return jnp.sum(jnp.cos(train(x, scale, bias, epsilon=1e-12)))

  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias)
  assert all(np.isfinite(g).all() for g in gradients)
  assert not np.any(gradients[0])


def test_subnormal_elements_are_normalized_to_bias():
  # Their variance is nothing against epsilon (and some devices flush them to zero).
  x = jnp.array([[1e-40], [3e-40], [-2e-40]], jnp.float32)
  np.testing.assert_allclose(train(x, None, jnp.ones(1)), 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_near_its_largest_values(dtype):
  # The squares are beyond float16, the sums beyond both: the float32 accumulator holds them.
  x = jnp.asarray([[60000.0, -60000.0], [59000.0, 60000.0], [60000.0, 59000.0]], dtype)
  y, state = jaxbn.batch_norm(x, state=jaxbn.init(2), use_running_average=False)
  check(y, x, np.ones(2), np.zeros(2))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_where_squares_overflow_the_variance_is_infinite_and_the_output_bias():
  # Documented in `moments`: beyond about 1e19; skip_nonfinite then keeps it from the state.
  x = jnp.array([[1e30], [-1e30], [2e30]], jnp.float32)
  y, state = jaxbn.batch_norm(
    x, None, jnp.ones(1), jaxbn.init(1), use_running_average=False, skip_nonfinite=True
  )
  np.testing.assert_array_equal(y, 1)
  jax.tree.map(np.testing.assert_array_equal, state, jaxbn.init(1))
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(train(x)))))(x)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("option", [{}, {"debias": True}, {"momentum": None}])
def test_skip_nonfinite_leaves_the_state_of_the_channel_and_training_goes_on(option, bad):
  x, scale, bias = inputs((8, 3))
  poisoned = x.at[2, 1].set(bad)
  guarded = {"use_running_average": False, "skip_nonfinite": True, **option}
  _, before = jaxbn.batch_norm(x, scale, bias, jaxbn.init(3, **option), **guarded)
  _, after = jaxbn.batch_norm(poisoned, scale, bias, before, **guarded)
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert old[1] == new[1]
    assert np.isfinite(new).all()
  _, then = jaxbn.batch_norm(x + 1, scale, bias, after, **guarded)
  assert np.isfinite(then.mean).all()
  assert then.mean[1] != after.mean[1]
  _, lost = jaxbn.batch_norm(poisoned, scale, bias, before, use_running_average=False, **option)
  assert not np.isfinite(lost.var[1])
  assert np.isfinite(lost.var[0])


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_a_nan_in_the_state_does_not_reach_training_outputs(axis_name):
  x, scale, bias = inputs((2, 8, 3))
  poisoned = jaxbn.RunningStats(jnp.full(3, np.nan), jnp.full(3, np.nan))

  def y(x, state):
    return train(x, scale, bias, state, axis_name=axis_name)

  over_state = jax.vmap(y, in_axes=(0, None), axis_name="batch")
  over_state = jax.jit(over_state)
  dirty, clean = over_state(x, poisoned), over_state(x, jaxbn.init(3))
  np.testing.assert_array_equal(dirty, clean)


# Refusals

STATE = jaxbn.init(3)
BAD = jnp.ones(4)
CHANNELS = r"has shape \(4,\), but x of shape \(8, 3\) has channels of shape \(3,\)"
GROUPS = r" do not partition the axis 'batch' of size 4: each index.*for example"
NO_STATS = {"mean": jnp.zeros(3), "var": jnp.ones(3)}


def over_axis(x, **options):
  """Inside a mapped axis of size 4, named batch."""
  return jax.vmap(lambda x: train(x, **options), axis_name="batch")(x.reshape(4, 2, 3))


def evaluate(x, **options):
  return jaxbn.batch_norm(x, use_running_average=True, **options)


def out_of_range(name, value, shown):
  return (
    lambda x: train(x, state=STATE, **{name: value}),
    ValueError,
    f"{name}={shown} is out of range.* is usual",
  )


def not_a_bool(value, shown):
  return (
    lambda x: jaxbn.batch_norm(x, state=STATE, use_running_average=value),
    TypeError,
    f"use_running_average={shown}: a Python bool is needed.*pass use_running_average=True or False",
  )


def traced(name, value):
  """An option whose value nobody can see, but whose shape everybody can."""
  return lambda x: jax.jit(lambda v: train(x, state=STATE, **{name: v}))(value)


def not_a_state(value, shown):
  return (
    lambda x: train(x, state=value),
    TypeError,
    f"state.*{shown}.*RunningStats",
  )


REFUSED = {
  "integer-x": (lambda x: train(x.astype(int)), TypeError, r"x has dtype int32.*x\.astype"),
  "scale": (lambda x: train(x, BAD), ValueError, f"^scale {CHANNELS}.*pass scale"),
  "bias": (lambda x: train(x, None, BAD), ValueError, f"^bias {CHANNELS}.*pass bias"),
  "state-mean": (
    lambda x: train(x, state=STATE._replace(mean=BAD)),
    ValueError,
    f"^state.mean {CHANNELS}.*pass state.mean",
  ),
  "state-var": (
    lambda x: evaluate(x, state=STATE._replace(var=BAD)),
    ValueError,
    f"^state.var {CHANNELS}.*pass state.var",
  ),
  "state-dict": not_a_state(NO_STATS, "dict"),
  "state-tuple": not_a_state(tuple(NO_STATS.values()), "tuple"),
  "state-array": not_a_state(jnp.zeros(3), "(Array|Tracer)"),
  "axis-high": (lambda x: train(x, axis=2), ValueError, "axis=2 is out of range.*less than 2"),
  "axis-low": (lambda x: train(x, axis=-3), ValueError, "axis=-3 is out of range.*least -2"),
  "axis-twice": (lambda x: train(x, axis=(0, -2)), ValueError, r"axis=\(0, -2\).*twice.*once"),
  "axis-float": (lambda x: train(x, axis=1.0), TypeError, r"axis=1\.0.*integers, one or several"),
  "axis-none": (lambda x: train(x, axis=None), TypeError, "axis=None.*integers, one or several"),
  "mask-shape": (
    lambda x: train(x, mask=jnp.ones(8, bool)),
    ValueError,
    r"mask of shape \(8,\) does not broadcast.*\(8, 3\).*pass mask\[\.\.\., None\]",
  ),
  "mask-rank": (
    lambda x: train(x, mask=jnp.ones((1, 8, 3), bool)),
    ValueError,
    r"mask of shape \(1, 8, 3\) does not broadcast.*NumPy's rules",
  ),
  "mask-dtype": (
    lambda x: train(x, mask=jnp.ones((8, 1), int)),
    TypeError,
    "mask has dtype int32.*pass mask != 0",
  ),
  "mask-evaluation": (
    lambda x: evaluate(x, state=STATE, mask=jnp.ones(8, bool)),
    ValueError,
    r"mask of shape \(8,\) does not broadcast",
  ),
  "weights-negative": (
    lambda x: train(x, weights=np.array([[-1.0], *[[1.0]] * 7])),
    ValueError,
    "weights hold a negative.*weights >= 0",
  ),
  "weights-shape": (
    lambda x: train(x, weights=np.ones(8)),
    ValueError,
    r"weights of shape \(8,\) does not broadcast.*pass weights\[\.\.\., None\]",
  ),
  "weights-complex": (
    lambda x: train(x, weights=np.ones((8, 1), complex)),
    TypeError,
    "weights have dtype complex.*real",
  ),
  "momentum-negative": out_of_range("momentum", -0.1, r"-0\.1"),
  "momentum-high": out_of_range("momentum", 1.5, r"1\.5"),
  "momentum-nan": out_of_range("momentum", np.nan, "nan"),
  "momentum-inf": out_of_range("momentum", np.inf, "inf"),
  "momentum-array": (
    lambda x: train(x, state=STATE, momentum=np.array([0.1, 0.2])),
    ValueError,
    r"momentum has shape \(2,\).*scalar",
  ),
  "momentum-traced": (traced("momentum", jnp.ones(2)), ValueError, r"momentum.*\(2,\).*scalar"),
  "epsilon-negative": out_of_range("epsilon", -1e-3, r"-0\.001"),
  "epsilon-nan": out_of_range("epsilon", np.nan, "nan"),
  "epsilon-inf": out_of_range("epsilon", np.inf, "inf"),
  "epsilon-array": (
    lambda x: train(x, state=STATE, epsilon=np.array([0.1, 0.2])),
    ValueError,
    r"epsilon has shape \(2,\).*scalar",
  ),
  "epsilon-traced": (traced("epsilon", jnp.ones(2)), ValueError, r"epsilon.*\(2,\).*scalar"),
  "debias-count": (
    lambda x: train(x, state=STATE, debias=True),
    ValueError,
    r"debias=True needs the number of updates.*jaxbn\.init",
  ),
  "debias-cumulative": (
    lambda x: train(x, state=jaxbn.init(3, momentum=None), debias=True, momentum=None),
    ValueError,
    "debias=True with momentum=None.*leave debias out",
  ),
  "axis_name": (
    lambda x: train(x, axis_name="nowhere"),
    ValueError,
    r"axis_name='nowhere' is not bound here \(bound: none\).*call inside jax\.pmap",
  ),
  "axis_name-other": (
    lambda x: jax.pmap(lambda x: train(x, axis_name="nowhere"), "somewhere")(x[None]),
    ValueError,
    r"axis_name='nowhere' is not bound here \(bound: 'somewhere'\).*leave axis_name out",
  ),
  "axis_name-state": (
    lambda x: over_axis(x, axis_name="nowhere", state=STATE),
    ValueError,
    r"axis_name='nowhere' is not bound here \(bound: 'batch'\)",
  ),
  "groups-missing": (
    lambda x: over_axis(x, axis_name="batch", axis_index_groups=[[0, 1], [2]]),
    ValueError,
    r"axis_index_groups=\[\[0, 1\], \[2\]\]" + GROUPS,
  ),
  "groups-twice": (
    lambda x: over_axis(x, axis_name="batch", axis_index_groups=[[0, 1], [1, 2, 3]]),
    ValueError,
    r"axis_index_groups=\[\[0, 1\], \[1, 2, 3\]\]" + GROUPS,
  ),
  "groups-flat": (
    lambda x: over_axis(x, axis_name="batch", axis_index_groups=[0, 1, 2, 3]),
    ValueError,
    r"axis_index_groups=\[0, 1, 2, 3\]" + GROUPS,
  ),
  "groups-alone": (
    lambda x: train(x, axis_index_groups=[[0], [1]]),
    ValueError,
    r"axis_index_groups=\[\[0\], \[1\]\].*axis_name, which is None: pass axis_name",
  ),
  "empty": (
    lambda x: train(x[:0]),
    ValueError,
    r"x of shape \(0, 3\) is an empty batch.*Skip it, or pad it and mask",
  ),
  "mode-none": not_a_bool(None, "None"),
  "mode-integer": not_a_bool(2, "2"),
  "mode-string": not_a_bool("yes", "'yes'"),
  "mode-float": not_a_bool(1.0, "1.0"),
  "mode-array": not_a_bool(np.array([True]), r"array\(\[ True\]\)"),
  "mode-traced": (
    lambda x: jax.jit(lambda u: jaxbn.batch_norm(x, state=STATE, use_running_average=u))(True),
    TypeError,
    r"use_running_average=.*Python bool is needed.*static under jit, or.*jax\.lax\.cond",
  ),
  "evaluation-without-state": (
    evaluate,
    ValueError,
    "use_running_average=True needs the statistics: pass state",
  ),
  "masked-value": (
    lambda x: train(x, masked_value=0.0),
    ValueError,
    r"masked_value=0\.0.*no mask: pass mask",
  ),
  "dtype-integer": (
    lambda x: train(x, dtype=jnp.int32),
    TypeError,
    "dtype=.*int32.* is not a floating-point",
  ),
  "dtype-real": (
    lambda x: train(x + 1j, dtype=jnp.float32),
    TypeError,
    "dtype=.*float32.*complex",
  ),
  "state-complex": (
    lambda x: evaluate(x, state=jaxbn.init(3, dtype=jnp.complex64)),
    TypeError,
    "mean.*complex64.*float32",
  ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name, jit):
  refused, error, message = REFUSED[name]
  with pytest.raises(error, match=message):
    (jax.jit(refused) if jit else refused)(jnp.ones((8, 3)))


@pytest.mark.optimized
def test_on_a_cpu_bfloat16_data_is_not_stored_again_in_single_precision():
  x = jnp.zeros((16, 8, 8, 32), jnp.bfloat16)
  state = jaxbn.init(32)

  def forward(x):
    return jaxbn.batch_norm(x, None, None, state, use_running_average=False)

  program = hlo.parse(jax.jit(forward).lower(x).compile().as_text())
  assert max(kernel.bytes for kernel in program.kernels) <= x.nbytes


@pytest.mark.parametrize("ratio", [0.5, 1.9, 2.1, 30.0])
def test_which_channels_are_read_again_is_decided_for_each(ratio):
  # A channel's result is the same bits whatever the others are, also those that are read twice.
  near = jax.random.normal(jax.random.key(0), (64, 1))
  far = ratio + jax.random.normal(jax.random.key(1), (64, 1))
  both = jaxbn.moments(jnp.concatenate([near, far], axis=1))
  for channel, alone in enumerate((near, far)):
    got = jaxbn.moments(alone)
    np.testing.assert_array_equal(got.mean[0], both.mean[channel])
    np.testing.assert_array_equal(got.var[0], both.var[channel])
