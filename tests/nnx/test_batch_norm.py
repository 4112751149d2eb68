"""jaxbn.nnx.BatchNorm: against the Linen layer, bit for bit, and against Flax's, to rounding."""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import errors, nnx
from flax.nnx.nn import dtypes
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn.nnx
from tests import layers

OURS, FLAX = jaxbn.nnx.BatchNorm, nnx.BatchNorm
X = jax.random.normal(jax.random.key(1), (4, 8, 3)) + 0.5  # four devices' (or steps') batches


def make(cls, features=3, **options):
  return cls(features, **layers.FIXED | {"rngs": nnx.Rngs(0)} | options)


def values(tree):
  """All arrays of a layer or a state, by name."""
  state = tree if isinstance(tree, nnx.State) else nnx.state(tree)
  return jax.tree.map(np.asarray, nnx.to_pure_dict(state))


# The interface.


def test_the_constructor_takes_flax_s_arguments_then_ours():
  ours, theirs = (
    [(p.name, p.kind, p.default) for p in inspect.signature(cls.__init__).parameters.values()]
    for cls in (OURS, FLAX)
  )
  assert ours[: len(theirs)] == theirs
  assert [(name, default) for name, _, default in ours[len(theirs) :]] == [
    ("debias", False),
    ("unbiased", False),
    ("skip_nonfinite", False),
    ("detach_stats", False),
    ("masked_value", None),
    ("activation", None),
    ("virtual_batch_size", None),
    ("choose", None),
  ]


@pytest.mark.parametrize(
  ("method", "added"),
  [
    ("__call__", [(a, inspect.Parameter.KEYWORD_ONLY, None) for a in ("weights", "residual")]),
    ("set_view", []),
  ],
)
def test_methods_take_flax_s_arguments_then_ours(method, added):
  ours, theirs = (
    [
      (p.name, p.kind, p.default)
      for p in inspect.signature(getattr(cls, method)).parameters.values()
    ]
    for cls in (OURS, FLAX)
  )
  assert ours == theirs + added


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"param_dtype": jnp.bfloat16, "axis": 1},
    {"use_scale": False},
    {"use_bias": False},
    {"scale_metadata": {"note": 1}, "bias_metadata": {"note": 2, "other": "x"}},
  ],
  ids=str,
)
def test_state_is_flax_s_in_types_names_values_metadata_and_rngs_used(options):
  def run(cls):
    rngs = nnx.Rngs(0)
    layer = make(cls, **{**layers.RANDOM, "rngs": rngs, **options})
    variables = {
      path: (type(v), v[...], v.get_metadata()) for path, v in nnx.to_flat_state(nnx.state(layer))
    }
    return variables, int(rngs.params.count[...]), rngs.params()

  (ours, *our_rngs), (theirs, *their_rngs) = run(OURS), run(FLAX)
  assert ours.keys() == theirs.keys()
  for path, (kind, value, metadata) in ours.items():
    assert (kind, metadata) == (theirs[path][0], theirs[path][2])
    layers.assert_bit_equal(value, theirs[path][1])
  assert our_rngs == their_rngs


def test_sharding_metadata_is_flax_s():
  mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
  init = nnx.with_partitioning(nnx.initializers.ones, ("model",))

  def specs(cls):
    with jax.set_mesh(mesh):
      layer = make(cls, scale_init=init, bias_metadata={"out_sharding": ("model",)})
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))

  assert specs(OURS) == specs(FLAX)
  assert specs(OURS)["scale"] == P("model")


@pytest.mark.parametrize("option", [{"debias": True}, {"momentum": None}], ids=str)
def test_only_an_option_that_needs_it_adds_a_count(option):
  layer = make(OURS, **option)
  assert isinstance(layer.count, nnx.BatchStat)
  assert layer.count[...].dtype == jnp.float32
  assert not hasattr(make(OURS), "count")


def test_attributes_are_flax_s():
  ours, theirs = vars(make(OURS)), vars(make(FLAX))
  names = {name for name in theirs if not name.startswith("_")}
  assert names <= ours.keys()
  plain = names - {"scale", "bias", "mean", "var"}
  assert {name: ours[name] for name in plain} == {name: theirs[name] for name in plain}


