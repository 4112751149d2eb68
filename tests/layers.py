"""What the tests of both Flax layers share: one way to run them, and the cases to run.

A layer, ours or Flax's, Linen's or NNX's, becomes a pure function on one flat dictionary of arrays
(scale, bias, mean, var and, where there is one, count), so that any two can be compared.
"""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

PARAMS = ("scale", "bias")


def _of_key(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
  # Says which key it was given, without the compilation that jax.random takes.
  return jnp.full(shape, jnp.sum(jax.random.key_data(key) % 251), dtype)


RANDOM = {"scale_init": _of_key, "bias_init": _of_key}


def _fixed(seed: int) -> Callable[..., jax.Array]:
  return lambda key, shape, dtype: jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), dtype
  )


# Parameters that are not 1 and 0, for nearly nothing: jax.random takes longer to compile than all
# that is tested.
FIXED = {"scale_init": _fixed(1), "bias_init": _fixed(2)}


class Layer(NamedTuple):
  state: dict[str, jax.Array]
  call: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # (state, x, train=True, **call)


def linen(cls: Any, x: Any, **options: Any) -> Layer:
  module = cls(**FIXED | options)

  def call(state, x, train=True, **call):
    params = {k: v for k, v in state.items() if k in PARAMS}
    stats = {k: v for k, v in state.items() if k not in PARAMS}
    variables = {"params": params, "batch_stats": stats}
    mutable = ["batch_stats"]
    y, new = module.apply(variables, x, use_running_average=not train, mutable=mutable, **call)
    return y, {**params, **new["batch_stats"]}

  variables = module.init(jax.random.key(0), x, use_running_average=False)
  return Layer({**variables.get("params", {}), **variables["batch_stats"]}, call)


def of_nnx(cls: Any, x: Any, **options: Any) -> Layer:
  axes = np.atleast_1d(options.get("axis", -1))
  features = math.prod(x.shape[a] for a in axes)
  layer = cls(features, rngs=nnx.Rngs(0), **FIXED | options)
  graphdef, start = nnx.split(layer)

  def call(state, x, train=True, **call):
    variables = jax.tree.map(lambda leaf: leaf, start)
    nnx.replace_by_pure_dict(variables, {k: v.reshape(features) for k, v in state.items()})
    layer = nnx.merge(graphdef, variables)
    y = layer(x, use_running_average=not train, **call)
    return y, nnx.to_pure_dict(nnx.state(layer))

  return Layer(nnx.to_pure_dict(start), call)


def core(x: Any, **options: Any) -> Layer:
  """`jaxbn.batch_norm` itself, with the parameters of the Linen layer."""
  ignored = ("param_dtype", "use_scale", "use_bias", "force_float32_reductions")
  start = linen(jaxbn.linen.BatchNorm, x, **options).state
  options = {k: v for k, v in options.items() if k not in ignored}

  def call(state, x, train=True, **call):
    stats = jaxbn.RunningStats(*(state.get(name) for name in jaxbn.RunningStats._fields))
    params = (state.get(name) for name in PARAMS)
    y, new = jaxbn.batch_norm(x, *params, stats, use_running_average=not train, **options, **call)
    return y, state | {k: v for k, v in new._asdict().items() if v is not None}

  return Layer(start, call)


class Case(NamedTuple):
  """A layer's options, what it is called with, and the batches: (step, example, place, channel)."""

  options: Mapping[str, Any] = MappingProxyType({})
  call: Mapping[str, Any] = MappingProxyType({})
  shift: float = 0.0  # added to the data, in standard deviations
  bad: float | None = None  # put into an element of the second batch
  x_dtype: Any = jnp.float32

  def batches(self) -> jax.Array:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 5, 3)) + rng.uniform(-1, 1, size=(5, 3)) + self.shift
    if self.bad is not None:
      x[1, 2, 3, 1] = self.bad
    return jnp.asarray(x, self.x_dtype)


MASK = np.random.default_rng(1).uniform(size=(8, 5, 1)) < 0.7
WEIGHTS = np.random.default_rng(2).uniform(size=(8, 1, 1)).astype(np.float32)


def halfway(batch: jaxbn.Moments, state: Any) -> jaxbn.Chosen:
  """Statistics between the batch's and the running ones."""
  return jaxbn.Chosen((batch.mean + state.mean) / 2, (batch.var + state.var) / 2)


