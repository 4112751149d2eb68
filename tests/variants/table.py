"""Every transformation of JAX, of a function and of the plain formula that it should equal.

Both are functions of the same arrays, the first of which is x with its examples along axis 0, and
give one array y of x's shape. Run under double precision (the fixture below), so that rounding and
a wrong formula cannot be taken for each other. The formula itself is held to an oracle elsewhere.

  def test_transformations():
    table.compare_all(f, formula, (x, scale, bias))

  @pytest.mark.parametrize("devices", table.DEVICES)
  def test_devices(devices):
    table.compare_on_devices(devices, lambda axis_name: f(axis_name), formula, args)
"""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


@pytest.fixture(autouse=True)
def double_precision():
  """Import it in a test file whose tests all compare in float64."""
  with jax.enable_x64(True):
    yield


def loss(f):
  """A scalar that depends on every element of y, unevenly and not linearly."""

  def of(*args):
    y = f(*args)
    weights = jnp.sin(jnp.arange(1.0, y.size + 1)).reshape(y.shape)
    return jnp.sum(weights * jnp.sin(y))

  return of


def along(args):
  """A direction in the space of the arguments."""
  rng = np.random.default_rng(7)
  return tuple(jnp.asarray(rng.normal(size=a.shape)) for a in args)


def numbers(args):
  return tuple(range(len(args)))


def over_x(f, args):
  x, *rest = args
  axes = (0, *[None] * len(rest))
  return jax.vmap(f, axes)(jnp.stack([x, 2 - 3 * x]), *rest)


def over_parameters(f, args):
  x, *rest = args
  axes = (None, *[0] * len(rest))
  return jax.vmap(f, axes)(x, *(jnp.stack([a, 0.5 * a + 0.25]) for a in rest))


def scan(f, args):
  x, *rest = args
  layers = [jnp.stack([a, 0.5 * a + 0.25]) for a in rest]
  return jax.lax.scan(lambda x, p: (f(x, *p), None), x, layers or None, 2)[0]


def directional(f, args):
  gradient = jax.grad(loss(f), numbers(args))
  return lambda *a: sum(jnp.sum(g * t) for g, t in zip(gradient(*a), along(args), strict=True))


def hessian(f, args):
  """Its columns along one direction of x: the whole would be large."""
  x, *rest = args
  (t, *_) = along(args)
  return jax.hessian(lambda s: loss(f)(x + s * t, *rest))(0.0)


TRANSFORMS = {
  "jit": lambda f, args: f(*args),
  "remat": lambda f, args: jax.checkpoint(f)(*args),
  "vmap over x": over_x,
  "vmap over parameters": over_parameters,
  "scan": scan,
  "grad": lambda f, args: jax.grad(loss(f), numbers(args))(*args),
  "grad of remat": lambda f, args: jax.grad(jax.checkpoint(loss(f)), numbers(args))(*args),
  "grad of scan": lambda f, args: jax.grad(
    lambda *a: loss(lambda *b: scan(f, b))(*a), numbers(args)
  )(*args),
  "grad of vmap": lambda f, args: jax.grad(loss(lambda *a: over_x(f, a)), numbers(args))(*args),
  "vmap of grad": lambda f, args: over_x(jax.grad(loss(f)), args),
  "jvp": lambda f, args: jax.jvp(f, args, along(args)),
  "linearize": lambda f, args: jax.linearize(f, *args)[1](*along(args)),
  "grad of grad": lambda f, args: jax.grad(directional(f, args), numbers(args))(*args),
  "jvp of grad": lambda f, args: jax.jvp(jax.grad(loss(f), numbers(args)), args, along(args)),
  "hessian": hessian,
  # JAX inlines a custom rule when it differentiates a scan the first time.
  "grad of grad of scan": lambda f, args: jax.grad(
    directional(lambda *b: scan(f, b), args), numbers(args)
  )(*args),
  "hessian of scan": lambda f, args: hessian(lambda *b: scan(f, b), args),
}


def assert_close(actual, expected, rtol):
  chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)


def compare(transform, f, formula, args, rtol=1e-8):
  """One transformation of f, jitted, against the same of the formula."""
  args = tuple(map(jnp.asarray, args))
  f_result, expected = (
    jax.jit(functools.partial(TRANSFORMS[transform], g))(args) for g in (f, formula)
  )
  assert_close(f_result, expected, rtol)


def compare_all(f, formula, args, rtol=1e-8, transforms=tuple(TRANSFORMS)):
  """All of them in one program, which compiles faster; what differs is named by its path."""
  args = tuple(map(jnp.asarray, args))
  f_result, expected = (
    jax.jit(lambda args, g=g: {name: TRANSFORMS[name](g, args) for name in transforms})(args)
    for g in (f, formula)
  )
  assert_close(f_result, expected, rtol)


def assert_traced_once(f, args):
  """New values of the same shapes do not trace again, and no tracer leaks."""
  args = tuple(map(jnp.asarray, args))
  chex.clear_trace_counter()
  traced = jax.jit(chex.assert_max_traces(f, n=1))
  with jax.checking_leaks():
    traced(*args)
  traced(*(a + 0.125 for a in args))


SHARDS = 2
DEVICES = ("vmap", "pmap", "shard_map", "jit", "jit explicit")


def on_devices(devices, make, args):
  """The gradient of the loss of the whole batch, whose shards are on several devices."""
  x, *rest = args
  if devices.startswith("jit"):
    kind = AxisType.Explicit if "explicit" in devices else AxisType.Auto
    mesh = jax.make_mesh((SHARDS,), ("batch",), axis_types=(kind,))
    x = jax.device_put(x, NamedSharding(mesh, P("batch")))
    rest = jax.device_put(rest, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh) if devices.endswith("mesh set") else contextlib.nullcontext():
      return jax.jit(jax.grad(on_mesh(make(None)), numbers(args)))(x, *rest)
  f = make("batch")
  if devices == "shard_map":
    mesh = jax.make_mesh((SHARDS,), ("batch",), axis_types=(AxisType.Auto,))
    specs = (P("batch"), *[P()] * len(rest))
    whole = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("batch"), check_vma=True)
  else:
    axes = (0, *[None] * len(rest))
    mapping = {"vmap": jax.vmap, "pmap": jax.pmap}[devices]
    mapped = mapping(f, axis_name="batch", in_axes=axes)

    def whole(x, *rest):
      shards = x.reshape(SHARDS, len(x) // SHARDS, *x.shape[1:])
      return mapped(shards, *rest).reshape(x.shape)

  return jax.jit(jax.grad(loss(whole), numbers(args)))(x, *rest)


def on_mesh(f):
  """The loss, whose weights on an explicit mesh need y's sharding."""

  def of(*args):
    y = f(*args)
    weights = np.sin(np.arange(1.0, y.size + 1)).reshape(y.shape)
    weights = jax.device_put(weights, jax.typeof(y).sharding) if on_explicit(y) else weights
    return jnp.sum(weights * jnp.sin(y))

  return of


def on_explicit(y):
  return bool(jax.typeof(y).sharding.mesh.explicit_axes)


def compare_on_devices(devices, make, formula, args, rtol=1e-8):
  """The gradient of `make(axis_name)` of shards, against that of the formula of the whole batch."""
  args = tuple(map(jnp.asarray, args))
  expected = jax.jit(jax.grad(loss(formula), numbers(args)))(*args)
  assert_close(on_devices(devices, make, args), expected, rtol)