@pytest.mark.parametrize(
  "options", [{"axis": [1, 2]}, {"axis": np.int64(-1)}, {"axis_index_groups": [[0, 1], [2, 3]]}]
)
def test_lists_and_numpy_integers_are_hashable_when_split(options):
  features = 3 if "axis" not in options or options["axis"] == -1 else 24
  graphdef, state = nnx.split(make(OURS, features, axis_name="b", **options))
  assert hash(graphdef) == hash(nnx.split(make(OURS, features, axis_name="b", **options))[0])
  assert set(values(state)) == {"scale", "bias", "mean", "var"}

  @nnx.jit
  def step(layer, x):
    return layer(x)

  def call(state, x):
    return step(nnx.merge(graphdef, state), x[None])

  assert jax.vmap(call, (None, 0), axis_name="b")(state, X).shape == (4, 1, 8, 3)


# The numbers.


@pytest.mark.optimized
@pytest.mark.parametrize("case", layers.CASES)
def test_layer_is_the_linen_layer_bit_for_bit(case):
  layers.assert_bit_equal(layers.trajectory("nnx", case), layers.trajectory("linen", case))


@pytest.mark.optimized
@pytest.mark.parametrize("case", layers.FLAX_CASES)
def test_layer_is_flax_s_to_rounding(case):
  layers.assert_equal_to_rounding(
    layers.trajectory("nnx", case), layers.trajectory("flax nnx", case)
  )


class TestClaims(layers.Claims):
  make = staticmethod(layers.MAKERS["nnx"])
  flax = staticmethod(layers.MAKERS["flax nnx"])


@pytest.mark.optimized
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
def test_synchronized_layer_is_the_linen_layer_bit_for_bit(transform, masked):
  mask = np.random.default_rng(0).uniform(size=(4, 8, 1)) < 0.5
  mask[2] = False  # one device has no example at all
  start = layers.MAKERS["linen"](X[0]).state
  options = {"axis_name": "b", "axis_index_groups": ((0, 2), (1, 3)), "debias": True}

  def run(maker):
    state, call = layers.MAKERS[maker](X[0], **options)
    state |= start

    def two_steps(x, mask):
      call_masked = functools.partial(call, **({"mask": mask} if masked else {}))
      y, new = call_masked(state, x)
      return y, call_masked(new, 2 * x + 1)

    return transform(jax.jit(two_steps), axis_name="b")(X, mask)

  layers.assert_bit_equal(run("nnx"), run("linen"))


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
  ("dtype", "param_dtype"),
  [(None, jnp.float32), (None, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.float32,) * 2],
)
def test_dtypes_are_flax_s(x_dtype, dtype, param_dtype):
  x = X[0].astype(x_dtype)

  def run(cls):
    layer = make(cls, dtype=dtype, param_dtype=param_dtype)
    return layer(x), layer(x, use_running_average=True), nnx.to_pure_dict(nnx.state(layer))

  # With dtype=bfloat16 Flax rounds x, mean, scale and bias to 8 bits, we the result alone: some
  # five roundings of values up to |x - mean| < 4 standard deviations.
  eps = jnp.finfo(jnp.bfloat16).eps if dtype == jnp.bfloat16 else jnp.finfo(jnp.float32).eps
  layers.assert_equal_to_rounding(run(OURS), run(FLAX), float(eps) / (8 if eps > 1e-4 else 1))


def test_bfloat16_results_are_rounded_once():
  layer = make(OURS, dtype=jnp.bfloat16)
  exact = make(OURS)
  layers.assert_bit_equal(layer(X[0]), exact(X[0]).astype(jnp.bfloat16))
  layers.assert_bit_equal(values(layer), values(exact))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_promote_dtype_of_one_s_own_gets_flax_s_tuple_and_is_honoured(dtype):
  def run(cls):
    calls = []

    def promote(args, *, dtype=None):
      calls.append(([None if a is None else (a.shape, a.dtype) for a in args], dtype))
      x, mean, var, scale, _ = dtypes.promote_dtype(args, dtype=dtype)
      return x, mean + 1, var, scale, None  # without bias, and evaluation off by one

    layer = make(cls, promote_dtype=promote, dtype=dtype, momentum=0.5)
    y = layer(X[0])
    return calls, (y, layer(X[0], use_running_average=True), nnx.to_pure_dict(nnx.state(layer)))

  (our_calls, ours), (their_calls, theirs) = run(OURS), run(FLAX)
  assert our_calls == their_calls
  eps = jnp.finfo(dtype or jnp.float32).eps
  layers.assert_equal_to_rounding(ours, theirs, float(eps) / (8 if dtype else 1))


