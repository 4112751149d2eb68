"""Every transformation of JAX, of every kind of the layer: the value and derivatives stay right.

In float64, where rounding (1e-16, times a condition number below 1e3) and a wrong formula (1e-3)
cannot be taken for each other. pmap, shard_map and sharded jit are in test_devices.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import oracle

N, CHANNELS = 6, 2
MASK = np.arange(12).reshape(N, CHANNELS) % 4 > 0
KINDS = ["plain", "masked", "synchronized"]
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

  def whole(x, scale, bias, state):
    return jaxbn.batch_norm(x, scale, bias, state, **options)

  def synchronized(x, scale, bias, state):
    def shard(x):
      return jaxbn.batch_norm(x, scale, bias, state, axis_name="batch", **options)

    shards = x.reshape(3, N // 3, CHANNELS)
    y, new_state = jax.vmap(shard, axis_name="batch", out_axes=(0, None))(shards)
    return y.reshape(x.shape), new_state

  return synchronized if kind == "synchronized" else whole


def right(kind, mode, x, scale, bias, state):
  """What `layer` should give, from the oracle."""
  mask = MASK if kind == "masked" else None
  batch = oracle.moments(x, mask=mask)
  training = mode == "training"
  stats = batch if training else state
  y = oracle.normalize(x, stats.mean, stats.var, scale, bias)
  y = y if mask is None else np.where(mask, y, 0)
  if not training:
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
  mask = MASK if kind == "masked" else np.ones_like(MASK)
  if mode == "training":
    return tuple(oracle.gradients(x, scale, g, mask=mask))
  g = np.where(mask, g, 0)
  z = np.where(mask, oracle.normalize(x, state.mean, state.var), 0)
  r = 1 / np.sqrt(np.asarray(state.var) + 1e-5)
  return g * np.asarray(scale) * r, (g * z).sum(0), g.sum(0)


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
@pytest.mark.parametrize("transform", VALUES)
def test_outputs_and_new_state(transform, kind, mode):
  given = arguments(kind)
  y, state = jax.jit(VALUES[transform](layer(kind, mode)))(*given)
  expected = right(kind, mode, *given)
  assert_close((y, state), expected)


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
@pytest.mark.parametrize("transform", FIRST)
def test_first_derivatives(transform, kind, mode):
  *primals, state = arguments(kind)
  loss = loss_of(kind, mode, state)
  actual = jax.jit(lambda *p: FIRST[transform](loss, p))(*primals)
  assert_close(actual, along(right_gradient(kind, mode, *primals, state)))


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
@pytest.mark.parametrize("transform", SECOND)
def test_second_derivatives(transform, kind, mode):
  *primals, state = arguments(kind)
  h = 1e-5

  def shifted(step):
    moved = [np.asarray(p) + step * t for p, t in zip(primals, TANGENTS, strict=True)]
    return right_gradient(kind, mode, *moved, state)

  expected = jax.tree.map(lambda a, b: (a - b) / (2 * h), shifted(h), shifted(-h))
  loss = loss_of(kind, mode, state)
  actual = jax.jit(lambda *p: SECOND[transform](loss, p))(*primals)
  assert_close(tuple(actual), expected, rtol=1e-7)


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
