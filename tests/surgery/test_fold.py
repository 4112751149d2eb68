"""jaxbn.surgery.fold: the same outputs by a program without batch norms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

import jaxbn.linen
import jaxbn.nnx
from jaxbn.surgery import fold

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 5, 4))
EPS = 1e-12  # in float64: formulas that differ, differ by more, and rounding by far less
THREE = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}


class Net(nn.Module):
  """What the function makes of x with a class of batch norm."""

  function: object
  norm: type

  @nn.compact
  def __call__(self, x):
    return self.function(x, functools.partial(self.norm, use_running_average=True))


class Block(nn.Module):
  norm: object

  @nn.compact
  def __call__(self, x, _):
    return nn.relu(self.norm()(conv()(x))), None


def conv(width=4, size=3, **options):
  return nn.Conv(width, (size, size), **options)


def before(x, norm):
  """A norm on an input that nothing else reads."""
  return norm()(nn.relu(x))


def called_twice(x, norm):
  layer, norm = conv(), norm()
  return norm(layer(nn.relu(norm(layer(x)))))


def squeeze_and_excite(x, norm):
  x = norm()(conv()(x))
  return x * nn.sigmoid(nn.Dense(4)(x.mean((1, 2), keepdims=True)))


def both_sides(x, norm):
  x = nn.Dropout(0.5, deterministic=True)(nn.Dense(3)(before(x, norm)))
  return norm()(x.transpose(0, 3, 1, 2).reshape(len(x), 3, -1).swapaxes(1, 2))


def vmapped(x, norm):
  members = functools.partial(nn.vmap, Block, **THREE, axis_size=3)
  x = members(in_axes=(None, None))(norm)(x, None)[0]
  return members(in_axes=(0, None))(norm)(x, None)[0]


FOLDED = {
  "with bias": lambda x, norm: nn.relu(norm()(conv()(x))),
  "bare": lambda x, norm: norm(use_scale=False, use_bias=False)(conv(use_bias=False)(x)),
  "strided, depthwise": lambda x, norm: norm()(conv(8, strides=2, feature_group_count=4)(x)),
  "dilated, grouped": lambda x, norm: norm()(conv(6, kernel_dilation=2, feature_group_count=2)(x)),
  "transposed": lambda x, norm: norm()(nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x)),
  "einsum": lambda x, norm: norm(axis=1)(nn.Einsum((4, 3), "bhwc,cd->bdhw")(x)),
  "squeeze and excite": squeeze_and_excite,
  "before, valid": lambda x, norm: conv(3, padding="VALID")(before(x, norm)),
  "before, one by one": lambda x, norm: conv(3, 1)(before(x, norm)),
  "before, grouped": lambda x, norm: conv(6, padding="VALID", feature_group_count=2)(
    before(x, norm)
  ),
  "before, einsum": lambda x, norm: nn.Einsum((3, 4), "bhwc,dc->bdhw")(before(x, norm)),
  "before, flattened": lambda x, norm: nn.Dense(3)(before(x, norm).reshape(len(x), -1)),
  "both sides": both_sides,
  "remat": lambda x, norm: nn.remat(Block)(norm)(x, None)[0],
  "scan": lambda x, norm: nn.scan(Block, **THREE, length=3)(norm)(x, None)[0],
  "vmap": vmapped,
}
LEFT = {
  "zeros around": (lambda x, norm: conv()(before(x, norm)), "puts zeros around"),
  "zeros by hand": (
    lambda x, norm: conv(padding="VALID")(
      jnp.pad(before(x, norm), [(0, 0), (1, 1), (1, 1), (0, 0)])
    ),
    "pad comes after it",
  ),
  "pre-activation": (lambda x, norm: conv()(nn.relu(norm()(x))), "at the input; an activation"),
  "pool": (lambda x, norm: norm()(nn.max_pool(conv()(x), (2, 2))), "behind a pool"),
  "concatenation": (lambda x, norm: norm()(jnp.concatenate([x, conv()(x)], -1)), "concatenation"),
  "sum": (lambda x, norm: norm()(x + conv()(x)), "behind a sum"),
  "another reader": (lambda x, norm: (lambda y: y + norm()(y))(conv()(x)), "another reader"),
  "called twice": (called_twice, "kernel before it has other readers"),
  "another axis": (lambda x, norm: norm(axis=1)(conv()(x)), "not those of the kernel before"),
  "one kernel in a loop": (
    lambda x, norm: nn.scan(
      Block,
      variable_axes={"batch_stats": 0},
      variable_broadcast="params",
      split_rngs={"params": False},
      length=3,
    )(norm)(x, None)[0],
    "same in all turns",
  ),
}


def like(shapes, dtype=None):
  """Values around 1 for a tree of shapes, without the compilation that jax.random takes."""
  values = np.random.default_rng(1)
  return jax.tree.map(
    lambda s: jnp.asarray(values.uniform(0.5, 1.5, s.shape), dtype or s.dtype), shapes
  )


def network(function, norm, dtype=None):
  model = Net(function, norm)
  return model.apply, like(jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(X)), dtype)


def assert_same(function, variables, folded, x):
  with jax.default_matmul_precision("highest"):  # as fold checks it: compiled once for both
    wanted, given = jax.jit(function)(variables, x), folded.function(folded.variables, x)
  for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(given), strict=True):
    np.testing.assert_allclose(b, a, rtol=0, atol=EPS * abs(a).max())


def operations(folded, x):
  return str(jax.make_jaxpr(folded.function)(folded.variables, x))


@pytest.mark.parametrize("name", FOLDED)
def test_batch_norms_of_flax_fold(name):
  check_folds(FOLDED[name], nn.BatchNorm)


@pytest.mark.parametrize("name", ["with bias", "both sides", "scan", "vmap"])
def test_batch_norms_of_jaxbn_fold(name):
  check_folds(FOLDED[name], jaxbn.linen.BatchNorm)


def check_folds(function, norm):
  with jax.enable_x64(True):
    function, variables = network(function, norm, jnp.float64)
    x = jnp.asarray(X)
    folded = fold(function, variables, x, rtol=EPS)
    assert_same(function, variables, folded, x)
    assert not folded.report.left
    assert not any("Norm" in path for path in folded.variables)
    assert {"rsqrt", "sub"}.isdisjoint(operations(folded, x).split())


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_has_its_reason(name):
  function, reason = LEFT[name]
  with pytest.raises(ValueError, match=f"(?s)no batch norm that.*left .*BatchNorm_0: .*{reason}"):
    fold(*network(function, nn.BatchNorm), jnp.asarray(X))


@jax.jit
def by_hand(layer, x):
  """A convolution and a norm of somebody's own, in a call that layers share."""
  y = lax.conv_general_dilated(x, layer["w"], (1, 1), "SAME")
  y = (jnp.broadcast_to(layer["mean"][:, None, None], y.shape) - y) / -jnp.sqrt(
    layer["var"][:, None, None] + 1e-3
  )
  return jax.nn.relu(1 - -y * layer["gamma"][:, None, None])