def test_running_statistics_keep_their_precision_under_any_promote_dtype():
  layer = make(
    OURS,
    promote_dtype=lambda args, *, dtype: dtypes.promote_dtype(args, dtype=dtype),
    dtype=jnp.bfloat16,
  )
  plain = make(OURS)
  x = X[0].astype(jnp.bfloat16)
  for _ in range(3):
    layer(x), plain(x)
  layers.assert_bit_equal(layer.mean[...], plain.mean[...])
  layers.assert_bit_equal(layer.var[...], plain.var[...])


def test_several_channel_axes_share_one_long_vector():
  layer = make(OURS, 24, axis=(1, 2))
  reference, call = layers.MAKERS["linen"](X, axis=(1, 2))
  reference |= {k: values(layer)[k].reshape(8, 3) for k in layers.PARAMS}
  y, new = call(reference, X)
  layers.assert_bit_equal(layer(X), y)
  layers.assert_bit_equal(values(layer), {k: np.asarray(v).reshape(24) for k, v in new.items()})


def test_complex_input_is_the_linen_layer_s():
  z = lax.complex(X[0], X[1])
  linen, ours = (layers.MAKERS[maker](z) for maker in ("linen", "nnx"))
  layers.assert_bit_equal(ours.call(linen.state, z), linen.call(linen.state, z))


# Modes.


def test_the_mode_is_the_call_s_then_the_layer_s():
  layer = make(OURS)
  training, evaluation = make(OURS)(X[0]), layer(X[0], use_running_average=True)
  layers.assert_bit_equal(values(layer), values(make(OURS)))  # evaluation changed nothing
  layer.eval()
  layers.assert_bit_equal(layer(X[0]), evaluation)
  layers.assert_bit_equal(layer(X[0], False), training)
  layer.train()
  assert layer.use_running_average is False


def test_a_view_shares_the_statistics_a_clone_does_not():
  layer = make(OURS)
  view, clone = nnx.view(layer, use_running_average=True), nnx.clone(layer)
  layer(X[0])
  assert view.use_running_average
  assert not layer.use_running_average
  layers.assert_bit_equal(values(view), values(layer))
  assert np.any(values(clone)["mean"] != values(layer)["mean"])


def test_no_mode_at_all_is_an_error():
  with pytest.raises(ValueError, match="use_running_average was given neither"):
    make(OURS, use_running_average=None)(X[0])


# Transformations: each gives what Flax's own layer gives under it.


def loss_of(layer, x):
  return jnp.sum(jnp.sin(3 * layer(x)))


def stacked(cls):
  keys = jax.random.split(jax.random.key(0), 4)
  return nnx.jit(nnx.vmap(lambda key: make(cls, rngs=nnx.Rngs(key))))(keys)


