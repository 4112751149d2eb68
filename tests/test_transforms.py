"""Every transformation of JAX, of every kind of the layer: the value and derivatives stay right.

In float64, where rounding (1e-16, times a condition number below 1e3) and a wrong formula (1e-3)
cannot be taken for each other. Transformations alike are in one program, which compiles faster;
what differs is named by its path. More of pmap, shard_map and sharded jit is in test_devices.py, of
activations in test_activation.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from tests import oracle

N, CHANNELS = 6, 2
MASK = np.arange(12).reshape(N, CHANNELS) % 5 > 0  # of three rows each, no channel lacks two
GROUP = 3  # examples of a virtual batch
KINDS = ["plain", "masked", "synchronized", "activation", "virtual"]
MODES = ["training", "evaluation"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _double_precision():
  with jax.enable_x64(True):
    yield


def table(test):
  """Every kind in every mode."""
  return pytest.mark.parametrize("mode", MODES)(pytest.mark.parametrize("kind", KINDS)(test))


def arguments(kind):
  """x, scale, bias, state."""
  rng = np.random.default_rng(0)
  x = rng.normal(1, 2, (N, CHANNELS))
  if kind == "masked":
    x = np.where(MASK, x, np.nan)
  state = jaxbn.RunningStats(jnp.array([0.5, 1.0]), jnp.array([2.0, 0.5]))
  return jnp.asarray(x), jnp.array([0.5, 1.5]), jnp.array([1.0, -1.0]), state


def layer(kind, mode):
  """(x, scale, bias, state) to (y, new state), for the whole batch."""
  options = {"use_running_average": mode == "evaluation", "momentum": 0.9}
  if kind == "masked":
    options |= {"mask": MASK, "masked_value": 0.0}
  if kind == "virtual":
    options["virtual_batch_size"] = GROUP

  def whole(x, scale, bias, state):
    if kind == "activation":  # a block of a residual network
      options.update(activation=jax.nn.silu, residual=x)
    return jaxbn.batch_norm(x, scale, bias, state, **options)

  def synchronized(x, scale, bias, state):
    def shard(x):
      return jaxbn.batch_norm(x, scale, bias, state, axis_name="batch", **options)

    shards = x.reshape(3, N // 3, CHANNELS)
    y, new_state = jax.vmap(shard, axis_name="batch", out_axes=(0, None))(shards)
    return y.reshape(x.shape), new_state

  return synchronized if kind == "synchronized" else whole


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def by_group(x, *others):
  """What belongs together, group by group."""
  return [(x[i : i + GROUP], *(a[i : i + GROUP] for a in others)) for i in range(0, N, GROUP)]


def before_activation(kind, mode, x, scale, bias, state):
  if kind == "virtual" and mode == "training":
    groups = [before_activation("plain", mode, *g, scale, bias, state) for g in by_group(x)]
    ys, batches = zip(*groups, strict=True)
    return np.concatenate(ys), oracle.Stats(*(np.mean(v, 0) for v in zip(*batches, strict=True)))
  mask = MASK if kind == "masked" else None
  batch = oracle.moments(x, mask=mask)
  stats = batch if mode == "training" else state
  y = oracle.normalize(x, stats.mean, stats.var, scale, bias)
  y = y + np.asarray(x) if kind == "activation" else y
  return y, batch


def right(kind, mode, x, scale, bias, state):
  """What `layer` should give, from the oracle."""
  y, batch = before_activation(kind, mode, x, scale, bias, state)
  y = np.where(MASK, y, 0) if kind == "masked" else y
  y = y * sigmoid(y) if kind == "activation" else y
  if mode == "evaluation":
    return y, state
  blend = [0.9 * np.asarray(old) + 0.1 * new for old, new in zip(state, batch[1:], strict=False)]
  return y, jaxbn.RunningStats(*blend)


COTANGENT = np.random.default_rng(1).normal(size=(N, CHANNELS))


def loss_of(kind, mode, state):
  f = layer(kind, mode)
  return lambda x, scale, bias: jnp.sum(COTANGENT * jnp.sin(f(x, scale, bias, state)[0]))


def right_gradient(kind, mode, x, scale, bias, state):
  """Of the loss with respect to x, scale and bias, from the oracle."""
  y, _ = right(kind, mode, x, scale, bias, state)
  g = COTANGENT * np.cos(y)
  past_layer = 0
  if kind == "activation":
    z, _ = before_activation(kind, mode, x, scale, bias, state)
    g = g * sigmoid(z) * (1 + z * (1 - sigmoid(z)))
    past_layer = g
  mask = MASK if kind == "masked" else np.ones_like(MASK)
  if kind == "virtual" and mode == "training":
    d_x, d_scale, d_bias = zip(
      *(oracle.gradients(some, scale, g_some) for some, g_some in by_group(x, g)), strict=True
    )
    return np.concatenate(d_x), sum(d_scale), sum(d_bias)
  if mode == "training":
    d_x, d_scale, d_bias = oracle.gradients(x, scale, g, mask=mask)
    return d_x + past_layer, d_scale, d_bias
  g = np.where(mask, g, 0)
  z = np.where(mask, oracle.normalize(x, state.mean, state.var), 0)
  r = 1 / np.sqrt(np.asarray(state.var) + 1e-5)
  return g * np.asarray(scale) * r + past_layer, (g * z).sum(0), g.sum(0)


def assert_close(actual, expected, rtol=CLOSE["rtol"]):
  chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)


# Values


def over_x(f):
  """vmap over x, alone: the second of two batches."""

  def second(x, *rest):
    both = jax.vmap(f, in_axes=(0, None, None, None))(jnp.stack([-3 * x, x]), *rest)
    return jax.tree.map(lambda a: a[1], both)

  return second


def over_parameters(f):
  """vmap over scale, bias and state: the second of two layers."""

  def second(x, *rest):
    pairs = jax.tree.map(lambda a: jnp.stack([a + 1, a]), rest)
    both = jax.vmap(f, in_axes=(None, 0, 0, 0))(x, *pairs)
    return jax.tree.map(lambda a: a[1], both)

  return second


VALUES = {
  "jit": lambda f: f,
  "remat": jax.checkpoint,
  "vmap over x": over_x,
  "vmap over parameters": over_parameters,
}


@table
def test_outputs_and_new_state(kind, mode):
  given = arguments(kind)
  f = layer(kind, mode)
  actual = jax.jit(lambda *a: {name: of(f)(*a) for name, of in VALUES.items()})(*given)
  assert_close(actual, dict.fromkeys(VALUES, right(kind, mode, *given)))


@table
def test_a_scan_over_layers_is_the_loop_over_them(kind, mode):
  f = layer(kind, mode)
  x, *parameters = arguments(kind)
  layers = jax.tree.map(lambda a: jnp.stack([a, a + 1, 2 * a + 1]), parameters)
  y, states = jax.jit(lambda *a: jax.lax.scan(lambda x, p: f(x, *p), *a))(x, layers)
  for i in range(3):
    scale, bias, state = jax.tree.map(lambda a, i=i: a[i], layers)
    x, new_state = right(kind, mode, x, scale, bias, state)
    assert_close(jax.tree.map(lambda a, i=i: a[i], states), new_state)
  assert_close(y, x)


# First derivatives

TANGENTS = tuple(np.random.default_rng(2).normal(size=s) for s in [(N, CHANNELS), (2,), (2,)])


def along(gradient):
  return sum((g * t).sum() for g, t in zip(gradient, TANGENTS, strict=True))


def of_linearize(loss, primals):
  return jax.linearize(loss, *primals)[1](*TANGENTS)


FIRST = {
  "grad": lambda loss, primals: along(jax.grad(loss, (0, 1, 2))(*primals)),
  "grad of remat": lambda loss, p: along(jax.grad(jax.checkpoint(loss), (0, 1, 2))(*p)),
  "jvp": lambda loss, primals: jax.jvp(loss, primals, TANGENTS)[1],
  "linearize": of_linearize,
}


@table
def test_first_derivatives(kind, mode):
  *primals, state = arguments(kind)
  loss = loss_of(kind, mode, state)
  actual = jax.jit(lambda *p: {name: of(loss, p) for name, of in FIRST.items()})(*primals)
  assert_close(actual, dict.fromkeys(FIRST, along(right_gradient(kind, mode, *primals, state))))


@table
def test_the_gradient_of_a_vmap_over_x_is_that_of_each(kind, mode):
  x, scale, bias, state = arguments(kind)
  batches = jnp.stack([x, 2 * x - 1])
  f = jax.vmap(jax.grad(loss_of(kind, mode, state), (0, 1, 2)), in_axes=(0, None, None))
  expected = [right_gradient(kind, mode, b, scale, bias, state) for b in batches]
  assert_close(jax.jit(f)(batches, scale, bias), jax.tree.map(lambda *a: np.stack(a), *expected))


# Second derivatives, against central differences of the analytic gradient: off by h^2, and by
# rounding over h, 1e-10 and 1e-11 times derivatives of order ten.


def of_hessian(loss, primals):
  rows = jax.hessian(loss, (0, 1, 2))(*primals)
  return tuple(
    sum(jnp.tensordot(block, t, t.ndim) for block, t in zip(row, TANGENTS, strict=True))
    for row in rows
  )


def of_grad_of_grad(loss, primals):
  def directional(*primals):
    gradient = jax.grad(loss, (0, 1, 2))(*primals)
    return along(gradient)

  return jax.grad(directional, (0, 1, 2))(*primals)


SECOND = {"hessian": of_hessian, "grad of grad": of_grad_of_grad}


@table
def test_second_derivatives(kind, mode):
  *primals, state = arguments(kind)
  h = 1e-5

  def shifted(step):
    moved = [np.asarray(p) + step * t for p, t in zip(primals, TANGENTS, strict=True)]
    return right_gradient(kind, mode, *moved, state)

  expected = jax.tree.map(lambda a, b: (a - b) / (2 * h), shifted(h), shifted(-h))
  loss = loss_of(kind, mode, state)
  actual = jax.jit(lambda *p: {name: of(loss, p) for name, of in SECOND.items()})(*primals)
  assert_close(actual, dict.fromkeys(SECOND, expected), rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_a_scan_over_layers(kind):
  # JAX inlines a custom rule when it differentiates a scan the first time.
  *primals, state = arguments(kind)
  f = layer(kind, "training")

  def loss(x, scale, bias, unroll):
    layers = jnp.stack([scale, scale + 1]), jnp.stack([bias, bias - 1])
    step = lambda x, p: (f(x, *p, state)[0], None)  # noqa: E731
    return jnp.sum(COTANGENT * jnp.sin(jax.lax.scan(step, x, layers, unroll=unroll)[0]))

  def twice(unroll):
    return jax.jit(lambda *p: of_grad_of_grad(lambda *q: loss(*q, unroll), p))(*primals)

  assert_close(twice(1), twice(2))


# Devices, against the formula as it is written in textbooks, which JAX differentiates.

DEVICES = 2
AXIS_TYPES = {"jit": AxisType.Auto, "jit explicit": AxisType.Explicit}


def formula(kind, mode, x, mask, scale, bias, state):
  """Two passes over what exists; elsewhere 0."""
  mean, var = state.mean, state.var
  x = jnp.where(mask, x, 0)
  if mode == "training":
    n = mask.sum(0)
    mean = x.sum(0) / n
    var = (jnp.where(mask, x - mean, 0) ** 2).sum(0) / n
  y = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias
  return jax.nn.silu(y + x) if kind == "activation" else jnp.where(mask, y, 0)


def of_shard(kind, mode, x, mask, scale, bias, state):
  """The same by the layer, of what one device holds."""
  options = {
    "masked": {"mask": mask, "masked_value": 0.0},
    "synchronized": {"axis_name": "batch"},
    "activation": {"activation": jax.nn.silu, "residual": x},
    "virtual": {"axis_name": "batch", "virtual_batch_size": "device"},
  }.get(kind, {})
  options["use_running_average"] = mode == "evaluation"
  return jaxbn.batch_norm(x, scale, bias, state, **options)[0]


def in_shards(mapping, f):
  """f of each device's share of x and mask."""
  mapped = mapping(f, in_axes=(0, 0, None, None, None))

  def whole(x, mask, *replicated):
    shards = [a.reshape(DEVICES, N // DEVICES, CHANNELS) for a in (x, mask)]
    return mapped(*shards, *replicated).reshape(x.shape)

  return whole


def derivative(order, f, kind):
  """The gradient of the loss, or also its derivative along TANGENTS."""
  mask = jnp.asarray(MASK if kind == "masked" else np.ones_like(MASK))
  *primals, state = arguments(kind)

  def loss(x, scale, bias):
    return jnp.sum(COTANGENT * jnp.sin(f(x, mask, scale, bias, state)))

  gradient = jax.grad(loss, (0, 1, 2))
  if order == 1:
    return jax.jit(gradient)(*primals)
  tangents = jax.tree.map(jnp.asarray, TANGENTS)
  return jax.jit(lambda *p: jax.jvp(gradient, p, tangents))(*primals)


@functools.cache
def right_derivative(order, kind, mode, whole):
  f = functools.partial(formula, kind, mode)
  return derivative(order, f if whole else in_shards(jax.vmap, f), kind)


def on_devices(how, kind, mode):
  f = functools.partial(of_shard, kind, mode)
  if how == "pmap":
    return in_shards(functools.partial(jax.pmap, axis_name="batch"), f)
  mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
  specs = (P("batch"), P("batch"), P(), P(), P())
  return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("batch"), check_vma=True)


@table
@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_gradients_on_devices(how, kind, mode):
  # Each device has statistics of its own unless they are synchronized.
  actual = derivative(1, on_devices(how, kind, mode), kind)
  assert_close(actual, right_derivative(1, kind, mode, kind == "synchronized"))


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_second_derivatives_across_devices(how):
  actual = derivative(2, on_devices(how, "synchronized", "training"), "synchronized")
  assert_close(actual, right_derivative(2, "synchronized", "training", True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["plain", "masked", "activation"])
@pytest.mark.parametrize("how", AXIS_TYPES)
def test_gradients_of_a_sharded_batch(how, kind, mode):
  # Without a name for the devices: what is plain here is synchronized.
  mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AXIS_TYPES[how],))
  batch, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
  x, *parameters = arguments(kind)
  x, mask, cotangent = jax.device_put((x, MASK | (kind != "masked"), COTANGENT), batch)
  scale, bias, state = jax.device_put(parameters, everywhere)

  def loss(x, scale, bias, mask, state):
    y = of_shard(kind, mode, x, mask, scale, bias, state)
    return jnp.sum(cotangent * jnp.sin(y))

  actual = jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias, mask, state)
  assert actual[0].sharding.is_equivalent_to(batch, 2)
  assert_close(actual, right_derivative(1, kind, mode, True))


