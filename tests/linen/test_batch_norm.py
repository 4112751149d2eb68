"""jaxbn.linen.BatchNorm: against the core, bit for bit, and against Flax's, to rounding."""

import dataclasses
import functools
import inspect
from typing import Any

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import errors

import jaxbn.linen
from tests import layers

OURS, FLAX = jaxbn.linen.BatchNorm, nn.BatchNorm
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 5, 3)) + 0.5


def train(module, variables, x, **call):
  """Output, and variables after one training step."""
  y, new = module.apply(variables, x, mutable=["batch_stats"], **call)
  return y, {**variables, **new}


# The interface.


def test_fields_are_flax_s_in_its_order_then_ours():
  def fields(cls):
    return [
      (f.name, f.default) for f in dataclasses.fields(cls) if f.name not in ("parent", "name")
    ]

  def ends(cls):  # what every module has, last
    return [f.name for f in dataclasses.fields(cls)][-2:]

  theirs = fields(FLAX)
  assert fields(OURS)[: len(theirs)] == theirs
  assert fields(OURS)[len(theirs) :] == [
    ("debias", False),
    ("unbiased", False),
    ("skip_nonfinite", False),
    ("detach_stats", False),
    ("masked_value", None),
    ("activation", None),
    ("virtual_batch_size", None),
    ("choose", None),
  ]
  assert ends(OURS) == ends(FLAX)


def test_the_call_takes_flax_s_arguments_then_ours():
  ours, theirs = (
    [(p.name, p.kind, p.default) for p in inspect.signature(cls.__call__).parameters.values()]
    for cls in (OURS, FLAX)
  )
  assert ours[: len(theirs)] == theirs
  added = [(name, inspect.Parameter.KEYWORD_ONLY, None) for name in ("weights", "residual")]
  assert ours[len(theirs) :] == added


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"axis": 1, "param_dtype": jnp.bfloat16},
    {"axis": (-1, 1)},
    {"use_scale": False},
    {"use_bias": False},
    {"force_float32_reductions": False, "param_dtype": jnp.float16},
  ],
  ids=str,
)
def test_init_gives_flax_s_tree_and_values(options):
  options = {"use_running_average": False, **layers.RANDOM, **options}
  ours, theirs = (cls(**options).init_with_output(KEY, X)[1] for cls in (OURS, FLAX))
  layers.assert_bit_equal(ours, theirs)


@pytest.mark.parametrize("option", [{"debias": True}, {"momentum": None}], ids=str)
def test_only_an_option_that_needs_it_adds_a_count(option):
  stats = OURS(use_running_average=False, **option).init(KEY, X)["batch_stats"]
  assert jax.tree.map(lambda v: (v.shape, v.dtype.name), stats) == {
    "mean": ((3,), "float32"),
    "var": ((3,), "float32"),
    "count": ((3,), "float32"),
  }


def test_sharding_metadata_stays_on_the_parameters():
  axes = nn.with_partitioning(nn.initializers.ones, ("model",))
  ours, theirs = (
    cls(use_running_average=False, scale_init=axes).init(KEY, X) for cls in (OURS, FLAX)
  )
  assert nn.get_partition_spec(ours) == nn.get_partition_spec(theirs)
  assert isinstance(ours["params"]["scale"], nn.Partitioned)


# The numbers.


@pytest.mark.optimized
@pytest.mark.parametrize("case", layers.CASES)
def test_layer_is_the_core_bit_for_bit(case):
  layers.assert_bit_equal(layers.trajectory("linen", case), layers.trajectory("core", case))


@pytest.mark.optimized
@pytest.mark.parametrize("case", [*layers.FLAX_CASES, "several axes"])
def test_layer_is_flax_s_to_rounding(case):
  layers.assert_equal_to_rounding(
    layers.trajectory("linen", case), layers.trajectory("flax linen", case)
  )


