"""keep="output": the same function, with y in the place of x for its derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests import bounds, layers, oracle
from tests.test_activation import deep, kept
from tests.test_devices import all_reduces, spread

SLOPE = 0.2
LEAKY = functools.partial(jax.nn.leaky_relu, negative_slope=SLOPE)
SHAPE = (24, 3)


def inputs(shape=SHAPE, seed=0):
  """x, scale (of both signs, away from 0), bias and a cotangent, in float32."""
  rng = np.random.default_rng(seed)
  x, cotangent = rng.normal(1, 2, (2, *shape)).astype(np.float32)
  scale = np.where(np.arange(shape[-1]) % 2, -1, 1) * rng.uniform(0.5, 2, shape[-1])
  return x, scale.astype(np.float32), rng.normal(size=shape[-1]).astype(np.float32), cotangent


def counted(kind, shape=SHAPE):
  rng = np.random.default_rng(1)
  weights = np.where(rng.random(shape) < 0.8, rng.uniform(0.5, 2, shape), 0).astype(np.float32)
  options = {"mask": rng.random(shape) < 0.7, "weights": weights}
  return {k: v for k, v in options.items() if kind in (k, "both")}


def layer(x, scale, bias, state=None, keep="output", activation=LEAKY, **options):
  options = {"use_running_average": False, "activation": activation, "keep": keep, **options}
  return jaxbn.batch_norm(x, scale, bias, state, **options)


def gradients(given, cotangent, valid, **options):
  """Of sum(cotangent * y) over what exists, of x, scale and bias."""

  @jax.jit
  def gradient(*given):
    def loss(*given):
      return jnp.sum(jnp.where(valid, cotangent * layer(*given, **options)[0], 0))

    return jax.grad(loss, (0, 1, 2))(*given)

  return gradient(*given)


def bounds_of_recovering(x, scale, bias, cotangent, dtype, **options):
  """What it adds to bounds.gradients that x is computed back from y, of that dtype.

  Before the activation y is a = c + bias, with c = scale z. y holds it to its rounding and 6 u of
  |c| + |a| (the products and the sum, each rounded); an activation that multiplies, and its
  inverse, cost 2 u |a|; subtracting the bias and dividing 3 u |c|. So z is recovered to

    e_y = (roundoff(dtype) + 11 u) (2 |z| + |bias / scale|)

  and takes part as e_z does in bounds.gradients, in products of two such too, for y may be in half
  precision, as x's gradient then is.
  """
  u = bounds.roundoff(np.float32)
  exact = oracle.gradients(x, scale, cotangent, **options)
  w = oracle.weights_of(x, **options)
  stats = oracle.moments(x, **options)
  r = 1 / np.sqrt(stats.var + 1e-5)
  z = np.abs(np.where(w > 0, oracle.normalize(x, stats.mean, stats.var), 0))
  g = np.where(w > 0, np.abs(cotangent), 0)
  e_y = (bounds.roundoff(dtype) + 11 * u) * (2 * z + np.abs(bias / oracle.wide(scale)))
  of_sum = (g * e_y).sum(0)
  d_x = np.abs(scale) * r * w / w.sum(0) * (e_y * np.abs(exact.scale) + (z + e_y) * of_sum)
  return oracle.Gradients(d_x + bounds.rounding(exact.x, dtype), of_sum, 0)


@pytest.mark.parametrize(
  ("kind", "activation"),
  [("plain", None), ("plain", LEAKY), ("weights", LEAKY), ("both", LEAKY)],
  ids=["none", "leaky_relu", "weights", "mask and weights"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_as_near_as_y_tells(dtype, kind, activation):
  x, scale, bias, cotangent = inputs()
  x, cotangent = jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype)
  options = counted(kind)
  valid = oracle.weights_of(x, **options) > 0
  static = {"activation": activation, "dtype": dtype}
  actual = gradients((x, scale, bias, jaxbn.init(3)), cotangent, valid, **static, **options)
  assert [v.dtype for v in actual] == [dtype, jnp.float32, jnp.float32]
  x, g = (np.asarray(a, np.float32) for a in (x, cotangent))
  if activation is not None:
    g = g * np.where(oracle.batch_norm(x, scale, bias, **options) < 0, SLOPE, 1)
  right = oracle.gradients(x, scale, g, **options)
  # bfloat16 takes its sums around 0 where there is a state.
  pivot = 0.0 if dtype == jnp.bfloat16 else None
  bound = bounds.gradients(x, scale, g, pivot=pivot, **options)
  more = bounds_of_recovering(x, scale, bias, g, dtype, **options)
  for one, expected, *allowed in zip(actual, right, bound, more, strict=True):
    bounds.assert_within(np.asarray(one, np.float32), expected, sum(allowed))


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("evaluating", [False, True], ids=["training", "evaluation"])
def test_values_are_the_same_bits(evaluating, dtype, kind):
  x, scale, bias, _ = inputs()
  options = {"use_running_average": evaluating, "dtype": dtype, **counted(kind)}
  options |= {"masked_value": 7.0} if kind == "both" else {}

  @functools.partial(jax.jit, static_argnums=0)
  def run(keep, x):
    return layer(x, scale, bias, jaxbn.init(3), keep, **options)

  x = jnp.asarray(x, dtype)
  jax.tree.map(np.testing.assert_array_equal, run("output", x), run("input", x))


# In float64, where rounding and a wrong formula cannot be taken for each other: keeping the input,
# of which the other tests say that it is right, is the reference.


def assert_close(actual, expected, close=1e-9):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=close, atol=close), actual, expected
  )


def small():
  """x, scale, bias, state, all in float64, of six elements."""
  x, scale, bias, _ = inputs((6, 2))
  state = jaxbn.RunningStats(jnp.array([0.5, 1.0]), jnp.array([2.0, 0.5]))
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, scale, bias, state))


def loss_of(f):
  """Of f's outputs and new state, each element with a weight of its own."""

  def loss(*given):
    return sum(
      jnp.sum(jnp.sin(leaf + jnp.arange(leaf.size).reshape(leaf.shape)))
      for leaf in jax.tree.leaves(f(*given))
    )

  return loss


