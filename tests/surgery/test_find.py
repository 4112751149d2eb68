"""jaxbn.surgery.find: which layers a network has, and what is said of each."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.surgery import Foreign, find
from tests import layers
from tests.surgery import networks
from tests.surgery.networks import X


@pytest.mark.parametrize("name", networks.LINEN)
@pytest.mark.parametrize("train", [True, False])
def test_each_norm_is_found_where_its_variables_are(name, train):
  model, norms = networks.LINEN[name]
  found = find(model, X, train=train)
  assert [layer.path for layer in found] == list(norms)
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), X))
  for layer in found:
    assert layer.kind is nn.BatchNorm
    assert layer.evaluating is (not train)
    assert layer.calls == (2 if name == "called twice" else 1)
    parameters = {v for v in ("scale", "bias") if layer.options[f"use_{v}"]}
    assert layer.variables.keys() == {"mean", "var"} | parameters
    for place in layer.variables.values():
      leaf = variables
      for key in place:
        leaf = leaf[key]
      assert leaf.shape == layer.stacked + layer.shape
  (stacked, *_) = (layer.stacked for layer in found)
  assert stacked == {"scan": (3,), "vmap": (2,)}.get(name, ())


def test_options_are_those_of_the_constructor():
  (_, second, third) = find(networks.Bare(), X, train=False)
  assert second.options["epsilon"] == 1e-3
  assert third.options["axis"] == 1
  assert nn.BatchNorm(**third.options).momentum == 0.9


def test_a_mode_that_hangs_on_what_may_change_is_not_flipped():
  (layer,) = find(networks.ByMutability(), X)
  assert layer.evaluating


def test_other_kinds_with_their_shapes_and_calls():
  x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
  (layer,) = find(networks.CalledTwice(), x, kinds=[nn.Dense])
  assert (layer.path, layer.kind, layer.calls) == ("dense", nn.Dense, 2)
  assert layer.input == layer.output == x
  assert layer.options["features"] == 3
  assert find(networks.CalledTwice(), X, kinds=[nn.Conv]) == []
  (layer,) = find(networks.CalledTwice(), X, method="features")
  assert layer.calls == 1


def test_our_layers_are_found_as_what_they_are():
  (layer,) = find(jaxbn.linen.BatchRenorm(r_max=3.0), X, use_running_average=False)
  assert (layer.kind, layer.path) == (jaxbn.linen.BatchRenorm, "")
  assert layer.options["r_max"] == 3.0
  assert repr(layer) == "BatchRenorm (the top)"
  renorm = jaxbn.nnx.BatchRenorm(3, r_max=2.0, axis=1, momentum=0.5, rngs=nnx.Rngs(0))
  (layer,) = find(renorm)
  assert [layer.options[name] for name in ("r_max", "axis", "momentum")] == [2.0, 1, 0.5]


@pytest.mark.parametrize("example", [(), (X,)])
def test_a_graph_is_searched_or_run(example):
  model = networks.nnx_network()
  before = networks.snapshot(model)
  found = find(model, *example)
  assert sorted(layer.path for layer in found) == sorted(networks.NNX_NORMS)
  by_path = {layer.path: layer for layer in found}
  assert by_path["scanned/norm"].stacked == (3,)
  assert by_path["scanned/norm"].shape == (3,)
  assert by_path["scanned/norm"].options["momentum"] == 0.9
  assert by_path["blocks/1/norm"].variables.keys() == {"mean", "var", "bias"}
  assert by_path["named/own"].variables["mean"] == ("named", "own", "mean")
  assert all(layer.kind is nnx.BatchNorm for layer in found)
  if example:
    assert [layer.calls for layer in found] == [2, 1, 1, 1]
    assert by_path["named/own"].input.shape == (8, 3)
    assert not found[0].evaluating
  layers.assert_bit_equal(networks.snapshot(model), before)
  assert type(model.named["own"]) is networks.NnxOwn


def test_variables_that_are_not_there_or_not_wanted():
  model = networks.PreActivation()
  params = {"params": model.init(jax.random.key(0), X)["params"]}
  with pytest.raises(ValueError, match=r"lacks what a layer needs.*BatchNorm_0.*Give all"):
    find(model, X, variables=params)
  with pytest.raises(TypeError, match="leave variables out"):
    find(networks.nnx_network(), variables=params)


def test_a_layer_that_is_not_flax_s():
  class Theirs(nn.Module):
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x, train):
      return x - self.variable("batch_stats", "average", jnp.zeros, (1, 3)).value

  class Network(nn.Module):
    norm: Any = Theirs

    @nn.compact
    def __call__(self, x):
      return self.norm()(x, train=True)

  reading = Foreign(training="train", variables={"mean": "average"})
  (layer,) = find(Network(), X, foreign={Theirs: reading})
  assert (layer.kind, layer.path, layer.shape) == (Theirs, "Theirs_0", (1, 3))
  assert not layer.evaluating
  reading = dataclasses.replace(reading, training="training")
  with pytest.raises(ValueError, match=r"of Theirs .* this call, which has x, train"):
    find(Network(), X, foreign={Theirs: reading})