@pytest.mark.optimized
@pytest.mark.parametrize("case", layers.CASES)
def test_evaluation_leaves_the_statistics(case):
  run = layers.trajectory("linen", case)
  layers.assert_bit_equal(run["after"], run["steps"][-1]["state"])


def test_evaluation_needs_no_mutable_collection():
  variables = OURS(use_running_average=True).init(KEY, X)
  assert OURS().apply(variables, X, use_running_average=True).shape == X.shape


class TestClaims(layers.Claims):
  make = staticmethod(layers.MAKERS["linen"])
  flax = staticmethod(layers.MAKERS["flax linen"])


HALF = (jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("x_dtype", [jnp.float32, *HALF])
@pytest.mark.parametrize(
  ("dtype", "param_dtype"),
  [(None, jnp.float32), (None, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.float32, HALF[1])],
)
def test_dtypes_are_flax_s(force, x_dtype, dtype, param_dtype):
  def run(cls):
    layer = layers.linen(
      cls, X, dtype=dtype, param_dtype=param_dtype, force_float32_reductions=force
    )
    y, state = layer.call(layer.state, X.astype(x_dtype))
    return {"y": y, "evaluation": layer.call(state, X.astype(x_dtype), train=False)[0]} | state

  ours, theirs = run(OURS), run(FLAX)
  if not force and param_dtype in HALF:
    # Flax's own become float32 with the first float32 batch, ours with any: half precision cannot
    # hold an average whose steps are below its rounding.
    for name in ("mean", "var"):
      assert ours[name].dtype == jnp.float32
      theirs[name] = theirs[name].astype(jnp.float32)
  # Without force_float32_reductions Flax's arithmetic is in the narrowest dtype present.
  narrow = {x_dtype, param_dtype, dtype} if not force else {x_dtype}
  eps = max(float(jnp.finfo(d).eps) for d in narrow if d is not None)
  layers.assert_equal_to_rounding(ours, theirs, eps / 8 if eps > 1e-4 else eps)


def test_parameters_of_another_dtype_count_as_flax_s_do():
  # A float32 checkpoint in a model of half precision.
  options = {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}
  for cls in (OURS, FLAX):
    layer = layers.linen(cls, X, **options)
    state = jax.tree.map(lambda v: v.astype(jnp.float32), layer.state)
    assert layer.call(state, X.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_complex_input_is_flax_s_to_rounding():
  z = jax.lax.complex(X, X[::-1] * 2)

  def run(cls):
    state, call = layers.linen(cls, z)
    for _ in range(2):
      y, state = call(state, z)
    return y, state, call(state, z, train=False)[0]

  layers.assert_equal_to_rounding(run(OURS), run(FLAX))


@functools.cache
def synchronized(cls, transform, groups, two_passes):
  """Two training steps on four devices, and the second one's gradients."""
  x = layers.devices(X)
  options = {"axis_name": "b", "axis_index_groups": groups, "use_fast_variance": not two_passes}
  state, call = layers.linen(cls, x[0], **options)

  def loss(state, x):
    y, new = call(state, x)
    return jnp.sum(jnp.sin(3 * y)), (y, new)

  def step(state, x):
    _, state = call(state, x)
    (by_state, by_x), (y, state) = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)
    return {k: by_state[k] for k in layers.PARAMS}, by_x, y, state

  return transform(jax.jit(step), axis_name="b", in_axes=(None, 0))(state, x)


@pytest.mark.optimized
@pytest.mark.parametrize(
  ("groups", "two_passes"), [(None, False), (None, True), (((0, 2), (1, 3)), False)]
)
@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
def test_synchronized_is_flax_s_to_rounding(transform, groups, two_passes):
  # Flax has no groups under vmap: its pmap is the measure of both.
  layers.assert_equal_to_rounding(
    synchronized(OURS, transform, groups, two_passes),
    synchronized(FLAX, jax.pmap, groups, two_passes),
  )


# A whole model.


class ResNet(nn.Module):
  norm: Any

  @nn.compact
  def __call__(self, x, train):
    def norm(**options):
      return self.norm(use_running_average=not train, momentum=0.9, **options)

    def conv(features, size):
      return nn.Conv(features, (size, size), use_bias=False)

    x = nn.relu(norm()(conv(4, 3)(x)))
    y = nn.relu(norm()(conv(8, 3)(x)))
    x = nn.relu(norm()(conv(8, 3)(y)) + norm()(conv(8, 1)(x)))
    return nn.Dense(4)(x.mean((1, 2)))


IMAGES = jax.random.normal(jax.random.key(2), (16, 4, 4, 3))
LABELS = jax.random.randint(jax.random.key(3), (16,), 0, 4)
OPTIMIZER = optax.sgd(0.3, momentum=0.9)


# It runs a few times only: what the compiler's slow passes would gain is less than they take.
@functools.partial(
  jax.jit, static_argnums=0, compiler_options={"xla_llvm_disable_expensive_passes": True}
)
def five_steps(model, variables, images):
  """Variables after five training steps, the loss of each, and evaluation's logits."""

  def step(carry, _):
    variables, opt_state = carry

    def loss(params):
      logits, new = model.apply(
        {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
      )
      return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), new

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    params = optax.apply_updates(variables["params"], updates)
    return ({"params": params, **new}, opt_state), value

  opt_state = OPTIMIZER.init(variables["params"])
  (variables, _), losses = jax.lax.scan(step, (variables, opt_state), length=5)
  return variables, losses, model.apply(variables, images, train=False)


def initial(norm):
  """Variables with the shapes of init's: random parameters, and the statistics of no batch."""
  shapes = jax.eval_shape(functools.partial(ResNet(norm).init, train=True), KEY, IMAGES)
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    kind = path[-1].key
    if path[0].key == "params":
      return jnp.asarray(rng.normal(kind == "scale", 0.3, shape.shape), shape.dtype)
    return jnp.full(shape.shape, kind == "var", shape.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def assert_alike(ours, theirs, variables):
  """That five steps differ by no more than rounding does after its growth through the network.

  How much that is Flax's own layer says, by its answer to images changed in their last place.
  """
  nudged = five_steps(ResNet(FLAX), variables, jnp.nextafter(IMAGES, jnp.inf))

  def distance(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), a, b)))

  for part in range(3):
    growth = max(distance(nudged[part], theirs[part]), float(jnp.finfo(jnp.float32).eps))
    assert distance(ours[part], theirs[part]) < 16 * growth < 1e-2


