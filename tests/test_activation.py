"""activation= and residual=: the same as outside of the layer, for the memory of x alone."""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests import bounds, layers, oracle

LEAKY = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)
ACTIVATIONS = {
  "none": None,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "gelu": jax.nn.gelu,
  "tanh": jnp.tanh,
  "leaky_relu": LEAKY,
}
SHAPE, CHANNELS = (12, 3), 3
STATE = jaxbn.RunningStats(jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 0.5, 4.0]))
# In float64, rounding (1e-16, times a condition number below 1e3) and a wrong formula (1e-3) cannot
# be taken for each other.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def inputs(shape=SHAPE, seed=0):
  """x, scale, bias, residual and a cotangent, in float64."""
  rng = np.random.default_rng(seed)
  x, residual, cotangent = rng.normal(1, 2, (3, *shape))
  return x, rng.normal(1, 0.5, shape[-1]), rng.normal(size=shape[-1]), residual, cotangent


def counted(kind):
  rng = np.random.default_rng(1)
  mask, weights = rng.random(SHAPE) < 0.7, rng.uniform(0.5, 2, SHAPE)
  return {
    "plain": {},
    "mask": {"mask": mask},
    "all": {"mask": mask[::-1], "weights": np.where(mask, weights, 0), "masked_value": -3.0},
  }[kind]


def assert_close(actual, expected, **close):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close or CLOSE), actual, expected)


# Inside and outside


def outside(activation, x, scale, bias, residual, state, evaluating, masked_value, **options):
  """The formula as in textbooks, of elements with weights; then what the layer takes in."""
  w = oracle.weights_of(x, **options)
  n = w.sum(0)
  mean = (w * x).sum(0) / n
  var = (w * (x - mean) ** 2).sum(0) / n
  if evaluating:
    new_state = mean, var = state[:2]
  else:
    new_state = (0.9 * old + 0.1 * new for old, new in zip(state, (mean, var), strict=False))
  y = activation((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias + residual)
  return (y if masked_value is None else jnp.where(w > 0, y, masked_value)), tuple(new_state)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_inside_is_outside_in_values_and_gradients(kind, mode):
  with jax.enable_x64(True):
    *given, cotangent = inputs()
    evaluating, options = mode == "evaluation", counted(kind)
    masked_value = options.pop("masked_value", None)
    old = jax.tree.map(lambda a: a.astype(jnp.float64), STATE)

    def inside(*given):
      activation, *given, residual = given
      y, state = jaxbn.batch_norm(
        *(*given, old),
        use_running_average=evaluating,
        momentum=0.9,
        activation=activation,
        residual=residual,
        masked_value=masked_value,
        **options,
      )
      return y, (state.mean, state.var)

    # One program for all activations.
    @functools.partial(jax.jit, static_argnums=0)
    def gradients(f, which, *given):
      def activation(y):
        return jax.lax.switch(which, [a or (lambda y: y) for a in ACTIVATIONS.values()], y)

      def loss(x, scale, bias, residual):
        y, (mean, var) = f(activation, x, scale, bias, residual)
        return jnp.sum(cotangent * y) + jnp.sum(var * jnp.sin(mean)), (y, mean, var)

      return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*given)

    outer = functools.partial(
      outside, state=old, evaluating=evaluating, masked_value=masked_value, **options
    )
    for i in range(len(ACTIVATIONS)):
      assert_close(gradients(inside, i, *given), gradients(outer, i, *given))


def test_the_activation_and_the_residual_are_those_of_the_oracle():
  x, scale, bias, residual, _ = (np.asarray(a, np.float32) for a in inputs())
  y, _ = jaxbn.batch_norm(
    *(x, scale, bias), use_running_average=False, activation=jnp.square, residual=residual
  )
  before = oracle.batch_norm(x, scale, bias) + residual
  # Of x, then one more sum, and the derivative of the square.
  u = bounds.roundoff(np.float32)
  bound = bounds.output(x, scale, bias) + u * np.abs(before)
  bounds.assert_within(y, before**2, 2 * np.abs(before) * bound + 3 * u * before**2)


PICKY = {  # of these, the derivative or the value is not finite somewhere
  "silu": jax.nn.silu,
  "tanh": jnp.tanh,
  "gelu": jax.nn.gelu,
  "log": lambda z: jnp.log(z + 30),
  "where": lambda z: jnp.where(z > 0, z, 0),
}