@pytest.fixture(scope="module")
def hand_made():
  def function(layers, x):
    return by_hand(layers[1], by_hand(layers[0], x))

  channel = jax.ShapeDtypeStruct((4,), jnp.float64)
  with jax.enable_x64(True):
    layer = {"w": jax.ShapeDtypeStruct((4, 4, 3, 3), jnp.float64)}
    variables = like([layer | dict.fromkeys(("mean", "var", "gamma"), channel)] * 2)
    yield function, variables, jnp.asarray(X.transpose(0, 3, 1, 2))


def test_norms_of_peoples_own_fold(hand_made):
  function, variables, x = hand_made
  folded = fold(function, variables, x, rtol=EPS)
  assert_same(function, variables, folded, x)
  assert sorted(folded.variables) == ["0/w", "0/w_bias", "1/w", "1/w_bias"]
  assert repr(folded.report) == "folded 0 into 0/w\nfolded 1 into 1/w"


def whole_batch(layers, x):
  one = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = (jax.P(), jax.P("rows"))
  f = jax.shard_map(by_hand, mesh=one, in_specs=specs, out_specs=specs[1])
  return by_hand(layers[1], f(layers[0], x))


def on_a_device(layers, x):
  return by_hand(layers[0], lax.cond(x.sum() > 0, lambda: by_hand(layers[1], x), lambda: x))