@pytest.fixture(scope="module")
def trained_by_flax():
  return five_steps(ResNet(FLAX), initial(FLAX), IMAGES)


def test_a_resnet_with_another_import_has_flax_s_loss_curve(trained_by_flax):
  start = initial(FLAX)
  layers.assert_bit_equal(initial(OURS), start)
  _, losses, _ = trained_by_flax
  assert losses[-1] < 0.9 * losses[0]  # it does learn
  assert_alike(five_steps(ResNet(OURS), start, IMAGES), trained_by_flax, start)


@pytest.mark.parametrize("form", ["orbax", "msgpack"])
def test_a_flax_checkpoint_loads_and_trains_on(trained_by_flax, form, tmp_path):
  saved, _, logits = trained_by_flax
  empty = jax.tree.map(jnp.zeros_like, initial(OURS))
  if form == "orbax":
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / "model", saved)
      checkpointer.wait_until_finished()
      loaded = checkpointer.restore(tmp_path / "model", empty)
  else:
    loaded = flax.serialization.from_bytes(empty, flax.serialization.to_bytes(saved))
  layers.assert_bit_equal(loaded, saved)
  # The same statistics in both: only the last operations of each layer round differently.
  evaluate = jax.jit(functools.partial(ResNet(OURS).apply, train=False))
  layers.assert_equal_to_rounding(evaluate(loaded, IMAGES), logits)
  assert_alike(*(five_steps(ResNet(cls), loaded, IMAGES) for cls in (OURS, FLAX)), loaded)