@pytest.mark.parametrize(
  ("kind", "shared", "evaluating"),
  [  # Pairs: each activation in both modes, and with parameters that are shared and that are not.
    (kind, shared, shared == (i % 2 == 0))
    for i, kind in enumerate(PICKY)
    for shared in (True, False)
  ],
)
def test_masked_garbage_reaches_nothing_through_an_activation(kind, shared, evaluating):
  activation = PICKY[kind]
  *given, cotangent = (jnp.asarray(a, jnp.float32) for a in inputs())
  mask = jnp.asarray(counted("mask")["mask"]).at[2].set(False)
  names = ["x", "residual"]
  if not shared:  # a scale and a bias for each example, of which the third is masked as a whole
    given[1], given[2] = (jnp.tile(v, (SHAPE[0], 1)) for v in given[1:3])
    names = ["x", "scale", "bias", "residual"]

  def loss(x, scale, bias, residual, masked_value=None):
    y, _ = jaxbn.batch_norm(
      *(x, scale, bias, STATE),
      use_running_average=evaluating,
      mask=mask,
      masked_value=masked_value,
      activation=activation,
      residual=residual,
    )
    return jnp.sum(jnp.where(mask, cotangent * y, 0))

  f = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), static_argnums=4)
  for masked_value in (None, 0.0):
    expected = f(*given, masked_value)
    for garbage in (np.nan, np.inf, 3e38):
      for name in names:
        dirty = dict(zip(("x", "scale", "bias", "residual"), given, strict=True))
        valid = mask if name in ("x", "residual") else mask.any(-1, keepdims=True)
        dirty[name] = jnp.where(valid, dirty[name], garbage)
        assert_close(f(*dirty.values(), masked_value), expected, rtol=1e-6, atol=1e-6)


def test_masked_statistics_of_an_example_reach_nothing():
  x, scale, bias, residual, cotangent = (jnp.asarray(a, jnp.float32) for a in inputs())
  mask = jnp.ones(SHAPE, bool).at[2].set(False)
  mean, var = jnp.tile(STATE.mean, (SHAPE[0], 1)), jnp.tile(STATE.var, (SHAPE[0], 1))

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4))
  def f(x, mean, var, scale, bias):
    options = {"mask": mask, "activation": jnp.tanh, "residual": residual}
    y = jaxbn.normalize(x, mean, var, scale, bias, **options)
    return jnp.sum(jnp.where(mask, cotangent * y, 0))

  expected = f(x, mean, var, scale, bias)
  for garbage in (np.nan, np.inf):
    assert_close(f(x, mean.at[2].set(garbage), var, scale, bias), expected, rtol=1e-6, atol=1e-6)
    assert_close(f(x, mean, var.at[2].set(garbage), scale, bias), expected, rtol=1e-6, atol=1e-6)


def test_where_the_mean_stands_in_for_x_it_does_in_derivatives():
  # In masked positions that are not finite and that the loss reads all the same.
  with jax.enable_x64(True):
    x, *given, cotangent = map(jnp.asarray, inputs())
    mask = counted("all")["mask"]
    x = jnp.where(mask, x, jnp.nan)

    def inside(x, scale, bias, residual):
      options = {"mask": mask, "activation": jax.nn.silu, "residual": residual}
      return jaxbn.batch_norm(x, scale, bias, use_running_average=False, **options)[0]

    def filled(x, scale, bias, residual):
      valid, n = jnp.where(mask, x, 0), mask.sum(0)
      mean = valid.sum(0) / n
      var = (jnp.where(mask, valid - mean, 0) ** 2).sum(0) / n
      centered = jnp.where(mask, valid - mean, 0)
      return jax.nn.silu(centered / jnp.sqrt(var + 1e-5) * scale + bias + residual)

    def gradient(f):
      loss = lambda *p: jnp.sum(cotangent * f(*p))  # noqa: E731
      return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, *given)

    assert_close(gradient(inside), gradient(filled))


# Derivatives beyond the first


def textbook(x, scale, bias, residual, detached, activation):
  mean, var = x.mean(0), x.var(0)
  mean, var = jax.lax.stop_gradient((mean, var)) if detached else (mean, var)
  return activation((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias + residual)


@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.softmax], ids=["silu", "softmax"])
def test_first_and_second_derivatives_are_those_of_the_textbook(activation, detached):
  # softmax keeps the shape, but mixes elements: it is differentiated right all the same.
  with jax.enable_x64(True):
    *given, cotangent = map(jnp.asarray, inputs((6, 2)))

    def layer(x, scale, bias, residual):
      options = {"activation": activation, "residual": residual, "detach_stats": detached}
      return jaxbn.batch_norm(x, scale, bias, use_running_average=False, **options)[0]

    def derivatives(f):
      gradient = jax.grad(lambda *p: jnp.sum(cotangent * jnp.sin(f(*p))), (0, 1, 2, 3))
      return jax.jit(lambda *p: jax.jvp(gradient, p, tuple(map(jnp.cos, p))))(*given)

    formula = functools.partial(textbook, detached=detached, activation=activation)
    assert_close(derivatives(layer), derivatives(formula), rtol=1e-9, atol=1e-9)


