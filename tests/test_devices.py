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
  """Against the oracle over the whole batch, within what float32 allows around the running mean."""
  y, new_state, gradients = results
  x, mask, scale, bias, state = given
  counted = {"mask": mask, "pivot": np.asarray(state.mean)}
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
    counted = {"mask": mask[rows], "pivot": np.asarray(state.mean)}
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


@pytest.mark.parametrize(("ratio", "claim"), [(1e3, 1e-3), (1e4, 1e-2)])
@pytest.mark.parametrize(
  "case", ["local", "running mean near", "second debiased step", "two passes", "no state"]
)
def test_a_large_mean_is_normalized_right_on_devices_too(case, ratio, claim):
  x, cold = far_batch(ratio), jaxbn.init(32)
  if case == "local":
    y = jax.pmap(lambda x: jaxbn.batch_norm(x, use_running_average=False)[0])(x)
    assert max(error(*pair) for pair in zip(y, x, strict=True)) <= claim
    return
  if case == "running mean near":
    y, _ = shared()(x, cold._replace(mean=jnp.full(32, ratio + 1, jnp.float32)))
  elif case == "second debiased step":
    _, state = shared(debias=True)(far_batch(ratio, seed=1), jaxbn.init(32, debias=True))
    y, _ = shared(debias=True)(x, state)
  elif case == "two passes":
    y, _ = shared(use_fast_variance=False)(x, cold)
  else:
    y, _ = shared()(x, None)
  assert error(y, x) <= claim


@pytest.mark.parametrize("ratio", [1e2, 3e2, 1e3, 3e3, 1e4, 1e5])
def test_a_first_step_far_from_the_running_mean_is_bounded(ratio):
  # The variance, 1, is known to c u k^2, where k is the ratio and c = 12: sums over four devices,
  # of values and of squares, and the rounding of each. It is held above 2 u k^2, so that it is at
  # least max(1 - c u k^2, 2 u k^2) >= 1 / (1 + c / 2): outputs are at most sqrt(7) times too large,
  # and never of the order of 1/sqrt(epsilon). Besides, the mean is rounded.
  x = far_batch(ratio)
  y, state = shared()(x, jaxbn.init(32))
  flat = np.asarray(x).reshape(-1, 32)
  expected = oracle.batch_norm(flat)
  bound = (np.sqrt(7) - 1) * np.abs(expected) + 14 * bounds.roundoff(np.float32) * ratio
  bounds.assert_within(y.reshape(flat.shape), expected, bound)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_first_step_whose_variance_is_lost_makes_outputs_too_small():
  # As _variance promises: at 1e5 deviations from the running mean nothing of the variance is left.
  x = far_batch(1e5)
  y, _ = shared()(x, jaxbn.init(32))
  flat = np.asarray(x).reshape(-1, 32)
  exact = np.abs(oracle.batch_norm(flat))
  assert np.max(np.abs(y)) < 0.1 * np.max(exact)


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

  # With a mask per channel also a count for each, in two halves.
  numbers = (4 if masked else 2) * CHANNELS
  assert compiled_and_traced(layer) == ([numbers], 1)
  # As traced, shard_map's checks make several of the backward one: the compiler joins them, and of
  # the sums in it none is of x's size.
  forward, backward = compiled_and_traced(gradient)[0]
  assert forward == numbers
  assert backward <= numbers


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
