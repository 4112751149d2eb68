"""One global batch gives one answer, however many devices hold it and however they are driven."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks import hlo
from tests import bounds, oracle

NAMED = ["pmap", "shard_map", "shard_map unchecked", "vmap"]
SHARDED = {"jit": AxisType.Auto, "jit explicit": AxisType.Explicit}
ROWS, CHANNELS = 32, 3


def mesh_of(devices, axis_type=AxisType.Auto):
  return jax.make_mesh((devices,), ("batch",), axis_types=(axis_type,))


def spread(how, devices, local):
  """local(x, mask, scale, bias, state) -> (y, new state) of a shard, made one of whole arrays."""
  if how in SHARDED:
    return local
  if how.startswith("shard_map"):
    return jax.shard_map(
      local,
      mesh=mesh_of(devices),
      in_specs=(P("batch"), P("batch"), P(), P(), P()),
      out_specs=(P("batch"), P()),
      check_vma=how == "shard_map",
    )
  mapping = {"pmap": jax.pmap, "vmap": jax.vmap}[how]
  # x and mask as one argument: pmap takes no None for an argument of its own.
  mapped = mapping(
    lambda batch, *replicated: local(*batch, *replicated),
    axis_name="batch",
    in_axes=(0, None, None, None),
    out_axes=(0, None),
  )

  def whole(x, mask, *replicated):
    batch = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), (x, mask))
    y, new_state = mapped(batch, *replicated)
    return y.reshape(x.shape), new_state

  return whole


def place(how, devices, x, mask, *replicated):
  """The arrays as a user of sharded jit would lay them out."""
  if how not in SHARDED:
    return x, mask, *replicated
  mesh = mesh_of(devices, SHARDED[how])
  batch, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
  return *jax.device_put((x, mask), batch), *jax.device_put(replicated, everywhere)


def run(how, devices, given, cotangent, **options):
  """y, the new state, and the gradients of x, scale and bias of sum(cotangent * y)."""
  options = {"use_running_average": False, "momentum": 0.9, **options}
  if how not in SHARDED:
    options["axis_name"] = "batch"

  def local(x, mask, scale, bias, state):
    return jaxbn.batch_norm(x, scale, bias, state, mask=mask, **options)

  whole = spread(how, devices, local)

  def step(x, mask, scale, bias, state, cotangent):
    def loss(x, scale, bias):
      y, new_state = whole(x, mask, scale, bias, state)
      return jnp.sum(cotangent * y), (y, new_state)

    gradients, (y, new_state) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return y, new_state, gradients

  x, mask, scale, bias, state = given
  cotangent, mask, *replicated = place(how, devices, cotangent, mask, scale, bias, state)
  x = place(how, devices, x, None)[0]
  return jax.jit(step)(x, mask, *replicated, cotangent)


def inputs(masked, seed=0):
  """x, mask, scale, bias, state; and a cotangent that is zero where x does not exist."""
  rng = np.random.default_rng(seed)
  x = (1 + 2 * rng.normal(size=(ROWS, CHANNELS))).astype(np.float32)
  mask = None
  if masked:
    # Unequal counts, and the second of eight devices has nothing at all.
    mask = rng.random((ROWS, CHANNELS)) < np.linspace(0.3, 1, ROWS)[:, None]
    mask[ROWS // 8 : ROWS // 4] = False
    x = np.where(mask, x, np.float32(np.nan))
  scale, bias = rng.normal(1, 0.5, (2, CHANNELS)).astype(np.float32)
  state = jaxbn.RunningStats(jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 2.0, 3.0]))
  cotangent = rng.normal(size=x.shape).astype(np.float32)
  return (x, mask, scale, bias, state), np.where(True if mask is None else mask, cotangent, 0)


def check_training(results, given, cotangent):
  """Against the oracle over the whole batch, within what float32 allows."""
  y, new_state, gradients = results
  x, mask, scale, bias, state = given
  counted = {"mask": mask, "devices": 8}
  expected = oracle.batch_norm(x, scale, bias, mask=mask)
  valid = np.ones(x.shape, bool) if mask is None else mask
  bounds.assert_within(y, expected, bounds.output(x, scale, bias, **counted), valid)
  right = oracle.gradients(x, scale, cotangent, mask=mask)
  allowed = bounds.gradients(x, scale, cotangent, **counted)
  for one, exact, bound in zip(gradients, right, allowed, strict=True):
    bounds.assert_within(one, exact, bound)
  batch = oracle.moments(x, mask=mask)
  np.testing.assert_allclose(new_state.mean, 0.9 * state.mean + 0.1 * batch.mean, rtol=1e-5)
  np.testing.assert_allclose(new_state.var, 0.9 * state.var + 0.1 * batch.var, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("how", [*NAMED[:3], *SHARDED])
def test_any_number_of_devices_gives_the_answer_of_the_whole_batch(how, devices):
  # With masks: unequal counts on the devices, and on one of eight none.
  given, cotangent = inputs(masked=True)
  check_training(run(how, devices, given, cotangent), given, cotangent)


@pytest.mark.parametrize("how", [*NAMED, *SHARDED])
def test_equal_counts_need_no_counting(how):
  given, cotangent = inputs(masked=False)
  check_training(run(how, 4, given, cotangent), given, cotangent)


@pytest.mark.parametrize("how", [*NAMED, *SHARDED])
def test_evaluation_on_devices_is_evaluation(how):
  given, cotangent = inputs(masked=True)
  x, mask, scale, bias, state = given
  y, new_state, (d_x, *_) = run(how, 4, given, cotangent, use_running_average=True)
  valid = np.ones(x.shape, bool) if mask is None else mask
  expected = oracle.normalize(x, state.mean, state.var, scale, bias)
  scaled_z = oracle.normalize(x, state.mean, state.var, scale)
  bound = bounds.normalized(expected, scaled_z, bias, x.dtype, x.dtype)
  bounds.assert_within(y, expected, bound, valid)
  jax.tree.map(np.testing.assert_array_equal, new_state, state)
  slope = scale / np.sqrt(np.asarray(state.var, np.float64) + 1e-5)
  np.testing.assert_allclose(d_x, cotangent * slope, rtol=1e-6)


@pytest.mark.parametrize("how", NAMED)
def test_groups_share_among_themselves_only(how):
  given, cotangent = inputs(masked=True)
  x, mask, scale, bias, state = given
  options = {"axis_name": "batch", "axis_index_groups": [[0, 2], [1, 3]]}

  def local(x, mask, scale, bias, state):
    y, _ = jaxbn.batch_norm(
      *(x, scale, bias, state), use_running_average=False, mask=mask, **options
    )
    return y, state  # the new one differs between the groups

  whole = spread(how, 4, local)

  def gradient(x, scale, bias):
    def loss(x, scale, bias):
      y, _ = whole(x, mask, scale, bias, state)
      return jnp.sum(cotangent * y), y

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)

  gradients, y = jax.jit(gradient)(x, scale, bias)
  group = np.arange(ROWS) // (ROWS // 4) % 2
  sums = []
  for rows in (group == 0, group == 1):
    counted = {"mask": mask[rows], "devices": 2}
    expected = oracle.batch_norm(x[rows], scale, bias, mask=mask[rows])
    bound = bounds.output(x[rows], scale, bias, **counted)
    bounds.assert_within(y[rows], expected, bound, mask[rows])
    right = oracle.gradients(x[rows], scale, cotangent[rows], mask=mask[rows])
    allowed = bounds.gradients(x[rows], scale, cotangent[rows], **counted)
    bounds.assert_within(gradients[0][rows], right.x, allowed.x)
    sums.append(np.stack([right.scale, right.bias, allowed.scale, allowed.bias]))
  d_scale, d_bias, scale_bound, bias_bound = sum(sums)
  bounds.assert_within(gradients[1], d_scale, scale_bound)
  bounds.assert_within(gradients[2], d_bias, bias_bound)


@pytest.mark.parametrize("how", ["pmap", "shard_map unchecked"])
def test_gradients_taken_on_each_device_and_summed_are_those_of_the_whole(how):
  # The usual training step: grad inside, then a psum of the parameters' gradients.
  given, cotangent = inputs(masked=True)
  x, mask, scale, bias, state = given

  def local(x_and_cotangent, mask, scale, bias, state):
    x, cotangent = x_and_cotangent[..., 0], x_and_cotangent[..., 1]

    def loss(x, scale, bias):
      y, new_state = jaxbn.batch_norm(
        *(x, scale, bias, state),
        use_running_average=False,
        momentum=0.9,
        mask=mask,
        axis_name="batch",
      )
      return jnp.sum(cotangent * y), (y, new_state)

    (d_x, *parameters), (y, new_state) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return jnp.stack([d_x, y], -1), (new_state, jax.lax.psum(parameters, "batch"))

  whole = jax.jit(spread(how, 8, local))
  both, (new_state, parameters) = whole(jnp.stack([x, cotangent], -1), mask, scale, bias, state)
  results = both[..., 1], new_state, (both[..., 0], *parameters)
  check_training(results, given, cotangent)


# Accuracy


def far_batch(ratio, seed=0):
  noise = np.random.default_rng(seed).normal(size=(4, 64, 32))
  return jnp.asarray(ratio + noise, jnp.float32)


@functools.cache  # compiled once for all data
def shared(**options):
  """(x, state) to (y, new state) over four devices."""
  options = {"use_running_average": False, "axis_name": "batch", **options}
  return jax.pmap(
    lambda x, state: jaxbn.batch_norm(x, state=state, **options),
    axis_name="batch",
    in_axes=(0, None),
    out_axes=(0, None),
  )


def error(y, x):
  flat = np.asarray(x).reshape(-1, x.shape[-1])
  return np.max(np.abs(np.asarray(y).reshape(flat.shape) - oracle.batch_norm(flat)))


# What is asked of the first step, in standard deviations of y, of four devices and of 2,048.
ERRORS = {4: {1e2: 2e-5, 1e3: 2e-4, 1e4: 2e-3}, 2048: {1e2: 2e-5, 1e3: 1e-3, 1e4: 2e-2}}


@pytest.mark.parametrize("ratio", ERRORS[4])
@pytest.mark.parametrize("state", [None, 0.0, 1.0, 1e4])
def test_a_large_mean_is_normalized_right_in_every_step(state, ratio):
  # Whatever the running mean is.
  x = far_batch(ratio)
  y, _ = shared()(x, state if state is None else jaxbn.init(32)._replace(mean=jnp.full(32, state)))
  assert error(y, x) <= ERRORS[4][ratio]


FAR = {
  "mask": (np.float32, {}),
  "weights": (np.float32, {}),
  "groups": (np.float32, {"axis_index_groups": [[0, 1], [2, 3]]}),
  "virtual batches": (np.float32, {"virtual_batch_size": 128}),
  "float64": (np.float64, {}),
  "bfloat16": (jnp.bfloat16, {}),
  "float16": (np.float16, {}),
  "complex": (np.complex64, {}),
}


@pytest.mark.parametrize(("case", "how"), [*zip(FAR, 2 * NAMED, strict=True)])
def test_a_large_mean_with_every_option_and_dtype(case, how):
  dtype, options = FAR[case]
  mean = 1e4 - 3e3j if case == "complex" else 1e2 if "16" in case else 1e4
  with jax.enable_x64(case == "float64"):
    x = (mean + np.asarray(far_batch(0), float)).reshape(-1, 32).astype(dtype)
    counted = np.random.default_rng(2).random((len(x), 1)) < 0.5
    counted[64:128] = False  # a device without elements
    counted = {"mask": {"mask": counted}, "weights": {"weights": counted * np.float32(0.7)}}
    counted = counted.get(case, {})

    def local(x, given, scale, bias, state):
      given = {} if given is None else {next(iter(counted)): given}
      return jaxbn.batch_norm(
        *(x, scale, bias, state), use_running_average=False, axis_name="batch", **given, **options
      )

    scale, bias = np.ones(32, np.float32), np.zeros(32, np.float32)
    state = jaxbn.init(32, dtype=dtype)
    if options:  # each group has a state of its own: they are no result
      state = None
    given = next(iter(counted.values()), None)
    y, _ = jax.jit(spread(how, 4, local))(x, given, scale, bias, state)
    for rows in (slice(0, 128), slice(128, 256)) if options else (slice(None),):
      some = {name: value[rows] for name, value in counted.items()}
      expected = oracle.batch_norm(x[rows], scale, bias, **some)
      bound = bounds.output(x[rows], scale, bias, dtype, devices=4, **some)
      bounds.assert_within(y[rows], expected, bound, some.get("mask", True))


@pytest.mark.parametrize("ratio", ERRORS[2048])
@pytest.mark.parametrize("masked", [False, True])
def test_on_2048_devices(ratio, masked):
  rng = np.random.default_rng(0)
  x = jnp.asarray(ratio + rng.normal(size=(2048, 8, 4)), jnp.float32)
  # Some of them have nothing, and on average half of what there is exists.
  mask = rng.random((2048, 8, 1)) < rng.random((2048, 1, 1)) if masked else None

  def local(x, mask):
    return jaxbn.batch_norm(x, use_running_average=False, mask=mask, axis_name="batch")[0]

  y = jax.jit(jax.vmap(local, axis_name="batch"))(x, mask)
  flat = np.asarray(x).reshape(-1, 4)
  valid = np.ones(len(flat), bool) if mask is None else mask.ravel()
  wrong = np.abs(np.asarray(y).reshape(flat.shape)[valid] - oracle.batch_norm(flat[valid]))
  assert np.max(wrong) <= ERRORS[2048][ratio]


# Communication


def all_reduces(lowered):
  """How many numbers each sums in the program as compiled; and how many there are as traced."""
  shapes = re.findall(r" = (.*?) all-reduce(?:-start)?\(", lowered.compile().as_text())
  sizes = [re.findall(r"f32\[([0-9,]*)\]", shape) for shape in shapes]
  numbers = [sum(math.prod(map(int, filter(None, s.split(",")))) for s in one) for one in sizes]
  return numbers, lowered.as_text().count("stablehlo.all_reduce")


def forward_and_backward(**options):
  """A layer, and the gradient of x through it, of (x, mask, scale, bias, state)."""

  def layer(x, mask, scale, bias, state):
    return jaxbn.batch_norm(x, scale, bias, state, use_running_average=False, mask=mask, **options)

  def gradient(x, *rest):
    def loss(x):
      y, new_state = layer(x, *rest)
      return jnp.sum(jnp.where(jnp.isfinite(y), jnp.sin(y), 0)), new_state

    return jax.grad(loss, has_aux=True)(x)

  return layer, gradient


@pytest.mark.optimized
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["pmap", "shard_map", "shard_map unchecked"])
def test_one_all_reduce_forward_and_one_backward(how, masked):
  (x, mask, *replicated), _ = inputs(masked)

  layer, gradient = forward_and_backward(axis_name="batch")

  def compiled_and_traced(local):
    lowered = jax.jit(spread(how, 8, local)).lower(x, mask, *replicated)
    return all_reduces(lowered)

  # Each sum in four pieces; with a mask per channel also a count for each, in two halves.
  numbers = (2 * 4 + (2 if masked else 0)) * CHANNELS
  assert compiled_and_traced(layer) == ([numbers], 1)
  # As traced, shard_map's checks make several of the backward one: the compiler joins them, and of
  # the sums in it none is of x's size.
  forward, backward = compiled_and_traced(gradient)[0]
  assert forward == numbers
  assert backward == 2 * CHANNELS


@pytest.mark.optimized
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", SHARDED)
def test_sharded_jit_makes_one_all_reduce_forward_and_one_backward(how, masked):
  (x, mask, *replicated), _ = inputs(masked)
  given = place(how, 8, jnp.asarray(x), mask, *replicated)

  layer, gradient = forward_and_backward()

  def bytes_of_each(function):
    program = hlo.parse(jax.jit(function).lower(*given).compile().as_text())
    return [one.bytes for one in program.all_reduces]  # but for a branch's

  # Of float32 all, and so one: with a mask per channel also a count for each.
  size = 4 * (3 if masked else 2) * CHANNELS
  assert bytes_of_each(layer) == [size]
  forward, backward = bytes_of_each(gradient)
  assert forward == size
  assert backward <= size