INSIDE = {
  "while": lambda layers, x: lax.while_loop(
    lambda c: c[0] < 3, lambda c: (c[0] + 1, by_hand(layers[1], by_hand(layers[0], c[1]))), (0, x)
  )[1],
  "cond": lambda layers, x: lax.cond(
    x.sum() > 0, lambda: by_hand(layers[0], x), lambda: by_hand(layers[1], x)
  ),
  "cond within": on_a_device,
  "cond that is decided": lambda layers, x: by_hand(
    layers[0],
    lax.cond(False, lambda x: by_hand(layers[1], -x), lambda x: by_hand(layers[1], x), x),
  ),
  "shard_map": whole_batch,
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_inside_folds(hand_made, name):
  _, variables, x = hand_made
  folded = fold(INSIDE[name], variables, x, rtol=EPS)
  assert_same(INSIDE[name], variables, folded, x)
  assert sorted(folded.report.folded) == [("0", "0/w"), ("1", "1/w")]
  assert not folded.report.left
  assert sorted(folded.variables) == ["0/w", "0/w_bias", "1/w", "1/w_bias"]


LEFT_INSIDE = {
  "one kernel in two branches": (
    lambda layers, x: lax.cond(
      x.sum() > 0, lambda: by_hand(layers[0], x), lambda: by_hand(layers[0], -x)
    ),
    "left 0: the kernel before it has other readers",
  ),
  "a norm alone": (
    lambda layers, x: lax.cond(
      x.sum() > 0, lambda y: y * layers[1]["gamma"], jnp.negative, x @ layers[0]["w"][..., 0, 0]
    ),
    "left 1: it stands at the start of a cond: move the kernel before it inside",
  ),
  "by platform": (
    lambda layers, x: lax.platform_dependent(
      x, cpu=lambda x: by_hand(layers[0], x), default=lambda x: by_hand(layers[1], x)
    ),
    "left 0, 1: fold does not look into a choice by platform: fold the function",
  ),
}


@pytest.mark.parametrize("name", LEFT_INSIDE)
def test_what_is_left_inside_has_its_reason(hand_made, name):
  _, variables, x = hand_made
  function, reason = LEFT_INSIDE[name]
  with pytest.raises(ValueError, match=f"(?s)no batch norm that.*{reason}"):
    fold(function, variables, x[..., :4, :4])


def test_what_a_function_closes_over_folds(hand_made):
  function, variables, x = hand_made
  closed = functools.partial(lambda variables, _, x: function(variables, x), variables)
  folded = fold(closed, {}, x, rtol=EPS)
  assert_same(closed, {}, folded, x)
  assert len(folded.report.folded) == 2


def test_a_complex_network_folds_but_not_a_complex_norm_into_a_real_kernel():
  def function(v, x):
    return (x @ v["w"] - v["mean"]) * v["scale"] + v["bias"]

  with jax.enable_x64(True):
    x = jnp.asarray(X[0, 0] + 1j * X[1, 0])
    shapes = {k: jax.ShapeDtypeStruct((4,), x.dtype) for k in ("mean", "scale", "bias")}
    variables = like(shapes | {"w": jax.ShapeDtypeStruct((4, 4), x.dtype)})
    variables = jax.tree.map(lambda v: v * (1 + 0.5j), variables)
    folded = fold(function, variables, x, rtol=EPS)
    assert_same(function, variables, folded, x)
    assert folded.report == ((("scale", "w"),), ())
    with pytest.raises(ValueError, match="no batch norm that fold could put"):
      fold(function, variables | {"w": variables["w"].real}, x.real)


def test_a_mean_alone_folds():
  def function(v, x):
    x = (x @ v["w"] - v["mean"]) + v["bias"]
    return (jax.nn.relu(x) - v["next_mean"]) @ v["next"] + v["bias"]

  with jax.enable_x64(True):
    x = jnp.asarray(X[0, 0])
    names = ("w", "mean", "bias", "next_mean", "next")
    shapes = {k: (4,) if k.endswith(("mean", "bias")) else (4, 4) for k in names}
    variables = like({k: jax.ShapeDtypeStruct(s, x.dtype) for k, s in shapes.items()})
    folded = fold(function, variables, x, rtol=EPS)
    assert_same(function, variables, folded, x)
    assert folded.report == ((("mean, bias", "w"), ("next_mean, bias", "next")), ())
    assert sorted(folded.variables) == ["next", "next_bias", "w", "w_bias"]


class Nnx(nnx.Module):
  def __init__(self, norm, rngs):
    self.layers = nnx.List([nnx.Conv(4, 3, (3, 3), rngs=rngs), norm(3, rngs=rngs)])
    self.named = nnx.Dict(head=nnx.Linear(3, 2, rngs=rngs), dropout=nnx.Dropout(0.5))

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return self.named["head"](self.named["dropout"](nnx.relu(x)).mean((1, 2)))


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm], ids=lambda n: n.__module__)
def test_an_exported_program_takes_any_batch(norm):
  model = nnx.eval_shape(lambda: Nnx(norm, nnx.Rngs(0)))
  model.eval()
  graphdef, shapes = nnx.split(model)
  state = like(shapes)

  def function(state, x):
    return nnx.merge(graphdef, state)(x)

  folded = fold(function, state, jnp.asarray(X[:1], jnp.float32))
  assert folded.report == ((("layers/1", "layers/0/kernel"),), ())
  shape = export.symbolic_shape("batch, side, side, 4")
  specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), folded.variables)
  exported = export.export(folded.function)(specs, jax.ShapeDtypeStruct(shape, jnp.float32))
  x = jnp.asarray(RNG.normal(size=(3, 7, 7, 4)), jnp.float32)
  given = export.deserialize(exported.serialize()).call(folded.variables, x)
  np.testing.assert_allclose(given, function(state, x), rtol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm])