def over_devices(f):
  """f of a third of the rows each, with the axis that layer synchronizes over."""

  def whole(x, *rest):
    shared = functools.partial(f, axis_name="batch")
    shards = jax.vmap(lambda x: shared(x, *rest), axis_name="batch", out_axes=(0, None))
    y, state = shards(x.reshape(3, -1, x.shape[-1]))
    return y.reshape(x.shape), state

  return whole


def scanned(f):
  def network(x, *rest):
    return jax.lax.scan(lambda x, _: f(x, *rest), x, None, length=2)

  return network


WAYS = {
  "alone": lambda f: f,
  "remat": jax.checkpoint,
  "scan": scanned,
  "vmap over x": lambda f: (
    lambda x, *rest: jax.vmap(lambda x: f(x, *rest))(jnp.stack([x, 2 * x - 1]))
  ),
  "vmap over parameters": lambda f: (
    lambda x, *rest: jax.vmap(lambda *p: f(x, *p))(
      *jax.tree.map(lambda a: jnp.stack([a, 2 * a]), rest)
    )
  ),
  "synchronized": over_devices,
  # Staged on each device: JAX cannot differentiate what is staged around vmap (see batch_norm).
  "synchronized remat": lambda f: over_devices(
    lambda *a, **k: jax.checkpoint(functools.partial(f, **k))(*a)
  ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_in_every_way_of_jax(way):
  with jax.enable_x64(True):
    given = small()

    def gradient(keep):
      loss = loss_of(WAYS[way](functools.partial(layer, keep=keep)))
      return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*given)

    assert_close(gradient("output"), gradient("input"))


@pytest.mark.parametrize("way", ["alone", "synchronized"])
def test_second_derivatives_and_the_linear_part_alone(way):
  with jax.enable_x64(True):
    given = small()[:3]
    tangents = jax.tree.map(jnp.cos, given)

    def derivatives(keep):
      loss = loss_of(WAYS[way](functools.partial(layer, state=None, keep=keep)))

      @jax.jit
      def of(*p):
        _, linear = jax.linearize(jax.grad(loss, (0, 1, 2)), *p)
        return linear(*tangents), jax.hessian(loss, 2)(*p)

      return of(*given)

    assert_close(derivatives("output"), derivatives("input"), 1e-8)


@pytest.mark.parametrize(
  ("kind", "synchronized"), [("mask", False), ("weights", False), ("mask", True), ("both", True)]
)
def test_masks_weights_and_what_masked_positions_hold(kind, synchronized):
  with jax.enable_x64(True):
    x, scale, bias, state = small()
    options = counted(kind, x.shape)
    valid = oracle.weights_of(x, **options) > 0
    x = jnp.where(valid, x, jnp.nan)
    weights = jnp.asarray(options.pop("weights", np.ones(x.shape)), jnp.float64)

    def derivatives(keep):
      def f(x, weights, mask, scale, bias, state):
        given = {"weights": weights} if kind != "mask" else {}
        given |= {"mask": mask} if kind != "weights" else {}
        given |= {"axis_name": "batch"} if synchronized else {}
        return layer(x, scale, bias, state, keep, masked_value=2.0, **given)

      def whole(x, weights, scale, bias, state):
        mask = jnp.asarray(options.get("mask", valid))
        if not synchronized:
          return f(x, weights, mask, scale, bias, state)
        shards = [a.reshape(3, 2, 2) for a in (x, weights, mask)]
        shared = jax.vmap(f, (0, 0, 0, None, None, None), out_axes=(0, None), axis_name="batch")
        return shared(*shards, scale, bias, state)

      gradient = jax.grad(loss_of(whole), (0, 1, 2, 3, 4))
      return jax.jit(gradient)(x, weights, scale, bias, state)

    actual = derivatives("output")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))
    assert_close(actual, derivatives("input"))