# Rounding


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["none", "silu", "tanh"])
def test_half_precision_is_rounded_once_after_the_activation(name, dtype):
  # To half a unit of y, which a sum rounded before the activation is not: where the residual
  # cancels, or the activation's slope is above |y|, that is off by more.
  activation = ACTIVATIONS[name] or (lambda y: y)
  x, scale, bias, residual, _ = inputs((512, 3))
  x, residual = (np.asarray(jnp.asarray(a, dtype)) for a in (x, residual))
  scale, bias = np.float32(scale), np.float32(bias)
  mean, var = np.float32([1, 0.5, 2]), np.float32([4, 3, 5])
  options = {"activation": ACTIVATIONS[name], "residual": residual, "dtype": dtype}
  y = jaxbn.normalize(x, mean, var, scale, bias, **options)
  assert y.dtype == dtype
  scaled = oracle.normalize(x, mean, var, scale)
  before = scaled + bias + oracle.wide(residual)
  with jax.enable_x64(True):
    expected = np.asarray(activation(jnp.asarray(before)))
  # All slopes are below 1.1; the activations themselves are good to 4 units (their exponentials).
  u = bounds.roundoff(np.float32)
  single = 9 * np.abs(scaled) + np.abs(scaled + bias) + np.abs(before) + np.abs(bias)
  single = 1.1 * u * single + 8 * u * np.abs(expected)
  smallest = float(jnp.finfo(dtype).smallest_subnormal) / 2
  unit = bounds.roundoff(dtype)
  bounds.assert_within(y, expected, unit * np.abs(expected) + smallest + single * (1 + unit))


def test_half_precision_gradients_are_rounded_once_and_in_each_argument_s_dtype():
  *given, cotangent = inputs((64, 3))
  half = [jnp.asarray(given[i], jnp.bfloat16) for i in (0, 3)]
  scale, bias = (jnp.asarray(a, jnp.float32) for a in given[1:3])

  @jax.jit
  def gradient(x, scale, bias, residual):
    def loss(x, scale, bias, residual):
      y, _ = jaxbn.batch_norm(
        *(x, scale, bias, jaxbn.init(3)),
        use_running_average=False,
        activation=jax.nn.silu,
        residual=residual,
      )
      return jnp.sum(y * cotangent.astype(np.float32))

    return jax.grad(loss, (0, 1, 2, 3))(x, scale, bias, residual)

  rounded = gradient(half[0], scale, bias, half[1])
  assert [g.dtype.name for g in rounded] == ["bfloat16", "float32", "float32", "bfloat16"]
  full = gradient(half[0].astype(jnp.float32), scale, bias, half[1].astype(jnp.float32))
  # Half a unit of bfloat16, and float32's rounding: sums of 64 of order one, around a pivot or 0.
  tolerance = 100 * bounds.roundoff(np.float32)
  for one, exact in zip(rounded, full, strict=True):
    unit = bounds.roundoff(one.dtype)
    exact = oracle.wide(exact)
    size = np.abs(exact) + np.sqrt(np.mean(exact**2))
    bounds.assert_within(one, exact, unit * np.abs(exact) + tolerance * size)


@pytest.mark.parametrize(
  ("x", "scale", "residual", "asked", "expected"),
  [
    ("bfloat16", None, "bfloat16", None, "bfloat16"),
    ("bfloat16", None, "float32", None, "float32"),
    ("bfloat16", "float32", "bfloat16", None, "float32"),
    ("bfloat16", "float32", "float32", "bfloat16", "bfloat16"),
    ("bfloat16", None, "float16", None, "float32"),
    ("float32", None, "bfloat16", None, "float32"),
    ("float16", None, "float16", "float32", "float32"),
    ("float32", None, "complex64", None, "complex64"),
  ],
)
def test_the_residual_takes_part_in_the_result_s_dtype(x, scale, residual, asked, expected):
  values = inputs()
  scale = None if scale is None else jnp.asarray(values[1], scale)

  def values_and_gradients(x, residual):
    def layer(x, residual):
      options = {"activation": jnp.tanh, "residual": residual, "dtype": asked}
      return jaxbn.batch_norm(x, scale, use_running_average=False, **options)[0]

    y, pullback = jax.vjp(layer, x, residual)
    return y, *pullback(jnp.ones_like(y))

  given = jnp.asarray(values[0], x), jnp.asarray(values[3], residual)
  dtypes = [a.dtype.name for a in jax.eval_shape(values_and_gradients, *given)]
  assert dtypes == [expected, x, residual]