def test_bfloat16_folds_to_its_digits(norm):
  def function(x, norm):
    return norm(dtype=jnp.bfloat16)(conv(dtype=jnp.bfloat16)(x))

  function, variables = network(function, norm)
  folded = fold(function, variables, jnp.asarray(X, jnp.bfloat16))
  wanted = jax.jit(function)(variables, jnp.asarray(X, jnp.float32))
  given = folded.function(folded.variables, jnp.asarray(X, jnp.bfloat16))
  assert given.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.float32(given), np.float32(wanted), atol=4 * 2**-8 * np.abs(np.float32(wanted)).max()
  )


@pytest.mark.optimized
def test_a_folded_program_has_fewer_kernels_and_moves_fewer_bytes():
  function, variables = network(FOLDED["with bias"], nn.BatchNorm)
  x = jnp.asarray(X, jnp.float32)
  folded = fold(function, variables, x)
  before = jax.jit(function).lower(variables, x).compile()
  after = folded.function.lower(folded.variables, x).compile()
  kernels = [c.as_text().count(" fusion(") for c in (before, after)]
  bytes_moved = [c.cost_analysis()["bytes accessed"] for c in (before, after)]
  assert kernels[1] < kernels[0]
  assert bytes_moved[1] < bytes_moved[0]


def changed(variables, **changes):
  """With other values in the norm, or in another layer, as Conv_0_bias."""

  def value(path, a):
    layer, name = (key.key for key in path[-2:])
    name = name if layer == "BatchNorm_0" else f"{layer}_{name}"
    return jnp.full_like(a, changes[name]) if name in changes else a

  return jax.tree_util.tree_map_with_path(value, variables)


FAR = {"Conv_0_bias": 1e4, "mean": 1e4}


@pytest.fixture(scope="module")
def plain():
  function, variables = network(FOLDED["with bias"], nn.BatchNorm)
  return function, variables, jnp.asarray(X, jnp.float32)


def test_a_scale_of_zero_and_statistics_never_updated_fold(plain):
  function, variables, x = plain
  folded = fold(function, changed(variables, mean=0, var=1, scale=0), x)
  assert not folded.variables["params/Conv_0/kernel"].any()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mean": np.nan}, "NaN or infinity for BatchNorm_0, folded into params/Conv_0/kernel: look"),
    (FAR, r"differs from the original by .* BatchNorm_0 alone makes .* or give rtol=.e"),
  ],
)
def test_what_is_wrong_is_said_with_the_layer(plain, changes, message):
  function, variables, x = plain
  with pytest.raises(ValueError, match=message):
    fold(function, changed(variables, **changes), x)


def test_the_mend_of_a_difference_works(plain):
  function, variables, x = plain
  far = changed(variables, **FAR)
  with pytest.raises(ValueError, match="rtol=") as error:
    fold(function, far, x)
  rtol = float(str(error.value).split("rtol=")[1].split()[0])
  assert fold(function, far, x, rtol=rtol).report.folded


def test_wrong_arguments_are_refused(plain):
  function, variables, x = plain
  with pytest.raises(ValueError, match="NaN or infinity for the example"):
    fold(function, variables, x.at[0].set(jnp.nan))
  with pytest.raises(TypeError, match="variables has 'nhwc' at 'layout', but must hold arrays"):
    fold(lambda v, x: function(v["all"], x), {"all": variables, "layout": "nhwc"}, x)
  with pytest.raises(ValueError, match=r"BatchNorm_0.* Give all collections, as init makes them"):
    fold(function, {"params": variables["params"]}, x)
  with pytest.raises(TypeError, match="call fold outside of jit"):
    jax.jit(lambda v: fold(function, v, x).variables)(variables)
  folded = fold(function, variables, x)
  with pytest.raises(ValueError, match="variables has no 'params/Conv_0/kernel', but"):
    folded.function({}, x)