# What Flax has too.
FLAX_CASES = {
  "default": Case(),
  "momentum": Case({"momentum": 0.6}),
  "epsilon": Case({"epsilon": 0.3}),
  "no scale": Case({"use_scale": False}),
  "no bias": Case({"use_bias": False}),
  "neither": Case({"use_scale": False, "use_bias": False}),
  "axis 1": Case({"axis": 1}),
  "axis -2": Case({"axis": -2}),
  "two passes": Case({"use_fast_variance": False}),
  "mask": Case(call={"mask": MASK}),
  "float32 from bfloat16": Case({"dtype": jnp.float32}, x_dtype=jnp.bfloat16),
  "bfloat16 parameters": Case({"param_dtype": jnp.bfloat16}),
}
OUR_CASES = {
  "several axes": Case({"axis": (1, 2)}),
  "bfloat16": Case({"dtype": jnp.bfloat16}, x_dtype=jnp.bfloat16),
  "large mean": Case(shift=1e4),
  "cumulative": Case({"momentum": None}),
  "debias": Case({"debias": True, "momentum": 0.9}),
  "unbiased": Case({"unbiased": True}),
  "not finite": Case(bad=np.inf),
  "skip_nonfinite": Case({"skip_nonfinite": True}, bad=np.nan),
  "detach_stats": Case({"detach_stats": True}),
  "masked_value": Case({"masked_value": 7.0}, {"mask": MASK}),
  "weights": Case(call={"weights": WEIGHTS}),
  "mask and weights": Case({"masked_value": 0.0}, {"weights": WEIGHTS, "mask": MASK}),
  "virtual batches": Case({"virtual_batch_size": 4}, {"mask": MASK}),
  "choose": Case({"choose": halfway}),
}
CASES = FLAX_CASES | OUR_CASES
MAKERS = {
  "core": core,
  "linen": functools.partial(linen, jaxbn.linen.BatchNorm),
  "nnx": functools.partial(of_nnx, jaxbn.nnx.BatchNorm),
  "flax linen": functools.partial(linen, nn.BatchNorm),
  "flax nnx": functools.partial(of_nnx, nnx.BatchNorm),
}


@functools.cache
def trajectory(maker: str, name: str) -> dict[str, Any]:
  """Some training steps, each with its gradients, then an evaluation.

  Not under jit: what one operation at a time computes is the same for all who call the core with
  the same values, and compiles once for all cases.
  """
  case = CASES[name]
  xs = case.batches()
  state = MAKERS["linen"](xs[0], **case.options).state  # every layer from the same parameters
  _, call = MAKERS[maker](xs[0], **case.options)
  cotangent = jax.random.normal(jax.random.key(1), xs[0].shape)

  def loss(params, x):
    y, new = call({**state, **params}, x, **case.call)
    # Masked positions count as well: what y holds there is part of the claim.
    return jnp.sum(y * cotangent), (y, new)

  steps = []
  for x in xs:
    params = {k: v for k, v in state.items() if k in PARAMS}
    grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    state = {k: new[k].reshape(v.shape) for k, v in state.items()}
    steps.append({"y": y, "gradients": grads, "state": state})
  y, new = call(state, xs[-1], train=False, **case.call)
  new = {k: new[k].reshape(v.shape) for k, v in state.items()}
  return jax.tree.map(np.asarray, {"steps": steps, "evaluation": y, "after": new})


def assert_bit_equal(ours: Any, theirs: Any) -> None:
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)  # NaN in the same places, too


def assert_equal_to_rounding(ours: Any, theirs: Any, eps: float | None = None) -> None:
  """Equal within 64 units in the last place of each leaf's largest element.

  The data are benign: |mean| is below two standard deviations, so that one sum over n <= 40
  elements is off by less than n u, Flax's E[x^2] - E[x]^2 by about five times that at most, and
  what is computed from them, of order one, by a few of these; u is half of eps.
  """
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
  ):
    a, b = jnp.asarray(a), jnp.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype), path
    if jnp.issubdtype(a.dtype, jnp.inexact):
      u = eps or float(jnp.finfo(a.dtype).eps)
      wide = jnp.promote_types(a.dtype, jnp.float32)
      a, b = np.asarray(a.astype(wide)), np.asarray(b.astype(wide))
      scale = max(1.0, float(np.max(np.abs(b), initial=0)))
      np.testing.assert_allclose(a, b, rtol=0, atol=64 * u * scale, err_msg=str(path))
    else:
      np.testing.assert_array_equal(a, b)


def devices(values: Any, number: int = 4) -> Any:
  """An array's first axis cut over that many devices, as a new leading axis."""
  return jax.tree.map(lambda v: v.reshape(number, -1, *v.shape[1:]), values)