# Devices


def spread_gradient(how, keep, masked):
  """The gradients of the loss over eight devices, and their arguments."""
  x, scale, bias, cotangent = inputs((32, 3))
  mask = counted("mask", x.shape)["mask"] if masked else None
  valid = True if mask is None else mask

  def local(x, mask, scale, bias, state):
    return layer(x, scale, bias, state, keep, mask=mask, axis_name="batch")

  whole = spread(how, 8, local)

  def gradient(x, scale, bias, state):
    def loss(x, scale, bias):
      y, new_state = whole(x, mask, scale, bias, state)
      return jnp.sum(jnp.where(valid, cotangent * y, 0)), (y, new_state)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)

  return jax.jit(gradient), (x, scale, bias, jaxbn.init(3))


@pytest.mark.optimized
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_devices_share_one_all_reduce_forward_and_one_backward(how, masked):
  gradient, given = spread_gradient(how, "output", masked)
  # As traced there are more, for the parameters' gradients: the compiler joins them.
  assert len(all_reduces(gradient.lower(*given))[0]) == 2
  actual, (y, _) = gradient(*given)
  x, scale, bias, _ = given
  options = {"mask": counted("mask", x.shape)["mask"]} if masked else {}
  valid = oracle.weights_of(x, **options) > 0
  *_, cotangent = inputs((32, 3))
  before = oracle.batch_norm(x, scale, bias, **options)
  slope = np.where(before < 0, SLOPE, 1)
  around = {"pivot": np.zeros(3), **options}
  bounds.assert_within(y, slope * before, slope * bounds.output(x, scale, bias, **around), valid)
  g = cotangent * slope
  right = oracle.gradients(x, scale, g, **options)
  bound = bounds.gradients(x, scale, g, **around)
  more = bounds_of_recovering(x, scale, bias, g, np.float32, **options)
  for one, expected, *allowed in zip(actual, right, bound, more, strict=True):
    bounds.assert_within(one, expected, sum(allowed))


# Memory


