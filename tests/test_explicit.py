"""Meshes whose axes are Explicit, as jax.make_mesh makes them: options by how x is sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

C = 4
SHAPE = (8, 3, C)
RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, SHAPE).astype(np.float32)
SLOPES = np.linspace(0.1, 0.4, C, dtype=np.float32)
MASK, WEIGHTS = RNG.random(SHAPE) < 0.7, RNG.uniform(0.1, 1, SHAPE).astype(np.float32)
HALFWAY = lambda b, s: jaxbn.Chosen((b.mean + s.mean) / 2, (b.var + s.var) / 2)  # noqa: E731
OPTIONS = {
  "plain": {},
  "two passes": {"use_fast_variance": False},
  "mask": {"mask": MASK, "debias": True, "skip_nonfinite": True},
  "mask of examples": {"mask": MASK[:, :1, :1], "masked_value": 0.0, "momentum": None},
  "weights": {"weights": WEIGHTS, "unbiased": True},
  "relu": {"activation": jax.nn.relu},
  "residual": {"residual": X[::-1].copy(), "activation": jax.nn.relu},
  "slopes": {"activation": "slopes"},
  "nonfinite skipped": {"skip_nonfinite": True},
  "virtual": {"virtual_batch_size": 4, "skip_nonfinite": True},
  "virtual, all": {"virtual_batch_size": 2, "activation": "slopes", "mask": MASK, "momentum": None},
  "choose": {"choose": HALFWAY},
  "detached": {"detach_stats": True},
  "evaluation": {"use_running_average": True},
}
SHARDINGS = {  # the axes of the mesh, and those of x
  "examples": (("d",), P("d")),
  "channels": (("d",), P(None, None, "d")),
  "both": (("d", "m"), P("d", None, "m")),
  "examples over both": (("d", "m"), P(("d", "m"))),
  "examples over one": (("d", "m"), P("d")),
}


def mesh_of(names, kind=AxisType.Explicit):
  return jax.make_mesh((4,) if len(names) == 1 else (2, 2), names, axis_types=(kind,) * len(names))


def outputs(options, x, scale, bias, slopes, state, arrays, **more):
  if options.get("activation") == "slopes":
    more["activation"] = lambda z: jnp.where(z > 0, z, slopes * z)
  given = {"use_running_average": False, **options, **arrays, **more}
  return jaxbn.batch_norm(x, scale, bias, state, **given)


def gradients(options, x, scale, bias, slopes, state, arrays, **more):
  """Of x, scale, bias and what the activation holds; y and the new state."""

  def loss(*args):
    y, new = outputs(options, *args, state, arrays, **more)
    return jnp.sum(y**3), (y, new)

  return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, scale, bias, slopes)


def arguments(options, put=jnp.asarray, put_channels=jnp.asarray):
  """Static options and arrays, the latter where they are put."""
  arrays = {k: put(v) for k, v in options.items() if isinstance(v, np.ndarray)}
  static = {k: v for k, v in options.items() if k not in arrays}
  state = jaxbn.init(C, momentum=options.get("momentum", 0.9), debias=options.get("debias", False))
  per_channel = np.full(C, 2, np.float32), np.ones(C, np.float32), SLOPES, state
  return static, (put(X), *jax.tree.map(put_channels, per_channel), arrays)


def assert_close(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected
  )


def put_by(mesh, spec):
  """How x, or what broadcasts against it, is sharded."""

  def put(value):
    axes = [axis if n > 1 else None for axis, n in zip(spec, value.shape, strict=False)]
    return jax.device_put(value, NamedSharding(mesh, P(*axes)))

  return put


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_however_x_is_sharded(options):
  static, given = arguments(options)
  expected = jax.jit(functools.partial(gradients, static))(*given)
  for names, spec in SHARDINGS.values():
    mesh = mesh_of(names)
    channels = spec[2] if len(spec) > 2 else None
    for of_state in dict.fromkeys([P(channels), P()]):  # sharded as x's channels, or replicated
      put_channels = functools.partial(jax.device_put, device=NamedSharding(mesh, of_state))
      _, given = arguments(options, put_by(mesh, spec), put_channels)
      # A jit finds the mesh in its arguments.
      assert_close(jax.jit(functools.partial(gradients, static))(*given), expected)


@pytest.mark.parametrize("options", ["plain", "mask", "slopes", "virtual, all"])
def test_eagerly(options):
  static, given = arguments(OPTIONS[options])
  expected = jax.jit(functools.partial(gradients, static))(*given)
  mesh = mesh_of(("d", "m"))
  put_channels = functools.partial(jax.device_put, device=NamedSharding(mesh, P("m")))
  with jax.set_mesh(mesh):
    _, given = arguments(OPTIONS[options], put_by(mesh, P("d", None, "m")), put_channels)
    assert_close(gradients(static, *given), expected)


@pytest.mark.parametrize("options", ["plain", "slopes", "nonfinite skipped", "virtual", "residual"])
def test_vmap_over_a_sharded_axis(options):
  options = {k: v for k, v in OPTIONS[options].items() if k != "residual"}
  static, (x, *rest) = arguments(options)
  many = np.stack([x, 2 * x, x - 1, 3 - x])
  f = jax.jit(jax.vmap(functools.partial(gradients, static), (0, *[None] * len(rest))))
  expected = f(many, *rest)
  mesh = mesh_of(("d",))
  rest = jax.device_put(rest, NamedSharding(mesh, P()))
  with jax.set_mesh(mesh):
    assert_close(f(jax.device_put(many, NamedSharding(mesh, P("d"))), *rest), expected)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("options", ["plain", "mask", "slopes", "virtual", "virtual, all"])
def test_inside_of_a_shard_map_over_one_of_two_axes(options, kind, checked):
  options = OPTIONS[options] | {"momentum": 0.9, "debias": False}
  static, (x, *rest) = arguments(options)

  def loss(mesh, x, *rest):
    specs = P("d"), P(), P(), P(), P(), P("d")
    y = jax.shard_map(
      lambda *args: outputs(static, *args, axis_name="d")[0],
      mesh=mesh,
      in_specs=specs,
      out_specs=P("d"),
      axis_names={"d"},
      check_vma=checked,
    )(x, *rest)
    return jnp.sum(y**3)

  one = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
  expected = jax.jit(jax.value_and_grad(functools.partial(loss, one)))(x, *rest)
  mesh = mesh_of(("d", "m"), kind)
  put = put_by(mesh, P("d", None, "m"))
  x, arrays = put(np.asarray(x)), jax.tree.map(lambda a: put(np.asarray(a)), rest[-1])
  rest = (*jax.device_put(rest[:-1], NamedSharding(mesh, P())), arrays)
  with jax.set_mesh(mesh):
    actual = jax.jit(jax.value_and_grad(functools.partial(loss, mesh)))(x, *rest)
  assert_close(actual, expected)