def nnx_optimizer(cls):
  layer = make(cls)
  optimizer = nnx.Optimizer(layer, optax.adam(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(layer, optimizer, x):
    loss, grads = nnx.value_and_grad(loss_of)(layer, x)
    optimizer.update(layer, grads)
    return loss

  return layer, [step(layer, optimizer, x) for x in X]


def nnx_scan_of_layers(cls):
  layer = stacked(cls)
  over = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  return layer, over(X[0], layer)


def nnx_scan_of_steps(cls):
  layer = make(cls)
  over = nnx.scan(
    lambda layer, x: (layer, layer(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
  )
  return layer, over(layer, X)[1]


def synchronized(transform, cls):
  layer = make(cls, axis_name="b")
  return layer, transform(lambda layer, x: layer(x))(layer, X)


def nnx_shard_map(f):
  mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
  return nnx.jit(nnx.shard_map(f, mesh=mesh, in_specs=(P(), P("b")), out_specs=P("b")))


def functional(layer):
  """The layer as a pure function of its state, for JAX's own transformations."""
  graphdef, state = nnx.split(layer)

  def call(state, x):
    layer = nnx.merge(graphdef, state)
    y = layer(x)
    return nnx.state(layer), y

  return call, state


def jax_grad(cls):
  graphdef, params, stats = nnx.split(make(cls), nnx.Param, nnx.BatchStat)

  def loss(params, stats):
    layer = nnx.merge(graphdef, params, stats, copy=True)
    return loss_of(layer, X[0]), nnx.state(layer)

  grads, state = jax.jit(jax.grad(loss, has_aux=True))(params, stats)
  return state, nnx.to_pure_dict(grads)


def jax_scan(cls):
  call, state = functional(make(cls))
  return lax.scan(call, state, X)


def jax_mapped(transform, cls):
  call, state = functional(make(cls, axis_name="b"))
  return transform(call)(state, X)


def jax_shard_map(f):
  mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
  return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P(), P("b")), out_specs=(P(), P("b"))))


def nnx_grad(transform, cls):
  layer = make(cls)
  grads = nnx.grad(lambda layer, x: loss_of(transform(layer), x))(layer, X[0])
  return layer, nnx.to_pure_dict(grads)


def nnx_vmap(cls):
  layer = stacked(cls)
  return layer, nnx.jit(nnx.vmap(lambda layer, x: layer(x)))(layer, X)


def plain_remat(layer):
  return lambda x: nnx.remat(lambda layer, x: layer(x))(layer, x)


partial = functools.partial
TRANSFORMED = {
  "nnx.jit": lambda cls: (lambda m: (m, nnx.jit(lambda m, x: m(x))(m, X[0])))(make(cls)),
  "nnx.grad": partial(nnx_grad, lambda layer: layer),
  "nnx.remat": partial(nnx_grad, plain_remat),
  "nnx.Optimizer": nnx_optimizer,
  "nnx.vmap": nnx_vmap,
  "nnx.vmap, shared": partial(
    synchronized, lambda f: nnx.vmap(f, in_axes=(None, 0), axis_name="b")
  ),
  "nnx.pmap": partial(synchronized, lambda f: nnx.pmap(f, in_axes=(None, 0), axis_name="b")),
  "nnx.shard_map": partial(synchronized, nnx_shard_map),
  "nnx.scan over layers": nnx_scan_of_layers,
  "nnx.scan over steps": nnx_scan_of_steps,
  "jax.grad": jax_grad,
  "jax.scan": jax_scan,
  "jax.vmap": partial(jax_mapped, lambda f: jax.vmap(f, (None, 0), (None, 0), axis_name="b")),
  "jax.pmap": partial(jax_mapped, lambda f: jax.pmap(f, in_axes=(None, 0), axis_name="b")),
  "jax.shard_map": partial(jax_mapped, jax_shard_map),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed_layer_is_flax_s(name):
  (ours, our_out), (theirs, their_out) = (TRANSFORMED[name](cls) for cls in (OURS, FLAX))
  # Four layers or steps at most, each of which may multiply the rounding of the one before.
  eps = 8 * float(jnp.finfo(jnp.float32).eps)
  layers.assert_equal_to_rounding((values(ours), our_out), (values(theirs), their_out), eps)
  assert np.any(values(ours)["mean"] != 0)  # the statistics came out of the transformation


@pytest.mark.parametrize("build", [nnx.eval_shape, lambda f: nnx.jit(f)()], ids=["shape", "jit"])
def test_constructed_under_a_transformation(build):
  layer = build(lambda: make(OURS, axis_index_groups=[[0, 1]], axis_name="b", debias=True))
  plain = nnx.to_pure_dict(nnx.state(make(OURS, debias=True)))
  shapes = jax.tree.map(lambda v: (v.shape, v.dtype), nnx.to_pure_dict(nnx.state(layer)))
  assert shapes == jax.tree.map(lambda v: (v.shape, v.dtype), plain)


def test_eval_shape_of_a_call():
  y = nnx.eval_shape(lambda layer, x: layer(x), make(OURS), X[0])
  assert (y.shape, y.dtype) == (X[0].shape, X.dtype)


@pytest.mark.parametrize(
  "transform",
  [
    jax.jit,
    jax.vmap,
    jax.checkpoint,
    lambda f: jax.grad(lambda x: jnp.sum(f(x))),
    lambda f: lambda x: lax.scan(lambda c, x: (c, f(x)), 0, x),
  ],
  ids=["jit", "vmap", "checkpoint", "grad", "scan"],
)
def test_training_a_captured_layer_says_what_to_do(transform):
  layer = make(OURS)
  before = values(layer)
  with pytest.raises(errors.TraceContextError, match=r"nnx\.jit.*copy=True.*model\.eval\(\)"):
    transform(layer)(X)
  layers.assert_bit_equal(values(layer), before)
  layer.eval()
  transform(layer)(X)  # evaluation writes nothing: it may be captured


def may_be_captured(cls, kind):
  """A layer with variables that are mutable in JAX, and its output under jit, or Flax's refusal."""
  with nnx.var_defaults(**{kind: True}):
    layer = make(cls)
  try:
    return layer, jax.jit(layer)(X[0])
  except errors.ImmutableVariableError as error:
    return layer, error


@pytest.mark.parametrize("kind", ["hijax", "ref"])
def test_variables_that_are_mutable_in_jax_can_be_captured_where_flax_s_can(kind):
  # Which depends on its version for hijax variables that are no references.
  (layer, y), (_, theirs) = (may_be_captured(cls, kind) for cls in (OURS, FLAX))
  if isinstance(theirs, errors.ImmutableVariableError):
    assert kind == "hijax"
    assert isinstance(y, errors.ImmutableVariableError)
    assert "var_defaults(ref=True)" in str(y)
    return
  plain = make(OURS)
  layers.assert_equal_to_rounding(y, plain(X[0]))
  layers.assert_equal_to_rounding(layer.mean[...], plain.mean[...])


def test_statistics_are_no_path_for_gradients_as_in_flax():
  def through(cls):
    graphdef, state = nnx.split(make(cls))

    def loss(x):
      layer = nnx.merge(graphdef, state, copy=True)
      layer(x)
      return jnp.sum(layer(jnp.ones((1, 3)), use_running_average=True))

    return jax.grad(loss)(X[0])

  assert not np.any(through(OURS))
  assert not np.any(through(FLAX))


def test_training_steps_compile_once_and_keep_their_dtypes():
  layer = make(OURS, debias=True, skip_nonfinite=True)
  step = nnx.jit(chex.assert_max_traces(lambda layer, x: layer(x), n=1))
  before = jax.tree.map(lambda v: v.dtype, values(layer))
  for x in X:
    step(layer, x)
  assert jax.tree.map(lambda v: v.dtype, values(layer)) == before
  np.testing.assert_array_equal(layer.count[...], [4, 4, 4])


# State.


def test_state_and_update_move_statistics_between_layers():
  trained, fresh = make(OURS), make(OURS)
  trained(X[0])
  nnx.update(fresh, nnx.state(trained, nnx.BatchStat))
  layers.assert_bit_equal(values(fresh), values(trained))
  graphdef, params, stats = nnx.split(trained, nnx.Param, nnx.BatchStat)
  assert (set(params), set(stats)) == ({"scale", "bias"}, {"mean", "var"})
  layers.assert_bit_equal(values(nnx.merge(graphdef, params, stats)), values(trained))


def test_a_flax_checkpoint_loads(tmp_path):
  trained: Any = make(FLAX)
  trained(X[0])
  ours = make(OURS, rngs=nnx.Rngs(9))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", nnx.state(trained))
    checkpointer.wait_until_finished()
    loaded = checkpointer.restore(tmp_path / "state", nnx.state(ours))
  nnx.update(ours, loaded)
  layers.assert_bit_equal(values(ours), values(trained))
  for layer in (ours, trained):
    layer.eval()
  layers.assert_equal_to_rounding(ours(X[1]), trained(X[1]))


def test_another_number_of_channels_is_named():
  with pytest.raises(ValueError, match=r"num_features=5: pass num_features=3"):
    make(OURS, 5)(X[0])