# Export


def exported_step(kind, mode):
  """y, the new state and the gradients, of arrays only, for machines that are not here."""

  def step(x, scale, bias, mean, var):
    state = jaxbn.RunningStats(mean, var)
    y, new_state = layer(kind, mode)(x, scale, bias, state)
    gradient = jax.grad(loss_of(kind, mode, state), (0, 1, 2))(x, scale, bias)
    return y, new_state.mean, new_state.var, *gradient

  *given, state = arguments(kind)
  given += state[:2]
  # With the CPU among them, the same program can be run here.
  return export.export(jax.jit(step), platforms=("tpu", "cuda", "cpu"))(*given), given


@table
def test_a_training_step_is_exported_for_machines_that_are_not_here(kind, mode):
  exported, (*primals, mean, var) = exported_step(kind, mode)
  y, new_mean, new_var, *gradient = jax.jit(exported.call)(*primals, mean, var)
  state = jaxbn.RunningStats(mean, var)
  actual = (y, jaxbn.RunningStats(new_mean, new_var)), tuple(gradient)
  expected = right(kind, mode, *primals, state), right_gradient(kind, mode, *primals, state)
  assert_close(actual, expected)


@pytest.mark.parametrize("platforms", [("tpu", "cuda"), ("cpu",)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_layer_survives_the_file_with_its_derivative(kind, platforms):
  pytest.importorskip("flatbuffers", reason="JAX serializes by it")
  *primals, state = arguments(kind)
  f = jax.jit(lambda *p: layer(kind, "training")(*p, state)[0])
  blob = export.export(f, platforms=platforms)(*primals).serialize(vjp_order=1)
  loaded = export.deserialize(blob)
  assert loaded.platforms == platforms
  assert loaded.has_vjp()
  assert [a.shape for a in loaded.out_avals] == [(N, CHANNELS)]
  if platforms == ("cpu",):
    y, pullback = jax.vjp(jax.jit(loaded.call), *primals)
    expected, _ = right(kind, "training", *primals, state)
    assert_close(y, expected)
    actual = pullback(COTANGENT * jnp.cos(y))
    assert_close(actual, right_gradient(kind, "training", *primals, state))


# Tracing


@table
def test_new_values_and_a_new_state_do_not_trace_again(kind, mode):
  x, scale, bias, state = arguments(kind)
  chex.clear_trace_counter()
  f = jax.jit(chex.assert_max_traces(layer(kind, mode), n=1))
  for step in range(4):
    _, state = f(x + step, scale, bias, state)


def test_a_momentum_that_is_traced_does_not_trace_again():
  x, scale, bias, state = arguments("plain")
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def f(momentum):
    return jaxbn.batch_norm(x, scale, bias, state, use_running_average=False, momentum=momentum)[1]

  batch = oracle.moments(x)
  for momentum in (0.5, 0.9):
    np.testing.assert_allclose(
      f(momentum).mean, momentum * state.mean + (1 - momentum) * batch.mean, **CLOSE
    )


def test_no_tracer_leaks():
  x, scale, bias, state = arguments("synchronized")
  with jax.checking_leaks():
    jax.jit(jax.grad(loss_of("synchronized", "training", state)))(x, scale, bias)


class Variants(chex.TestCase):
  """The same function with and without jit, on a device and off it, and under pmap."""

  @chex.all_variants()
  def test_every_variant_gives_one_answer(self):
    given = arguments("plain")
    y, state = self.variant(layer("plain", "training"))(*given)
    assert_close((y, state), right("plain", "training", *given))


def test_pmap_and_jit_can_be_faked_for_debugging():
  x, scale, bias, state = arguments("plain")
  with chex.fake_pmap_and_jit():
    shard = jax.pmap(
      lambda x: jaxbn.batch_norm(
        *(x, scale, bias, state), use_running_average=False, axis_name="batch"
      )[0],
      axis_name="batch",
    )
    y = jax.jit(shard)(x.reshape(3, N // 3, CHANNELS))
  assert_close(y.reshape(x.shape), right("plain", "training", x, scale, bias, state)[0])
