"""What holds for every NNX layer: what Flax's own tools, and code written for Flax, see of it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxbn.nnx
from tests import layers

EVERY = layers.EVERY_NNX


def test_every_layer_is_here():
  assert {name.partition(",")[0] for name in EVERY} == set(jaxbn.nnx.__all__) - {
    "prediction_time",
    "Whitening",
  }


@pytest.mark.parametrize("name", layers.BATCH_NORMS)
def test_a_batch_norm_is_one_of_flax_s(name):
  # As public code does it to evaluate, and to leave the statistics alone.
  make, args, _ = EVERY[name]
  model = nnx.Sequential(make(nnx.Rngs(0)))
  norms = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)]
  assert len(norms) == 1
  norms[0].use_running_average = True
  before = jax.tree.map(lambda v: v, nnx.to_pure_dict(nnx.state(model)))
  model(*args)
  layers.assert_bit_equal(nnx.to_pure_dict(nnx.state(model)), before)


def test_flax_s_constructor_and_call_are_never_reached(monkeypatch):
  def reached(*args, **kwargs):
    raise AssertionError("Flax's own")

  monkeypatch.setattr(nnx.BatchNorm, "__init__", reached)
  monkeypatch.setattr(nnx.BatchNorm, "__call__", reached)
  for name in layers.BATCH_NORMS:
    make, args, _ = EVERY[name]
    make(nnx.Rngs(0))(*args)


@pytest.mark.parametrize("name", EVERY)
def test_statistics_averaged_over_devices_keep_their_types(name):
  make, args, _ = EVERY[name]
  graphdef, stats, rest = nnx.split(make(nnx.Rngs(0)), nnx.BatchStat, ...)

  def step(stats, _):
    layer = nnx.merge(graphdef, stats, rest, copy=True)
    layer(*args)
    return jax.lax.pmean(nnx.state(layer, nnx.BatchStat), "devices"), None

  def steps(stats):
    return jax.lax.scan(step, stats, length=2)[0]

  after = jax.vmap(steps, axis_name="devices", axis_size=2, in_axes=None)(stats)
  assert jax.tree.map(lambda v: v.dtype, after) == jax.tree.map(lambda v: v.dtype, stats)


@pytest.mark.parametrize("kind", ["hijax", "ref"])
@pytest.mark.parametrize("name", [name for name in EVERY if not name.endswith("Cell")])
def test_a_captured_layer_of_mutable_variables_evaluates(name, kind):
  # (Not in nnx.RNN, which captures no cell of Flax's own either.)
  make, args, evaluates = EVERY[name]
  with nnx.var_defaults(**{kind: True}):
    layer = make(nnx.Rngs(0))
  plain = make(nnx.Rngs(0))
  if name == "ReferenceBatchNorm":
    layer(*args), plain(*args)
    args = args[:1]
  if evaluates:
    layer.eval(), plain.eval()
  layers.assert_equal_to_rounding(jax.jit(lambda: layer(*args))(), plain(*args))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("axes", [(1, -1), (-1, 1)], ids=str)
@pytest.mark.parametrize("name", [n for n, e in EVERY.items() if e.evaluates and "Cell" not in n])
def test_a_checkpoint_may_have_axes_of_size_one(name, axes, train):
  # Other libraries' (1, channels); and what is written keeps the checkpoint's shape.
  def reshaped(variable):
    value = variable[...]
    return variable.replace(value.reshape(axes)) if value.ndim == 1 else variable

  def run(change):
    make, args, _ = EVERY[name]
    layer = make(nnx.Rngs(0))
    is_variable = {"is_leaf": lambda v: isinstance(v, nnx.Variable)}
    nnx.update(layer, jax.tree.map(change, nnx.state(layer, nnx.BatchStat), **is_variable))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer)))
    y = layer(*args, use_running_average=not train)
    state = nnx.to_pure_dict(nnx.state(layer))
    assert jax.tree.map(jnp.shape, state) == shapes
    return y, jax.tree.map(jnp.ravel, state)

  layers.assert_bit_equal(run(reshaped), run(lambda variable: variable))


def test_predictions_need_no_count():
  # As of a Flax checkpoint that was put into a layer without one.
  layer = make_without_count()
  plain = jaxbn.nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
  y, expected = (jaxbn.nnx.prediction_time(m, 2.0)(layers.EXAMPLES) for m in (layer, plain))
  layers.assert_bit_equal(y, expected)
  layers.assert_bit_equal(layer(layers.EXAMPLES), plain(layers.EXAMPLES))


def make_without_count():
  layer = jaxbn.nnx.BatchNorm(4, use_running_average=True, debias=True, rngs=nnx.Rngs(0))
  del layer.count
  return layer


@pytest.mark.parametrize("name", EVERY)
def test_ranks_and_dtypes_are_promoted_explicitly(name):
  make, args, evaluates = EVERY[name]
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    layer = make(nnx.Rngs(0))
    for mode in [layer.train, layer.eval] if evaluates else [layer.train]:
      mode()
      nnx.grad(lambda layer, x: jnp.sum(layer(x, *args[1:])), argnums=(0, 1))(layer, args[0])