class Claims:
  """What both layers promise: a test class of each names its own `make`."""

  make: Callable[..., Layer]
  flax: Callable[..., Layer]

  def test_debias_makes_evaluation_right_after_few_steps(self):
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.normal(7.0, 3.0, size=(20, 64, 3)), jnp.float32)

    def gap(maker, **options):
      state, call = maker(xs[0], **options)
      state, _ = jax.jit(lambda s, xs: jax.lax.scan(lambda s, x: (call(s, x)[1], None), s, xs))(
        state, xs
      )
      y, _ = call(state, xs[0])
      return float(jnp.max(jnp.abs(call(state, xs[0], train=False)[0] - y)))

    # The batches' means differ by 3/sqrt(64) standard deviations, outputs (up to 3 scales) little
    # more; Flax's statistics still hold 0.99^20 = 82 % of mean 0 and variance 1.
    assert gap(self.make, debias=True) < 1.5
    assert gap(self.flax) > 3

  @pytest.mark.parametrize("two_passes", [False, True])
  def test_a_mean_of_1e4_standard_deviations_is_within_1e_2(self, two_passes):
    x = np.random.default_rng(0).normal(1e4, 1.0, size=(256, 3)).astype(np.float32)
    state, call = self.make(
      x, use_fast_variance=not two_passes, use_scale=False, use_bias=False, momentum=0.0
    )
    y, state = call(state, x)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-2)
    np.testing.assert_allclose(state["var"], wide.var(0), rtol=1e-2)

  @pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
  def test_masked_nan_and_an_empty_device_do_no_harm(self, transform):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    mask = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)[:, None]  # of four devices the third has none
    x = np.where(mask, x, np.nan)
    state, call = self.make(x[:2], axis_name="b", masked_value=0.0)

    def loss(state, x, mask):
      y, new = call(state, x, mask=mask)
      return jnp.sum(y**3), (y, new)

    grads, (y, new) = transform(
      jax.jit(jax.grad(loss, has_aux=True)), axis_name="b", in_axes=(None, 0, 0)
    )(state, devices(x), devices(mask))
    y = np.asarray(y).reshape(8, 3)
    _, alone = self.make(x[:2])
    whole, whole_new = jax.jit(alone)(state, x[mask[:, 0]])
    eps = float(jnp.finfo(jnp.float32).eps)
    assert_equal_to_rounding(y[mask[:, 0]], whole, eps)
    assert not np.any(y[~mask[:, 0]])
    for name in ("mean", "var"):  # the same on every device, and those of all valid elements
      assert_equal_to_rounding(new[name], jnp.stack([whole_new[name]] * 4), eps)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))

  def test_masked_value_waits_for_a_mask(self):
    x = jnp.ones((4, 3))
    state, call = self.make(x, masked_value=5.0)
    plain_state, plain = self.make(x)
    assert_bit_equal(call(state, x)[0], plain(plain_state, x)[0])

  @pytest.mark.parametrize(
    ("x", "kw", "error", "says"),
    [
      (np.ones((4, 3), np.int32), {}, TypeError, r"int32.*astype"),
      (np.ones((4, 3)), {"mask": np.ones(4, bool)}, ValueError, r"mask of shape \(4,\).*None"),
      (np.ones((4, 3)), {"weights": np.full(3, -1.0)}, ValueError, "negative"),
      (np.ones((0, 3)), {}, ValueError, "empty batch"),
    ],
    ids=["integer", "mask", "weights", "empty"],
  )
  def test_the_core_s_errors_reach_the_caller(self, x, kw, error, says):
    state, call = self.make(np.ones((4, 3), np.float32))
    with pytest.raises(error, match=says):
      call(state, x, **kw)

  def test_an_unbound_axis_is_named_beside_the_bound_ones(self):
    x = np.ones((2, 4, 3), np.float32)
    state, call = self.make(x[0], axis_name="batch")
    with pytest.raises(ValueError, match=r"axis_name='batch' is not bound here \(bound: 'data'\)"):
      jax.vmap(call, (None, 0), axis_name="data")(state, x)

  def test_a_mask_of_any_dtype_will_do(self):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    mask = np.array([[1], [0], [2], [1]])
    state, call = self.make(x)
    assert_bit_equal(call(state, x, mask=mask), call(state, x, mask=mask != 0))
    assert_bit_equal(call(state, x, mask=mask.astype(np.float32)), call(state, x, mask=mask != 0))


# Every layer there is, ready to be called in training: what is claimed of all is tried with all.

KEY = jax.random.key(0)
EXAMPLES = np.random.default_rng(3).normal(size=(8, 5, 4)).astype(np.float32) + 0.5
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1])


class Every(NamedTuple):
  make: Callable[..., Any]  # of a Linen module, or of an NNX one for rngs
  args: tuple[Any, ...] = (EXAMPLES,)
  evaluates: bool = True  # whether it has a mode of its own for evaluation


