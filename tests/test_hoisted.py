"""Activations that hold arrays, draw random numbers, or are made anew for each call."""

import gc

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
HELD = {
  "floats": np.linspace(0.1, 0.9, 4, dtype=np.float32),
  "booleans": np.arange(4) > 1,
  "integers": np.arange(4),
  "key": jax.random.key(1),
}


def acting(kind, held):
  """An activation that holds an array."""
  return {
    "floats": lambda z: jnp.where(z > 0, z, held * z),
    "booleans": lambda z: jnp.where(held, jnp.tanh(z), z),
    "integers": lambda z: jnp.tanh(z) * held,
    "key": lambda z: jnp.tanh(z) * jax.random.uniform(held, z.shape),
  }[kind]


def layer(x, activation, **options):
  options = {"use_running_average": False, **options}
  return jaxbn.batch_norm(x, jnp.ones(4), jnp.zeros(4), activation=activation, **options)[0]


def outside(x, activation):
  return activation(layer(x, None))


def through(way, applied, kind):
  """The sum of two layers whose activation holds a traced array, in one of JAX's ways."""

  def step(x, held):
    return applied(x, acting(kind, held)), None

  def loss(x, held):
    if way == "scan":
      x, _ = jax.lax.scan(lambda x, _: step(x, held), x, None, length=2)
    elif way == "scan over what is held":
      many = jax.tree.map(lambda v: jnp.stack([v, v]), held)
      x, _ = jax.lax.scan(step, x, many)
    else:
      stage = {"checkpoint": jax.checkpoint, "jit": jax.jit, "eager": lambda f: f}[way]
      x = stage(lambda x, held: step(step(x, held)[0], held)[0])(x, held)
    return jnp.sum(x**3)

  return loss


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("way", ["eager", "jit", "checkpoint", "scan", "scan over what is held"])
def test_what_it_holds_may_be_traced_and_of_any_dtype(way, kind):
  held = HELD[kind]
  wrt = (0, 1) if kind == "floats" else 0
  gradient = jax.value_and_grad(through(way, layer, kind), wrt)
  expected = jax.value_and_grad(through(way, outside, kind), wrt)

  def both(x, held):
    return gradient(x, held), expected(x, held)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    *(both if way == "eager" else jax.jit(both))(X, held),
  )


@pytest.mark.parametrize("stage", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_it_draws_is_drawn_once(stage):
  def drawing():
    keys = iter(map(jax.random.key, range(20)))
    return lambda z: jnp.tanh(z) * jax.random.bernoulli(next(keys), 0.5, z.shape)

  def gradient(applied):
    return stage(jax.grad(lambda x: jnp.sum(applied(x, drawing()) ** 3)))(X)

  np.testing.assert_allclose(gradient(layer), gradient(outside), rtol=1e-5, atol=1e-5)


def test_what_it_is_given_has_one_dtype():
  with jax.enable_x64(True):
    slope, scale = jnp.full(4, 0.25, jnp.float32), jnp.ones(4, jnp.float64)
    f = lambda x: jaxbn.batch_norm(  # noqa: E731
      x, scale, use_running_average=False, activation=acting("floats", slope)
    )[0]
    assert f(jnp.asarray(X)).dtype == jnp.float64
    assert jax.grad(lambda x: f(x).sum())(jnp.asarray(X)).dtype == jnp.float32


class Holder:
  """What an activation closes over, as it does over the module that it belongs to."""

  def __init__(self):
    self.slopes = jnp.full((512, 512), 0.25)

  def __call__(self, z):
    return jnp.where(z > 0, z, self.slopes[0, 0] * z)


def ways_of_using(activation):
  f = lambda x: layer(x, activation).sum()  # noqa: E731
  return f, jax.grad(f), jax.jit(f), jax.jit(jax.grad(f))


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: lambda z: h(z)], ids=["self", "closure"])
def test_no_cache_keeps_it_alive(wrap):
  gc.collect()
  before = sum(a.nbytes for a in jax.live_arrays())
  for _ in range(3):
    for way in ways_of_using(wrap(Holder())):
      way(X)
  del way
  gc.collect()
  assert sum(a.nbytes for a in jax.live_arrays()) - before < 2**20


def test_nothing_leaks():
  def loss(x, slope):
    return layer(x, lambda z: jnp.where(z > 0, z, slope * z)).sum()

  with jax.checking_leaks():
    jax.jit(jax.grad(loss, (0, 1)))(X, 0.25)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_function_for_each_call_compiles_nothing_anew(dtype):
  compiled = []
  x = jnp.asarray(X, dtype)

  def listen(event, duration, **_):
    if "backend_compile" in event:
      compiled.append(event)

  def step(slope):
    value = lambda x: layer(x, lambda z: jnp.where(z > 0, z, slope * z)).sum()  # noqa: E731
    return value(x), jax.grad(value)(x)

  step(jnp.float32(0.1))
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    step(jnp.float32(0.2))
    assert not compiled
    jax.jit(lambda x: x + 1)(x)
    assert compiled  # the listener works
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
  ("activation", "options", "error", "message"),
  [
    (lambda z: z > 0, {}, TypeError, "gives bool, which has no derivative"),
    (lambda z: jnp.sign(z).astype(int), {}, TypeError, "gives int32, which has no derivative"),
    (lambda z: z * 1j, {}, TypeError, "gives complex64, but y has dtype=float32"),
    (lambda z: z.sum(), {}, ValueError, r"turns an array of shape \(12, 4\) into ShapeDtype"),
    (jnp.sum, {}, ValueError, "activation=sum turns"),
    (jax.nn.one_hot, {}, TypeError, "one_hot"),
  ],
)
def test_what_is_refused(activation, options, error, message):
  with pytest.raises(error, match=message):
    layer(X, activation, **options)


def test_a_complex_result_may_be_asked_for():
  assert layer(X, lambda z: z * 1j, dtype=jnp.complex64).dtype == jnp.complex64