# Initialization.


class Shared(nn.Module):
  """One layer, called twice in one forward."""

  norm: Any
  axis_name: Any = None

  @nn.compact
  def __call__(self, x):
    layer = self.norm(use_running_average=False, axis_name=self.axis_name, name="norm")
    return layer(2 * layer(x) + 1)


@pytest.mark.parametrize("option", [{}, {"debias": True}, {"momentum": None}], ids=str)
def test_init_never_updates_the_statistics_and_needs_no_axis(option):
  module = Shared(functools.partial(OURS, **option), "b")
  stats = module.init(KEY, X)["batch_stats"]["norm"]
  np.testing.assert_array_equal(stats["mean"], np.zeros(3))
  np.testing.assert_array_equal(stats["var"], np.ones(3))
  np.testing.assert_array_equal(stats.get("count", np.zeros(3)), np.zeros(3))


@pytest.mark.parametrize("norm", [OURS, FLAX])
def test_a_shared_layer_is_updated_by_each_of_its_calls(norm):
  start = Shared(norm).init(KEY, X)
  _, after = train(Shared(norm), start, X)
  layer = norm(use_running_average=False)
  variables = {k: v["norm"] for k, v in start.items()}
  y, variables = train(layer, variables, X)
  _, variables = train(layer, variables, 2 * y + 1)
  layers.assert_bit_equal(after["batch_stats"]["norm"], variables["batch_stats"])


def test_init_needs_neither_values_nor_examples():
  module = OURS(use_running_average=False, axis_name="b")
  full = module.init(KEY, X)
  layers.assert_bit_equal(module.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype)), full)
  layers.assert_bit_equal(module.init(KEY, X[:0]), full)
  layers.assert_bit_equal(module.init(KEY, X * jnp.nan), full)
  chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(module.init, KEY, X), full)


def test_statistics_that_are_missing_start_anew_as_in_flax():
  run = []
  for cls in (OURS, FLAX):
    module = cls(use_running_average=False)
    params = {"params": module.init(KEY, X)["params"]}
    run.append(train(module, params, X)[1])
  layers.assert_equal_to_rounding(*run)


# Flax's transformations.


class Step(nn.Module):
  norm: Any

  @nn.compact
  def __call__(self, x, _):
    return jnp.tanh(self.norm(use_running_average=False, **layers.FIXED)(x)), None


def double(tree):
  return jax.tree.map(lambda v: 2 * v, tree)


def halve(tree):
  return jax.tree.map(lambda v: v / 2, tree)


LIFTED = {
  "vmap": lambda L: nn.vmap(
    L, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
  )(use_running_average=False, **layers.FIXED),
  "vmap, synchronized": lambda L: nn.vmap(
    L,
    variable_axes={"params": None, "batch_stats": None},
    split_rngs={"params": False},
    axis_name="b",
  )(use_running_average=False, axis_name="b", **layers.FIXED),
  "remat": lambda L: nn.remat(L)(use_running_average=False, **layers.FIXED),
  "jit": lambda L: nn.jit(L)(use_running_average=False, axis=[1, 2], **layers.FIXED),
  "map_variables": lambda L: nn.map_variables(
    L, "batch_stats", double, halve, init=True, mutable=True
  )(use_running_average=False, **layers.FIXED),
}


@pytest.mark.parametrize("lift", LIFTED)
def test_lifted_layer_is_flax_s_lifted_layer(lift):
  def run(cls):
    module = LIFTED[lift](cls)
    start = jax.jit(module.init)(KEY, X)

    def loss(params, x):
      y, new = train(module, {**start, "params": params}, x)
      return jnp.sum(jnp.sin(3 * y)), (y, new)

    return start, jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(start["params"], X)

  layers.assert_equal_to_rounding(run(OURS), run(FLAX))


