"""Groups of a fixed size give one answer, however many devices hold them, however driven."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests import bounds, layers, oracle
from tests.test_devices import (
  CHANNELS,
  NAMED,
  ROWS,
  SHARDED,
  inputs,
  mesh_of,
  run,
  spread,
)

# Of 32 rows: on 1, 2, 4 and 8 devices 2 is below a device's share, 8 and 16 also equal and above.
SIZES = [2, 8, 16]
DEVICES = [1, 2, 4, 8]


@functools.cache
def result(how, devices, size, masked=True, **options):
  given, cotangent = inputs(masked)
  if masked:  # also for groups of 16 (two devices' of eight, one of two): nothing in one of them
    x, mask, *rest = given
    mask[16:] &= np.arange(16)[:, None] < 0 if size == 16 else True
    given, cotangent = (np.where(mask, x, np.float32(np.nan)), mask, *rest), cotangent * mask
  return given, cotangent, run(how, devices, given, cotangent, virtual_batch_size=size, **options)


def check(size, given, cotangent, results):
  """Group by group against the oracle; the statistics are the mean over the groups."""
  x, mask, scale, bias, state = given
  y, new_state, (d_x, d_scale, d_bias) = jax.tree.map(np.asarray, results)
  parameters, batches = [], []
  for first in range(0, len(x), size):
    rows = slice(first, first + size)
    some = None if mask is None else mask[rows]
    counted = {"mask": some, "devices": 8}
    expected = oracle.batch_norm(x[rows], scale, bias, mask=some)
    bound = bounds.output(x[rows], scale, bias, **counted)
    bounds.assert_within(y[rows], expected, bound, True if some is None else some)
    right = oracle.gradients(x[rows], scale, cotangent[rows], mask=some)
    allowed = bounds.gradients(x[rows], scale, cotangent[rows], **counted)
    bounds.assert_within(d_x[rows], right.x, allowed.x)
    parameters.append(np.stack([right.scale, right.bias, allowed.scale, allowed.bias]))
    batches.append(oracle.moments(x[rows], mask=some))
  right_scale, right_bias, scale_bound, bias_bound = sum(parameters)
  bounds.assert_within(d_scale, right_scale, scale_bound)
  bounds.assert_within(d_bias, right_bias, bias_bound)
  mean, var = mean_of_groups(batches)
  np.testing.assert_allclose(new_state.mean, 0.9 * state.mean + 0.1 * mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(new_state.var, 0.9 * state.var + 0.1 * var, rtol=1e-5)


def mean_of_groups(batches):
  """Of the groups that are not empty, channel by channel."""
  count, *stats = (np.stack(v) for v in zip(*batches, strict=True))
  return [np.where(count > 0, v, 0).sum(0) / (count > 0).sum(0) for v in stats]


@pytest.mark.parametrize(
  ("how", "devices", "size"),
  [
    (["pmap", "shard_map", "jit"][(i + j) % 3], devices, size)  # pairs: all of any two
    for i, devices in enumerate(DEVICES)
    for j, size in enumerate(SIZES)
  ],
)
def test_one_answer_on_any_number_of_devices(how, devices, size):
  # With masks: unequal counts, empty groups, and on one of eight devices nothing.
  given, cotangent, results = result(how, devices, size)
  check(size, given, cotangent, results)
  _, _, on_one = result("jit", 1, size)
  valid = given[1]
  same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  same(np.where(valid, results[0], 0), np.where(valid, on_one[0], 0))
  jax.tree.map(same, results[1:], on_one[1:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["shard_map unchecked", "vmap", "jit explicit"])
def test_other_ways_over_eight_devices(how, size):
  check(size, *result(how, 8, size))


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("how", ["pmap", "shard_map", "jit"])
def test_without_a_mask(how, size):
  check(size, *result(how, 8, size, masked=False))


@pytest.mark.parametrize("how", NAMED)
def test_each_device_alone(how):
  # Statistics of its own, and running ones that all share.
  check(ROWS // 8, *result(how, 8, "device"))


@pytest.mark.parametrize("how", ["pmap", "jit"])
def test_one_group_of_all_is_the_global_batch(how):
  _, _, grouped = result(how, 4, ROWS)
  _, _, whole = result(how, 4, None)
  jax.tree.map(np.testing.assert_array_equal, grouped, whole)


def test_two_axis_names():
  # Devices follow each other with the last name changing fastest.
  (x, mask, scale, bias, state), _ = inputs(masked=True)
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  batch = P(("a", "b"))

  def local(x, mask, scale, bias, state):
    return jaxbn.batch_norm(
      *(x, scale, bias, state),
      use_running_average=False,
      mask=mask,
      axis_name=("a", "b"),
      virtual_batch_size=8,
    )

  specs = {"in_specs": (batch, batch, P(), P(), P()), "out_specs": (batch, P())}
  shared = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(x, mask, scale, bias, state)
  alone = group_by_group(x, scale, bias, state, 8, 0, mask=mask)
  y, expected = (np.where(mask, v, 0) for v in (shared[0], alone))
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


# Shapes and options, on one device


ALIGNED = ("mask", "weights", "residual")


def group_by_group(x, scale, bias, state, size, along, **options):
  """y by the layer itself, called once for each group."""
  aligned = {name: options.pop(name) for name in ALIGNED if name in options}
  ys = []
  for first in range(0, x.shape[along], size):
    here = [slice(None)] * x.ndim
    here[along] = slice(first, first + size)
    some = {k: np.broadcast_to(v, x.shape)[tuple(here)] for k, v in aligned.items()}
    y, _ = jaxbn.batch_norm(
      *(x[tuple(here)], scale, bias, state), use_running_average=False, **some, **options
    )
    ys.append(y)
  return jnp.concatenate(ys, along)


def moments_of_groups(x, size, along, axis=-1, **counted):
  rows = np.split(np.asarray(x), x.shape[along] // size, along)
  split = {
    k: np.split(np.broadcast_to(v, x.shape), len(rows), along)
    for k, v in counted.items()
    if k in ("mask", "weights")
  }
  each = ({k: v[i] for k, v in split.items()} for i in range(len(rows)))
  return mean_of_groups([oracle.moments(r, axis, **e) for r, e in zip(rows, each, strict=True)])


def compare(x, scale, bias, size, along, **options):
  """Outputs, gradients and statistics at once against those group by group."""
  channels = scale.shape
  state = jaxbn.RunningStats(jnp.zeros(channels), jnp.ones(channels))
  cotangent = np.random.default_rng(5).normal(size=x.shape)
  if "mask" in options:
    cotangent = np.where(options["mask"], cotangent, 0)

  def loss(f):
    def of(x, scale, bias):
      y, other = f(x, scale, bias)
      return jnp.sum((jnp.where(cotangent != 0, y, 0) * cotangent).real), (y, other)

    return jax.grad(of, (0, 1, 2), has_aux=True)

  at_once = functools.partial(
    jaxbn.batch_norm, state=state, use_running_average=False, virtual_batch_size=size, **options
  )

  def one_by_one(x, scale, bias):
    return group_by_group(x, scale, bias, state, size, along, **options), None

  both = jax.jit(lambda *given: (loss(at_once)(*given), loss(one_by_one)(*given)))
  (gradients, (y, new_state)), (expected, (right, _)) = both(x, scale, bias)
  assert y.shape == x.shape
  assert y.dtype == right.dtype
  # The same arithmetic but for the order of sums of at most 100 terms.
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
  close(np.where(cotangent != 0, y, 0), np.where(cotangent != 0, right, 0))
  jax.tree.map(close, gradients, expected)
  mean, var = moments_of_groups(x, size, along, **options)
  close(new_state.mean, 0.01 * mean)
  close(new_state.var, 0.99 + 0.01 * var)


def drawn(shape, channels, seed=0):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(1 + 2 * rng.normal(size=shape), jnp.float32)
  return x, *(jnp.asarray(rng.normal(1, 0.2, channels), jnp.float32) for _ in range(2))


@pytest.mark.parametrize(
  ("shape", "axis", "along", "channels"),
  [
    ((8, 3), -1, 0, (3,)),
    ((8, 4, 5, 3), -1, 0, (3,)),
    ((8, 3, 4), 1, 0, (3,)),
    ((3, 8, 5), 0, 1, (3,)),
    ((8, 4, 3), (1, 2), 0, (4, 3)),
    ((2, 8, 5, 3), (0, -1), 1, (2, 3)),
  ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_shapes(shape, axis, along, channels, masked):
  options = {"axis": axis}
  if masked:
    options["mask"] = np.random.default_rng(2).random(shape) < 0.8
  compare(*drawn(shape, channels), 4, along, **options)


SHAPE = (8, 5, 3)
RNG = np.random.default_rng(3)
SOME = {
  "mask": {"mask": RNG.random(SHAPE) < 0.7, "masked_value": 7.0},
  "mask of examples": {"mask": np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)[:, None, None]},
  "mask with an empty group": {"mask": np.arange(8)[:, None, None] >= 4},
  "mask of places": {"mask": np.array([[1], [1], [0], [1], [1]], bool)},
  "weights": {"weights": RNG.uniform(0.1, 2, SHAPE).astype(np.float32)},
  "weights of examples": {"weights": RNG.uniform(0.1, 2, (8, 1, 1)).astype(np.float32)},
  "weights of places": {"weights": RNG.uniform(0.1, 2, (5, 1)).astype(np.float32)},
  "weights and mask": {
    "weights": RNG.uniform(0.1, 2, (8, 1, 1)).astype(np.float32),
    "mask": RNG.random((5, 3)) < 0.7,
  },
  "residual": {"residual": RNG.normal(size=SHAPE).astype(np.float32)},
  "activation": {"activation": jax.nn.silu},
  "both": {"residual": RNG.normal(size=SHAPE).astype(np.float32), "activation": jax.nn.relu},
  "two passes": {"use_fast_variance": False},
  "detached": {"detach_stats": True},
}


@pytest.mark.parametrize("options", SOME.values(), ids=SOME)
def test_options(options):
  compare(*drawn(SHAPE, (3,)), 2, 0, **options)


def test_an_activation_may_hold_arrays_of_x_s_shape():
  x, scale, bias = drawn(SHAPE, (3,))

  def loss(slope, size):
    y, _ = jaxbn.batch_norm(
      *(x, scale, bias),
      use_running_average=False,
      virtual_batch_size=size,
      activation=lambda z: jnp.where(z > 0, z, slope * z),
    )
    return jnp.sum(y), y

  slope = jnp.asarray(RNG.uniform(size=SHAPE), jnp.float32)
  gradient, y = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(slope, 4)
  linear, _ = jaxbn.batch_norm(x, scale, bias, use_running_average=False, virtual_batch_size=4)
  np.testing.assert_allclose(y, jnp.where(linear > 0, linear, slope * linear), atol=1e-6)
  np.testing.assert_allclose(gradient, jnp.where(linear > 0, 0, linear), atol=1e-6)


def test_an_explicit_mesh_of_two_axes():
  # Channels sharded as well, and a slope for each, within the rule.
  mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  x, scale, bias = drawn((16, 3, 4), (4,))

  def loss(x, scale, bias, slope, state):
    options = {"activation": lambda z: jnp.where(z > 0, z, slope * z)}
    y, new_state = jaxbn.batch_norm(
      *(x, scale, bias, state), use_running_average=False, virtual_batch_size=8, **options
    )
    return jnp.sum(jnp.sin(y)), (y, new_state)

  f = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
  given = x, scale, bias, jnp.full(4, 0.25), jaxbn.init(4)
  expected = f(*given)
  channels = NamedSharding(mesh, P("model"))
  x = jax.device_put(x, NamedSharding(mesh, P("batch", None, "model")))
  with jax.set_mesh(mesh):
    actual = f(x, *jax.device_put(given[1:], channels))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected
  )
  assert actual[1][0].sharding == x.sharding
  assert actual[1][1].mean.sharding == channels


# Running statistics


@pytest.mark.parametrize("how", ["pmap", "jit"])
@pytest.mark.parametrize(
  "options",
  [{"unbiased": True}, {"momentum": None}, {"debias": True, "momentum": 0.9}],
  ids=["unbiased", "cumulative", "debias"],
)
def test_options_of_running_statistics(how, options):
  rng = np.random.default_rng(0)
  xs = rng.normal(1, 2, (3, ROWS, CHANNELS)).astype(np.float32)
  masks = rng.random((3, ROWS, 1)) < np.linspace(0.5, 1, ROWS)[:, None]
  masks[:, 8:16] = False
  start = {k: options[k] for k in ("momentum", "debias") if k in options}
  state, batches = jaxbn.init(CHANNELS, **start), []
  one = np.ones(CHANNELS, np.float32)
  for x, mask in zip(xs, masks, strict=True):
    given = x, mask, one, one, state
    _, state, _ = run(how, 8, given, x, virtual_batch_size=8, **{"momentum": 0.99} | options)
    groups = [oracle.moments(x[i : i + 8], mask=mask[i : i + 8]) for i in range(0, ROWS, 8)]
    if options.get("unbiased"):  # each by its own count
      groups = [g._replace(var=g.var * g.count / np.maximum(g.count - 1, 1)) for g in groups]
    batches.append(oracle.Stats(np.ones(CHANNELS), *mean_of_groups(groups)))
  mean, var = oracle.running(batches, **start)
  np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
  np.testing.assert_allclose(state.var, var, rtol=1e-5)
  if state.count is not None:
    assert state.count.tolist() == [3] * CHANNELS


def test_a_group_that_is_not_finite_keeps_the_channel_s_statistics():
  (x, *_), cotangent = inputs(masked=False)
  x[5, 1] = np.nan
  one, state = np.ones(CHANNELS, np.float32), jaxbn.init(CHANNELS)
  given = x, None, one, one, state
  _, new, _ = run("pmap", 8, given, cotangent, virtual_batch_size=8, skip_nonfinite=True)
  assert (np.asarray(new.var) != 1).tolist() == [True, False, True]
  assert np.isfinite(new.mean).all()


def test_channels_without_any_element_keep_their_statistics():
  x, _, _ = drawn((8, 3), (3,))
  state = jaxbn.init(3)._replace(mean=jnp.full(3, 5.0))
  mask = np.array([True, False, True])
  _, new = jaxbn.batch_norm(
    x, state=state, use_running_average=False, mask=mask, virtual_batch_size=4
  )
  assert (np.asarray(new.mean) == 5).tolist() == [False, True, False]


def test_gradients_of_the_running_statistics():
  x, scale, bias = drawn((8, 3), (3,))

  def f(x):
    _, new = jaxbn.batch_norm(
      *(x, scale, bias, jaxbn.init(3)),
      use_running_average=False,
      virtual_batch_size=4,
      momentum=0.0,
    )
    return jnp.sum(new.mean * jnp.arange(3.0) + new.var)

  def right(x):
    groups = x.reshape(2, 4, 3)
    return jnp.sum(groups.mean(1).mean(0) * jnp.arange(3.0) + groups.var(1).mean(0))

  np.testing.assert_allclose(jax.grad(f)(x), jax.grad(right)(x), atol=1e-6)


# Evaluation, errors, tracing


@pytest.mark.parametrize("size", [3, 5, "device"])
def test_evaluation_knows_no_groups(size):
  x, scale, bias = drawn((8, 3), (3,))
  state = jaxbn.RunningStats(jnp.ones(3), jnp.full(3, 2.0))
  f = functools.partial(jaxbn.batch_norm, x, scale, bias, state, use_running_average=True)
  jax.tree.map(np.testing.assert_array_equal, f(virtual_batch_size=size), f())


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize(
  ("size", "error", "says"),
  [
    (0, ValueError, "virtual_batch_size=0: a group holds at least one example"),
    (-4, ValueError, "virtual_batch_size=-4"),
    (True, TypeError, "virtual_batch_size=True is not a Python int"),
    (4.0, TypeError, r"virtual_batch_size=4\.0 is not a Python int.*'device'"),
    ([4], TypeError, r"virtual_batch_size=\[4\] is not"),
    ("local", ValueError, "virtual_batch_size='local' is no size: pass a number.*'device'"),
  ],
)
def test_what_is_no_size(size, error, says, evaluating):
  x, state = jnp.ones((8, 3)), jaxbn.init(3)
  with pytest.raises(error, match=says):
    jaxbn.batch_norm(x, state=state, use_running_average=evaluating, virtual_batch_size=size)


def test_a_traced_size_is_refused():
  f = functools.partial(jaxbn.batch_norm, jnp.ones((8, 3)), use_running_average=False)
  with pytest.raises(TypeError, match="is not a Python int"):
    jax.jit(lambda size: f(virtual_batch_size=size))(4)


def test_a_size_that_does_not_fit_names_those_that_do():
  f = functools.partial(jaxbn.batch_norm, use_running_average=False, virtual_batch_size=5)
  says = r"=5 does not fit: x holds 12 examples, along axis 0.*pass one of 1, 2, 3, 4, 6, 12\."
  with pytest.raises(ValueError, match=says):
    f(jnp.ones((12, 3)))
  says = (
    r"=5 does not fit: x holds 4 examples, along axis 1, on each of the 6 devices of "
    r"axis_name='b', a global batch of 24\..*pass one of 1, 2, 4, 8, 12, 24\."
  )
  with pytest.raises(ValueError, match=says):
    jax.vmap(lambda x: f(x, axis=0, axis_name="b"), axis_name="b")(jnp.ones((6, 3, 4)))


@pytest.mark.parametrize("size", [4, "device"])
def test_groups_are_said_in_one_way_only(size):
  f = functools.partial(
    *(jaxbn.batch_norm, jnp.ones((8, 3))), use_running_average=False, virtual_batch_size=size
  )
  says = rf"virtual_batch_size={size!r} with axis_index_groups=\[\[0, 1\]\]: both"
  with pytest.raises(ValueError, match=says):
    f(axis_name="b", axis_index_groups=[[0, 1]])


def test_a_device_s_share_needs_a_name_for_the_devices():
  with pytest.raises(ValueError, match="'device' without axis_name: x is then one array"):
    jaxbn.batch_norm(jnp.ones((8, 3)), use_running_average=False, virtual_batch_size="device")


def test_channels_on_every_axis_leave_no_examples():
  with pytest.raises(ValueError, match="no axis of examples"):
    jaxbn.batch_norm(jnp.ones(3), use_running_average=False, virtual_batch_size=1)


def test_new_values_do_not_trace_again():
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def f(x, state):
    return jaxbn.batch_norm(x, state=state, use_running_average=False, virtual_batch_size=2)

  state = jaxbn.init(3)
  for step in range(3):
    _, state = f(step + jnp.arange(24.0).reshape(8, 3), state)


# Communication

PLACES = 50


@pytest.mark.optimized
@pytest.mark.parametrize(
  ("how", "size", "masked"),
  [
    (how, size, (i + j) % 2 == 1)  # pairs: all of any two
    for i, how in enumerate(SHARDED)
    for j, size in enumerate([2, 4, 8, 16])  # a device has four
  ],
)
def test_under_sharded_jit_only_statistics_travel(how, size, masked):
  mesh = mesh_of(8, SHARDED[how])
  batch, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
  x, scale, bias = drawn((ROWS, PLACES, CHANNELS), (CHANNELS,))
  mask = np.random.default_rng(0).random(x.shape) < 0.8
  x, mask = jax.device_put((x, mask), batch)
  scale, bias, state = jax.device_put((scale, bias, jaxbn.init(CHANNELS)), everywhere)

  def loss(x, scale, bias, state, mask):
    y, new_state = jaxbn.batch_norm(
      *(x, scale, bias, state),
      use_running_average=False,
      virtual_batch_size=size,
      mask=mask if masked else None,
      activation=jax.nn.silu,
      residual=x,
    )
    return jnp.sum(jnp.sin(y)), new_state

  step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  program = step.lower(x, scale, bias, state, mask).compile().as_text()
  sizes = collectives(program)
  # Each a few numbers per channel, or per example for the pivot, of those that one device holds.
  assert sizes
  assert max(sizes) <= 8 * CHANNELS
  if size <= ROWS // 8:
    # None for the statistics: what is left is shared once, parameters' gradients and running ones,
    # and on CPUs one bit, whether any group's mean is so far away that a second look is needed.
    assert sorted(sizes)[:-1] == [1]


def collectives(program):
  """The size of each array that a collective of a compiled program makes."""
  kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
  results = re.findall(rf" = (.*?) (?:{kinds})(?:-start)?\(", program)
  return [
    sum(
      math.prod(map(int, filter(None, shape.split(","))))
      for shape in re.findall(r"\w+\[([0-9,]*)\]", one)
    )
    for one in results
  ]


@pytest.mark.parametrize(("size", "forward", "backward"), [(2, 0, 0), (4, 0, 0), (8, 1, 1)])
@pytest.mark.parametrize("how", ["pmap", "shard_map unchecked"])
def test_devices_share_only_what_they_must(how, size, forward, backward):
  (x, _, *replicated), _ = inputs(masked=False)

  def layer(x, mask, scale, bias, state):
    options = {"use_running_average": False, "axis_name": "batch", "virtual_batch_size": size}
    return jaxbn.batch_norm(x, scale, bias, state, **options)

  def gradient(x, mask, scale, bias, state):
    def loss(x):
      y, new_state = layer(x, mask, scale, bias, state)
      return jnp.sum(jnp.sin(y)), new_state

    return jax.grad(loss, has_aux=True)(x)

  def traced(local):
    lowered = jax.jit(spread(how, 8, local)).lower(x, None, *replicated)
    return lowered.as_text().count("stablehlo.all_reduce")

  # And one for the running statistics, of which the derivative has none.
  assert traced(layer) == forward + 1
  assert traced(gradient) == forward + 1 + backward


# Layers


@pytest.mark.parametrize("make", ["linen", "nnx"])
def test_layers_hand_the_size_on(make):
  x = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
  options = {"virtual_batch_size": 16, "axis_name": "b"}
  state, call = layers.MAKERS[make](x[0], **options)
  _, core = layers.core(x[0], **options)
  mapped = [jax.vmap(f, (None, 0), axis_name="b", out_axes=(0, None)) for f in (call, core)]
  layers.assert_bit_equal(*(f(state, x) for f in mapped))
  y, _ = mapped[0](state, x)
  assert np.max(np.abs(y.reshape(2, 16, 3).mean(1) - np.asarray(state["bias"]))) < 1e-6


def test_linen_s_initialization_needs_neither_devices_nor_a_fitting_batch():
  layer = jaxbn.linen.BatchNorm(
    use_running_average=False, virtual_batch_size="device", axis_name="batch"
  )
  layer.init(jax.random.key(0), jnp.ones((3, 2)))
  layer = jaxbn.linen.BatchNorm(use_running_average=False, virtual_batch_size=4)
  variables = layer.init(jax.random.key(0), jnp.ones((3, 2)))
  with pytest.raises(ValueError, match="virtual_batch_size=4 does not fit"):
    layer.apply(variables, jnp.ones((3, 2)), mutable=["batch_stats"])


def test_unbiased_takes_what_reliabilities_are_worth_in_each_group():
  rng = np.random.default_rng(7)
  x, weights = rng.normal(3, 2, (8, 3)), rng.uniform(0.1, 1, (8, 3))
  x, weights = x.astype(np.float32), weights.astype(np.float32)
  options = {"use_running_average": False, "unbiased": True, "momentum": 0.0}
  _, state = jaxbn.batch_norm(
    x, state=jaxbn.init(3), weights=weights, virtual_batch_size=4, **options
  )
  groups = [(x[i : i + 4], weights[i : i + 4]) for i in (0, 4)]
  wanted = [oracle.moments(x, weights=w).var * oracle.reliability(x, weights=w) for x, w in groups]
  np.testing.assert_allclose(state.var, np.mean(wanted, 0), rtol=1e-5)