@pytest.mark.parametrize("activation", [None, LEAKY], ids=["none", "leaky_relu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_of_x_s_size_only_y_is_kept(dtype, activation):
  # Told apart by their dtypes.
  of_x = "float32" if dtype == "bfloat16" else "bfloat16"
  x = jnp.asarray(inputs()[0], of_x)

  def f(keep, x):
    return layer(x, jnp.ones(3), None, keep=keep, activation=activation, dtype=dtype)[0]

  assert kept(functools.partial(f, "output"), x) == [(dtype, 1)]
  assert kept(functools.partial(f, "input"), x) == [(of_x, 1)]


def test_it_is_y_itself_that_is_kept_and_of_a_scan_one_per_layer():
  x = jnp.asarray(inputs()[0])
  f = functools.partial(layer, scale=None, bias=None)
  y, pullback = jax.vjp(lambda x: f(x)[0], x)
  (leaf,) = (a for a in jax.tree.leaves(pullback) if a.size == x.size)
  np.testing.assert_array_equal(leaf, y)
  assert kept(deep(lambda x: f(x)[0]), x.astype(jnp.bfloat16)) == [("bfloat16", 5)]


# What cannot be undone


@pytest.mark.parametrize(
  ("message", "options"),
  [
    ("'input' or its 'output'", {"keep": "both"}),
    ("'input' or its 'output'", {"keep": None}),
    ("with a residual", {"residual": np.ones(SHAPE, np.float32)}),
    ("with detach_stats", {"detach_stats": True}),
    ("a scale that holds 0", {"scale": np.float32([1, 0, 1])}),
    ("cannot be undone", {"activation": jax.nn.relu}),
    ("cannot be undone", {"activation": jax.nn.silu}),
    ("cannot be undone", {"activation": functools.partial(jax.nn.leaky_relu, negative_slope=0.0)}),
    ("cannot be undone", {"activation": functools.partial(jax.nn.leaky_relu, negative_slope=-1)}),
    ("cannot be undone", {"activation": functools.partial(jax.nn.elu, alpha=1.0)}),
    ("cannot be undone", {"activation": lambda y: jax.nn.leaky_relu(y)}),
  ],
)
def test_what_is_refused(message, options):
  x, scale, bias, _ = inputs()
  options = {"keep": "output", "scale": scale, "activation": None, **options}
  with pytest.raises(ValueError, match=message):
    jaxbn.batch_norm(x, bias=bias, use_running_average=False, **options)


@pytest.mark.parametrize("activation", [jax.nn.leaky_relu, functools.partial(jax.nn.leaky_relu)])
def test_the_usual_slope_needs_no_partial(activation):
  with jax.enable_x64(True):
    given = small()[:3]

    def gradient(keep):
      f = functools.partial(layer, keep=keep, activation=activation)
      return jax.jit(jax.grad(loss_of(f), (0, 1, 2)))(*given)

    assert_close(gradient("output"), gradient("input"))


def test_a_traced_scale_of_zero_makes_its_channel_s_gradients_nan_and_no_other():
  x, scale, bias, cotangent = inputs()
  scale[1] = 0
  d_x, d_scale, d_bias = gradients((x, scale, bias), cotangent, True)
  assert np.isnan(d_scale).tolist() == [False, True, False]
  assert np.isnan(d_x).any(0).tolist() == [False, True, False]
  assert np.isfinite(d_bias).all()


# Layers


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_layers_hand_on_what_is_kept(kind):
  x = jnp.asarray(inputs()[0])
  make = {"linen": (layers.linen, jaxbn.linen), "nnx": (layers.of_nnx, jaxbn.nnx)}[kind]
  layer = make[0](make[1].BatchNorm, x, activation=LEAKY, keep="output", dtype=jnp.bfloat16)
  y, _ = layer.call(layer.state, x)
  options = {"use_running_average": False, "activation": LEAKY, "dtype": jnp.bfloat16}
  expected, _ = jaxbn.batch_norm(x, layer.state["scale"], layer.state["bias"], **options)
  np.testing.assert_array_equal(y, expected)
  assert kept(lambda x: layer.call(layer.state, x)[0], x) == [("bfloat16", 1)]
  with pytest.raises(ValueError, match="with a residual"):
    layer.call(layer.state, x, residual=x)