# Memory


def kept(f, *given):
  """The dtypes, and sizes in x's, of the arrays that the derivative keeps, small ones left out."""
  size = given[0].size
  leaves = jax.eval_shape(lambda *g: jax.tree.leaves(jax.vjp(f, *g)[1]), *given)
  return sorted((a.dtype.name, a.size // size) for a in leaves if a.size >= size)


def block(x, *residual, **options):
  residual = residual[0] if residual else None
  y, _ = jaxbn.batch_norm(
    x, jnp.ones(3, x.dtype), use_running_average=False, residual=residual, **options
  )
  return y


def deep(layer, depth=5):
  def network(x):
    return jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=depth)[0]

  return network


@pytest.mark.parametrize("staged", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["none", "relu", "silu"])
def test_of_x_s_size_only_x_is_kept(name, dtype, staged):
  x = jnp.asarray(inputs()[0], dtype)
  stage = jax.jit if staged else lambda f: f
  activation = ACTIVATIONS[name]
  alone = stage(functools.partial(block, activation=activation))
  assert kept(alone, x) == [(dtype, 1)]
  evaluated = functools.partial(
    jaxbn.normalize, mean=STATE.mean, var=STATE.var, activation=activation, dtype=dtype
  )
  assert kept(stage(lambda x: evaluated(x)), x) == [(dtype, 1)]
  # A sum needs nothing for its derivative; an activation needs where it was taken.
  assert kept(alone, x, x[::-1]) == [(dtype, 1)] * (1 if activation is None else 2)


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_a_scan_over_layers_keeps_their_inputs_only(name):
  x = jnp.asarray(inputs()[0], jnp.bfloat16)
  layer = functools.partial(block, activation=ACTIVATIONS[name])
  assert kept(deep(layer), x) == [("bfloat16", 5)]


def test_outside_of_the_layer_more_is_kept():
  # What the tests above would look like if they could not fail.
  x = jnp.asarray(inputs()[0], jnp.bfloat16)
  assert len(kept(lambda x: jax.nn.silu(block(x)), x)) > 1
  assert len(kept(deep(lambda x: jax.nn.silu(block(x))), x)) > 1


# Refusals


@pytest.mark.parametrize(
  ("error", "message", "options"),
  [
    (TypeError, "activation='relu' is not a function", {"activation": "relu"}),
    (ValueError, "works element by element", {"activation": lambda y: y.sum(0)}),
    (ValueError, "works element by element", {"activation": lambda y: (y, y)}),
    (ValueError, "residual has shape \\(3,\\)", {"residual": np.ones(3)}),
    (ValueError, "residual has shape \\(12, 1\\)", {"residual": np.ones((12, 1))}),
    (TypeError, "residual has dtype int32", {"residual": np.ones(SHAPE, np.int32)}),
    (TypeError, "residual has dtype bool", {"residual": np.ones(SHAPE, bool)}),
    (
      TypeError,
      "residual is complex64, but y has dtype=float32",
      {"residual": np.ones(SHAPE, np.complex64), "dtype": np.float32},
    ),
  ],
)
@pytest.mark.parametrize("function", ["batch_norm", "normalize"])
def test_what_is_refused(function, error, message, options):
  call = {
    "batch_norm": functools.partial(jaxbn.batch_norm, use_running_average=False),
    "normalize": functools.partial(jaxbn.normalize, mean=STATE.mean, var=STATE.var),
  }[function]
  with pytest.raises(error, match=message):
    call(np.ones(SHAPE, np.float32), **options)


# Layers


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_layers_hand_on_activation_and_residual(kind, train):
  x, _, _, residual, _ = (jnp.asarray(a, jnp.float32) for a in inputs())
  make = {"linen": (layers.linen, jaxbn.linen), "nnx": (layers.of_nnx, jaxbn.nnx)}[kind]
  layer = make[0](make[1].BatchNorm, x, activation=jax.nn.silu)
  y, new_state = layer.call(layer.state, x, train, residual=residual)
  expected, expected_state = jaxbn.batch_norm(
    x,
    layer.state["scale"],
    layer.state["bias"],
    jaxbn.RunningStats(layer.state["mean"], layer.state["var"]),
    use_running_average=not train,
    activation=jax.nn.silu,
    residual=residual,
  )
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(new_state["mean"], expected_state.mean)
  np.testing.assert_array_equal(new_state["var"], expected_state.var)


# Parameters of the activation


@pytest.mark.parametrize("evaluating", [False, True])
def test_the_activation_s_own_parameters_are_differentiated(evaluating):
  # A learned slope per channel (PReLU), closed over.
  with jax.enable_x64(True):
    x, scale, bias, residual, cotangent = inputs()
    # What is computed of single-precision constants depends, in its last digit, on who folds them.
    state = jax.tree.map(lambda s: s.astype(jnp.float64), STATE)

    def loss(f, slope, x):
      def activation(y):
        return jnp.where(y > 0, y, slope * y) + slope**2 * jnp.tanh(y)

      return jnp.sum(cotangent * f(x, activation))

    def inside(x, activation):
      return jaxbn.batch_norm(
        *(x, scale, bias, state),
        use_running_average=evaluating,
        residual=residual,
        activation=activation,
      )[0]

    def without(x, activation):
      return activation(inside(x, None))

    slope = jnp.array([0.1, 0.2, 0.3])
    for f in (jax.grad, jax.hessian):
      inner, outer = (
        jax.jit(f(functools.partial(loss, layer), (0, 1)))(slope, x) for layer in (inside, without)
      )
      assert_close(inner, outer, rtol=1e-9, atol=1e-9)


def test_a_scan_may_bring_the_activation_s_parameters():
  x = inputs()[0].astype(np.float32)

  def body(x, slope):
    activation = lambda y: jnp.where(y > 0, y, slope * y)  # noqa: E731
    return jaxbn.batch_norm(x, use_running_average=False, activation=activation)[0], None

  slopes = jnp.array([0.1, 0.5])
  scanned = jax.jit(jax.grad(lambda x: jax.lax.scan(body, x, slopes)[0][0].sum()))(x)
  looped = jax.jit(jax.grad(lambda x: body(body(x, 0.1)[0], 0.5)[0][0].sum()))(x)
  np.testing.assert_allclose(scanned, looped, rtol=1e-4, atol=1e-5)


def test_an_activation_without_a_hash_is_as_good_as_any():
  @dataclasses.dataclass  # whose instances compare by value, and have no hash
  class Slope:
    slope: float

    def __call__(self, y):
      return jnp.where(y > 0, y, self.slope * y)

  x = inputs()[0].astype(np.float32)
  gradients = []
  for activation in (Slope(0.1), functools.partial(jax.nn.leaky_relu, negative_slope=0.1)):
    layer = functools.partial(jaxbn.batch_norm, use_running_average=False, activation=activation)
    gradients.append(jax.jit(jax.grad(lambda x, f=layer: jnp.sum(f(x)[0] ** 2)))(x))
  np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


def barriers(platform):
  """How many numbers per channel are behind each barrier of a layer's derivative, as exported."""

  def loss(x, scale, bias):
    options = {"use_running_average": False, "activation": jax.nn.relu}
    return jaxbn.batch_norm(x, scale, bias, jaxbn.init(CHANNELS), **options)[0].sum()

  arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (SHAPE, (CHANNELS,), (CHANNELS,))]
  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  module = jax.export.export(gradient, platforms=[platform])(*arguments).mlir_module()
  found = re.findall(r"stablehlo.optimization_barrier (.*?) :", module)
  return [one.count("%") for one in found]


def test_each_sum_has_a_mask_of_its_own_on_gpus_only():
  # What differs is not merged: a GPU then computes ReLU's mask in each sum and stores it for none.
  # Elsewhere two would be too many: there the barriers are equal.
  gpu = barriers("cuda")
  assert gpu.count(3) == 1
  for platform in ("cpu", "tpu"):
    other = barriers(platform)
    assert other.count(3) == 0
    assert other.count(2) == gpu.count(2) + 1


CALLS = []


def counting(z):
  CALLS.append(z.shape)
  return jnp.tanh(z)


def times_called(layers, activation):
  CALLS.clear()
  jax.clear_caches()

  def loss(x):
    for _ in range(layers):
      x, _ = jaxbn.batch_norm(x, use_running_average=False, activation=activation)
    return x.sum()

  jax.jit(jax.grad(loss)).trace(inputs()[0].astype(np.float32))
  return len(CALLS)


def test_layers_alike_are_traced_once_where_a_module_holds_the_activation():
  assert times_called(4, counting) == times_called(1, counting)


def test_any_other_activation_is_called_once_in_each_layer():
  assert times_called(3, lambda z: counting(z)) == 3