@pytest.mark.parametrize("carried", [False, True], ids=["stacked", "carried"])
def test_scanned_layer_is_flax_s_scanned_layer(carried):
  def run(cls):
    start = jax.jit(Step(cls).init)(KEY, X, None)
    lifts = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
    if not carried:
      lifts = {"variable_axes": {"params": 0, "batch_stats": 0}}
    scan = nn.scan(Step, split_rngs={"params": not carried}, length=3, **lifts)(cls)
    if not carried:
      start = jax.jit(scan.init)(KEY, X, None)
    apply = jax.jit(functools.partial(scan.apply, mutable=["batch_stats"]))
    (y, _), new = apply(start, X, None)
    return start, y, new

  # Three layers, each of which may multiply the rounding of the one before.
  layers.assert_equal_to_rounding(run(OURS), run(FLAX), 8 * float(jnp.finfo(jnp.float32).eps))


def test_tabulate_lists_the_variables():
  assert "batch_stats" in OURS(use_running_average=False).tabulate(KEY, X)


def test_training_steps_compile_once():
  state, call = layers.MAKERS["linen"](X, debias=True, skip_nonfinite=True)
  step = jax.jit(chex.assert_max_traces(call, n=1))
  for _ in range(3):
    _, state = step(state, X)


# Errors.


def test_use_running_average_is_said_exactly_once():
  with pytest.raises(ValueError, match="passed to the constructor and at call time"):
    OURS(use_running_average=False).init(KEY, X, True)
  with pytest.raises(ValueError, match="must be passed to the constructor or at call time"):
    OURS().init(KEY, X)


def test_a_traced_use_running_average_is_refused():
  variables = OURS(use_running_average=False).init(KEY, X)
  with pytest.raises(TypeError, match="a Python bool is needed"):
    jax.jit(lambda flag: OURS().apply(variables, X, flag, mutable=["batch_stats"]))(True)


def test_training_with_immutable_statistics_is_flax_s_error():
  module = OURS(use_running_average=False)
  with pytest.raises(errors.ModifyScopeVariableError, match="batch_stats"):
    module.apply(module.init(KEY, X), X)


@pytest.mark.parametrize("option", [{"debias": True}, {"momentum": None}], ids=str)
def test_a_checkpoint_without_count_says_how_to_add_it(option):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return OURS(use_running_average=False, name="norm", **option)(x)

  plain = FLAX(use_running_average=False)
  old = {k: {"norm": v} for k, v in train(plain, plain.init(KEY, X), X)[1].items()}
  with pytest.raises(ValueError, match=r"batch_stats of norm has a mean but no count.*training"):
    train(Model(), old, X)
  _, new = train(Model(), jaxbn.surgery.stats.add_count(old, 1), X)
  np.testing.assert_array_equal(new["batch_stats"]["norm"]["count"], [2, 2, 2])


@pytest.mark.parametrize(
  ("x", "kw", "error", "says"),
  [
    (np.ones((4, 3), np.int32), {}, TypeError, "int32"),
    (np.ones((4, 3), np.float32), {"mask": np.ones(4, bool)}, ValueError, "mask of shape"),
  ],
  ids=["integer", "mask"],
)
def test_errors_pass_through_a_lifted_jit(x, kw, error, says):
  module = nn.jit(OURS)(use_running_average=False)
  variables = module.init(KEY, np.ones((4, 3), np.float32))
  with pytest.raises(error, match=says):
    module.apply(variables, x, mutable=["batch_stats"], **kw)


def test_an_unbound_axis_is_named_through_a_lifted_jit():
  module = nn.jit(OURS)(use_running_average=False, axis_name="b")
  variables = module.init(KEY, X)
  with pytest.raises(ValueError, match=r"axis_name='b' is not bound here \(bound: none\)"):
    module.apply(variables, X, mutable=["batch_stats"])
