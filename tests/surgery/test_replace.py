"""jaxbn.surgery.replace: other layers, and the same variables, outputs and gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.surgery import Foreign, find, replace, replaced
from tests import layers
from tests.surgery import networks
from tests.surgery.networks import X

NAMES = [*networks.LINEN, "theirs"]
FILTER = nnx.Any(nnx.Param, nnx.BatchStat)
EPS = 1e-12  # in float64: formulas that differ, differ by more, and rounding by far less


def case(name):
  if name == "theirs":
    return networks.WithTheirs(), ("Theirs_0",), {networks.Theirs: networks.THEIRS}
  return *networks.LINEN[name], None


@functools.partial(jax.jit, static_argnums=0)
def everything(model, variables, x):
  """What training gives, with gradients, and evaluation."""

  def loss(params, x):
    given = {**variables, "params": params}
    y, new = model.apply(given, x, train=True, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(y)), (y, new)

  trained = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
  return trained, model.apply(variables, x, train=False)


@pytest.mark.parametrize("name", NAMES)
def test_linen_variables_outputs_and_gradients_are_the_same(name):
  model, norms, foreign = case(name)
  ours = replace(model, foreign=foreign)
  with jax.enable_x64(True):
    x = jnp.asarray(np.asarray(X), jnp.float64)
    variables = networks.init(model, x)
    layers.assert_bit_equal(networks.init(ours, x), variables)
    layers.assert_equal_to_rounding(
      everything(ours, variables, x), everything(model, variables, x), EPS
    )
  assert [layer.path for layer in replaced(ours)] == list(norms)
  assert isinstance(ours, type(model))


def nnx_networks():
  return {
    "graph": (networks.nnx_network(), networks.NNX_NORMS, None),
    "theirs": (networks.nnx_with_theirs(), ["layers/1"], {networks.NnxTheirs: networks.NNX_THEIRS}),
  }


@functools.partial(nnx.jit, static_argnums=2)
def everything_in_nnx(model, x, train):
  loss = lambda model, x: (jnp.sum(jnp.sin(y := model(x))), y)  # noqa: E731
  return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x)


@pytest.mark.parametrize("name", ["graph", "theirs"])
def test_nnx_variables_outputs_and_gradients_are_the_same(name):
  with jax.enable_x64(True):
    x = jnp.asarray(np.asarray(X), jnp.float64)
    model, norms, foreign = nnx_networks()[name]
    nnx.update(model, networks.in_double_precision(nnx.state(model, FILTER)))
    before = networks.snapshot(model)
    ours = replace(model, foreign=foreign)
    assert [layer.path for layer in replaced(ours)] == list(norms)
    layers.assert_bit_equal(networks.snapshot(ours), before)
    for train in (True, False):
      for m in (model, ours):
        (m.train if train else m.eval)()
        m.set_attributes(deterministic=True, raise_if_not_found=False)
        if name == "theirs":
          m.layers[1].training = train
      layers.assert_equal_to_rounding(
        everything_in_nnx(ours, x, train), everything_in_nnx(model, x, train), EPS
      )
    layers.assert_equal_to_rounding(networks.snapshot(ours), networks.snapshot(model), EPS)


def test_a_copy_leaves_the_graph_as_it_was_and_false_changes_it():
  model = networks.nnx_network()
  replace(model)
  assert type(model.blocks[0].norm) is nnx.BatchNorm
  assert replace(model, copy=False) is model
  assert type(model.blocks[0].norm) is jaxbn.nnx.BatchNorm
  assert model.named["shared"] is model.blocks[0].norm
  assert isinstance(model.named["own"], networks.NnxOwn)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_options_rules_and_predicates(kind):
  """Virtual batches of half the batch are two batches, in the layers that are meant."""
  renorm = functools.partial(getattr(jaxbn, kind).BatchRenorm, r_max=3.0)
  rule = lambda path, layer: {  # noqa: E731
    "a": {"virtual_batch_size": 4},
    "b": {"unbiased": True},
    "c": renorm,
    "d": None,
  }[path[-1]]

  if kind == "linen":

    class Network(nn.Module):
      @nn.compact
      def __call__(self, x):
        return [nn.BatchNorm(use_running_average=False, name=name)(x) for name in "abcde"]

    model = Network()
    new = replace(model, rule, where=lambda path, layer: path[-1] != "e", momentum=0.5)
    variables = new.init(jax.random.key(0), X)
    ys, stats = new.apply(variables, X, mutable=["batch_stats"])
    stats = stats["batch_stats"]
  else:

    class Network(nnx.Module):
      def __init__(self):
        for name in "abcde":
          setattr(self, name, nnx.BatchNorm(3, rngs=nnx.Rngs(0)))

      def __call__(self, x):
        return [getattr(self, name)(x) for name in "abcde"]

    new = replace(Network(), rule, where=lambda path, layer: path[-1] != "e", momentum=0.5)
    ys = new(X)
    stats = nnx.to_pure_dict(nnx.state(new, nnx.BatchStat))

  found = {layer.path: layer for layer in find(new, X)}
  assert found["c"].kind is renorm.func
  assert found["c"].options["r_max"] == 3.0
  assert found["d"].options["momentum"] == 0.99
  standardized = lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)  # noqa: E731
  halves = jnp.concatenate([standardized(X[:4]), standardized(X[4:])])
  layers.assert_equal_to_rounding(ys[0], halves)
  layers.assert_equal_to_rounding(ys[1], standardized(X))
  np.testing.assert_allclose(stats["b"]["var"], 0.5 + 0.5 * X.var(0) * 8 / 7, rtol=1e-5)
  np.testing.assert_allclose(stats["d"]["mean"], 0.01 * X.mean(0), rtol=1e-5)
  np.testing.assert_allclose(stats["e"]["mean"], 0.01 * X.mean(0), rtol=1e-5)
  assert [layer.path for layer in replaced(new)] == ["a", "b", "c"]


def test_a_rule_may_give_a_layer():
  ours = jaxbn.linen.BatchNorm(use_running_average=False, activation=nn.relu)
  model = replace(networks.PreActivation(), lambda path, layer: ours)
  (layer,) = find(model, X, train=False)
  assert (layer.kind, layer.options["activation"], layer.calls) == (type(ours), nn.relu, 1)


def test_methods_functions_parts_and_two_replacements():
  model = networks.CalledTwice()
  doubled = replace(replace(model, unbiased=True), virtual_batch_size=4)
  variables = model.init(jax.random.key(0), X)
  expected, _ = model.apply(
    variables, X[:4], train=True, mutable=["batch_stats"], method="features"
  )
  for method in ("features", lambda m, x, train: m.norm(m.dense(x), not train)):
    y, _ = doubled.apply(variables, X, train=True, mutable=["batch_stats"], method=method)
    layers.assert_equal_to_rounding(y[:4], expected)
  bound = doubled.bind(variables, mutable=["batch_stats"])
  layers.assert_equal_to_rounding(bound.features(X)[:4], expected)

  class Outer(nn.Module):
    inner: nn.Module

    def __call__(self, x):
      return self.inner(x)

  within = Outer(doubled).init(jax.random.key(0), X)
  layers.assert_bit_equal(within["params"]["inner"], variables["params"])
  assert [layer.path for layer in replaced(doubled)] == ["norm", "inner/norm"]


def test_a_variable_that_is_new_is_there_for_each_of_a_stack():
  renorm = functools.partial(jaxbn.nnx.BatchRenorm, r_max=lambda step: 1.0 + step)
  model = replace(networks.nnx_network(), lambda path, layer: renorm)
  model(X)
  np.testing.assert_array_equal(model.scanned.norm.step[...], [1, 1, 1])
  np.testing.assert_array_equal(model.blocks[0].norm.step[...], 2)  # called twice


def test_jit_tells_the_two_apart():
  inner = nn.jit(nn.BatchNorm)

  class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
      return inner(use_running_average=False)(x)

  model, ours = Jitted(), replace(Jitted(), virtual_batch_size=4)
  variables = model.init(jax.random.key(0), X)
  run = jax.jit(lambda m, v, x: m.apply(v, x, mutable=["batch_stats"])[0], static_argnums=0)
  before = run(model, variables, X)
  assert jnp.max(jnp.abs(run(ours, variables, X) - before)) > 0.1
  layers.assert_bit_equal(run(model, variables, X), before)


def test_nothing_replaced_is_an_error_that_says_what_there_is():
  message = r"nothing .* in this Sequential: .* There are .*Dense.* foreign="
  with pytest.raises(ValueError, match=message):
    replace(nn.Sequential([nn.Dense(2)])).init(jax.random.key(0), X)
  with pytest.raises(ValueError, match=r"There are .*Linear"):
    replace(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
  nowhere = lambda path, layer: False  # noqa: E731
  with pytest.raises(ValueError, match=r"it has .* blocks/0/norm, .* takes none"):
    replace(networks.nnx_network(), where=nowhere)
  with pytest.raises(ValueError, match=r"it has batch norms in BatchNorm_0, .* takes none"):
    replace(networks.PreActivation(), where=nowhere).init(jax.random.key(0), X)
  with pytest.raises(ValueError, match="after it was initialized"):
    replaced(replace(networks.PreActivation()))


def test_options_that_cannot_be():
  with pytest.raises(
    TypeError, match=r"'axisname' is no option of BatchNorm, which has .*axis_name"
  ):
    replace(networks.PreActivation(), axisname="batch")
  with pytest.raises(ValueError, match="never changed"):
    replace(networks.PreActivation(), copy=False)
  with pytest.raises(TypeError, match="the rule gave 3 for BatchNorm blocks/0/norm"):
    replace(networks.nnx_network(), lambda path, layer: 3)
  with pytest.raises(ValueError, match=r"norm has no leaf count.*\.add_count"):
    replace(networks.nnx_network(), debias=True)
  theirs = {networks.NnxTheirs: networks.NNX_THEIRS}
  with pytest.raises(ValueError, match="NnxTheirs layers/1 is not Flax's and has no leaf count"):
    replace(networks.nnx_with_theirs(), foreign=theirs, debias=True)
  with pytest.raises(TypeError, match="'param_dtype' is no option for NnxTheirs"):
    replace(networks.nnx_with_theirs(), foreign=theirs, param_dtype=jnp.bfloat16)
  unread = replace(
    networks.nnx_with_theirs(), foreign={networks.NnxTheirs: Foreign(training="training")}
  )
  with pytest.raises(ValueError, match="NnxTheirs has no variable 'mean' or 'var'"):
    unread(X)
