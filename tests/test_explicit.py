"""Meshes whose axes are Explicit, as jax.make_mesh makes them: options by how x is sharded.

Each option in a few ways and each way with several options, not all with all: pairs of factors.
"""

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
# How x is sharded, and whether the state is as its channels are; else it is replicated.
BOTH = [("both", True), ("both", False)]
OTHERS = [
  ("examples", False),
  ("channels", True),
  ("examples over both", False),
  ("channels", False),
  ("examples over one", False),
]
CASES = [(name, *way) for i, name in enumerate(OPTIONS) for way in (BOTH[i % 2], OTHERS[i % 5])]


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


@functools.cache
def on_one_device(name):
  static, given = arguments(OPTIONS[name])
  return jax.jit(functools.partial(gradients, static))(*given)


@pytest.mark.parametrize(("name", "sharding", "sharded_state"), CASES)
def test_every_option_however_x_is_sharded(name, sharding, sharded_state):
  names, spec = SHARDINGS[sharding]
  mesh = mesh_of(names)
  of_state = NamedSharding(mesh, P(spec[2]) if sharded_state else P())
  put_channels = functools.partial(jax.device_put, device=of_state)
  static, given = arguments(OPTIONS[name], put_by(mesh, spec), put_channels)
  # A jit finds the mesh in its arguments.
  assert_close(jax.jit(functools.partial(gradients, static))(*given), on_one_device(name))


@pytest.mark.parametrize("options", ["plain", "mask", "slopes", "virtual, all"])
def test_eagerly(options):
  static, _ = arguments(OPTIONS[options])
  mesh = mesh_of(("d", "m"))
  put_channels = functools.partial(jax.device_put, device=NamedSharding(mesh, P("m")))
  with jax.set_mesh(mesh):
    _, given = arguments(OPTIONS[options], put_by(mesh, P("d", None, "m")), put_channels)
    assert_close(gradients(static, *given), on_one_device(options))


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


INSIDE = ["plain", "mask", "slopes", "virtual", "virtual, all"]
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


def loss_inside(static, mesh, checked, x, *rest):
  """By a shard_map over "d" alone."""
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


@functools.cache
def inside_of_one_axis(name):
  static, given = arguments(OPTIONS[name] | {"momentum": 0.9, "debias": False})
  mesh = mesh_of(("d",), AxisType.Auto)
  loss = functools.partial(loss_inside, static, mesh, True)
  return static, given, jax.jit(jax.value_and_grad(loss))(*given)


@pytest.mark.parametrize(
  ("name", "kind", "checked"),
  [(name, kind, (i + j) % 2 == 0) for i, name in enumerate(INSIDE) for j, kind in enumerate(KINDS)],
)
def test_inside_of_a_shard_map_over_one_of_two_axes(name, kind, checked):
  static, (x, *rest), expected = inside_of_one_axis(name)
  mesh = mesh_of(("d", "m"), KINDS[kind])
  put = put_by(mesh, P("d", None, "m"))
  x, arrays = put(np.asarray(x)), jax.tree.map(lambda a: put(np.asarray(a)), rest[-1])
  rest = (*jax.device_put(rest[:-1], NamedSharding(mesh, P())), arrays)
  loss = functools.partial(loss_inside, static, mesh, checked)
  with jax.set_mesh(mesh):
    actual = jax.jit(jax.value_and_grad(loss))(x, *rest)
  assert_close(actual, expected)