def _schedule(step: Any) -> Any:
  return 1 + 0.1 * jnp.asarray(step, jnp.float32)


# Batch norms: called as Flax's are, with its fields, and statistics mean and var.
BATCH_NORMS = {
  "BatchNorm": ({}, ()),
  "BatchNorm, debias": ({"debias": True}, ()),
  "BatchRenorm": ({}, ()),
  "BatchRenorm, scheduled": ({"r_max": _schedule}, ()),
  "ConditionalBatchNorm": ({"num_classes": 3}, (LABELS,)),
  "DomainBatchNorm": ({"num_domains": 3, "per_domain_parameters": True}, (LABELS,)),
}


def _of(module: Any, name: str) -> Any:
  return getattr(module, name.partition(",")[0])


def _every_linen() -> dict[str, Every]:
  lib, training = jaxbn.linen, {"use_running_average": False}

  def layer(name: str, **options: Any) -> Callable[..., Any]:
    return lambda **more: _of(lib, name)(**options | more)

  def cell(name: str) -> Every:
    make = layer(name, features=4, max_length=5, **training)
    return Every(make, (make().initialize_carry(KEY, (8, 4)), EXAMPLES[:, 0]))

  return {
    **{n: Every(layer(n, **training, **o), (EXAMPLES, *a)) for n, (o, a) in BATCH_NORMS.items()},
    "InputNormRNN": Every(layer("InputNormRNN", features=4, **training)),
    "LSTMCell": cell("LSTMCell"),
    "GRUCell": cell("GRUCell"),
    "MeanOnlyBatchNorm": Every(layer("MeanOnlyBatchNorm", **training)),
    "SkipInit": Every(layer("SkipInit"), evaluates=False),
    "ReferenceBatchNorm": Every(layer("ReferenceBatchNorm"), (EXAMPLES, True), evaluates=False),
    "WSConv": Every(layer("WSConv", features=3, kernel_size=(3,)), evaluates=False),
    "WSDense": Every(layer("WSDense", features=3), evaluates=False),
    "WeightNorm": Every(lambda: lib.WeightNorm(nn.Dense(3)), evaluates=False),
    "WhitenedConv": Every(layer("WhitenedConv", features=3, kernel_size=(3,)), evaluates=False),
    "WhitenedDense": Every(layer("WhitenedDense", features=3), evaluates=False),
    "WhiteningNorm": Every(layer("WhiteningNorm", group_size=2, **training)),
    "WhiteningNorm, newton": Every(
      layer("WhiteningNorm", group_size=2, method="newton", **training)
    ),
  }


def _every_nnx() -> dict[str, Every]:
  lib = jaxbn.nnx

  def layer(name: str, *sizes: Any, **options: Any) -> Callable[..., Any]:
    return lambda rngs: _of(lib, name)(*sizes, rngs=rngs, **options)

  def recurrent(name: str) -> Callable[..., Any]:
    return lambda rngs: nnx.RNN(_of(lib, name)(4, 4, max_length=5, rngs=rngs))

  return {
    **{n: Every(layer(n, 4, **o), (EXAMPLES, *a)) for n, (o, a) in BATCH_NORMS.items()},
    "InputNormRNN": Every(layer("InputNormRNN", 4, 4)),
    "LSTMCell": Every(recurrent("LSTMCell")),
    "GRUCell": Every(recurrent("GRUCell")),
    "MeanOnlyBatchNorm": Every(layer("MeanOnlyBatchNorm", 4)),
    "SkipInit": Every(layer("SkipInit"), evaluates=False),
    "ReferenceBatchNorm": Every(layer("ReferenceBatchNorm", 4), (EXAMPLES, True), evaluates=False),
    "WSConv": Every(layer("WSConv", 4, 3, (3,)), evaluates=False),
    "WSLinear": Every(layer("WSLinear", 4, 3), evaluates=False),
    "WeightNorm": Every(lambda rngs: lib.WeightNorm(nnx.Linear(4, 3, rngs=rngs)), evaluates=False),
    "WhitenedConv": Every(layer("WhitenedConv", 4, 3, (3,)), evaluates=False),
    "WhitenedLinear": Every(layer("WhitenedLinear", 4, 3), evaluates=False),
    "WhiteningNorm": Every(layer("WhiteningNorm", 4, group_size=2)),
    "WhiteningNorm, newton": Every(layer("WhiteningNorm", 4, group_size=2, method="newton")),
  }


EVERY_LINEN, EVERY_NNX = _every_linen(), _every_nnx()
