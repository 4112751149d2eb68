"""jaxbn.surgery.freeze: batch norms evaluate, and the rest trains."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from jaxbn.surgery import freeze, replace
from tests import layers
from tests.surgery import networks
from tests.surgery.networks import X


@pytest.mark.parametrize("kind", ["flax", "ours", "around ours"])
def test_linen_evaluates_whatever_is_asked_for(kind):
  model = networks.Everything()
  variables = networks.init(model, X)
  frozen = {
    "flax": freeze(model),
    "ours": freeze(replace(model)),
    "around ours": replace(freeze(model)),
  }[kind]
  expected = model.apply(variables, X, train=False)
  y, new = frozen.apply(variables, X, train=True, mutable=["batch_stats"])
  layers.assert_equal_to_rounding(y, expected)
  layers.assert_bit_equal(new["batch_stats"], variables["batch_stats"])


def test_dropout_and_parameters_train():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return nn.Dropout(0.5, deterministic=not train)(networks.norm(train)(x))

  model = freeze(Network())
  variables = networks.init(Network(), X)
  draw = {"rngs": {"dropout": jax.random.key(0)}}

  def loss(params):
    return model.apply({**variables, "params": params}, X, train=True, **draw).sum()

  grads = jax.grad(loss)(variables["params"])["BatchNorm_0"]
  y = Network().apply(variables, X, train=False)
  kept = np.asarray(model.apply(variables, X, train=True, **draw)) != 0
  assert 0 < kept.sum() < kept.size
  np.testing.assert_allclose(grads["bias"], 2 * kept.sum(0))
  layers.assert_equal_to_rounding(
    model.apply(variables, X, train=True, **draw), jnp.where(kept, 2 * y, 0)
  )
  layers.assert_bit_equal(
    jax.eval_shape(lambda: networks.init(model, X)),
    jax.eval_shape(lambda: networks.init(Network(), X)),
  )


def test_some_layers_only():
  model = networks.Bare()
  variables = networks.init(model, X)
  some = freeze(model, where=lambda path, layer: layer.options["epsilon"] == 1e-3)
  _, new = some.apply(variables, X, train=True, mutable=["batch_stats"])
  same = jax.tree.map(
    lambda a, b: bool((a == b).all()), new, {"batch_stats": variables["batch_stats"]}
  )
  assert [all(v.values()) for _, v in sorted(same["batch_stats"].items())] == [False, True, False]


def test_nnx_stays_frozen_in_training_mode():
  model = networks.nnx_network()
  model.blocks[0].norm.mean[...] = jnp.ones(3)
  frozen = freeze(model)
  model.eval()
  expected = model(X)
  frozen.train()
  assert not frozen.dropout.deterministic
  frozen.dropout.deterministic = True
  before = networks.snapshot(model)
  layers.assert_equal_to_rounding(nnx.jit(lambda m, x: m(x))(frozen, X), expected)
  layers.assert_bit_equal(networks.snapshot(frozen), before)
  assert freeze(model, copy=False) is model


def test_those_that_are_not_flax_s():
  model = networks.WithTheirs()
  variables = networks.init(model, X)
  frozen = freeze(model, foreign={networks.Theirs: networks.THEIRS})
  y, new = frozen.apply(variables, X, train=True, mutable=["batch_stats"])
  layers.assert_equal_to_rounding(y, model.apply(variables, X, train=False))
  layers.assert_bit_equal(new["batch_stats"], variables["batch_stats"])
  theirs = networks.nnx_with_theirs()
  frozen = freeze(theirs, foreign={networks.NnxTheirs: networks.NNX_THEIRS})
  y = frozen(X)
  theirs.layers[1].training = False
  layers.assert_equal_to_rounding(y, theirs(X))


def test_nothing_to_freeze_is_an_error():
  with pytest.raises(ValueError, match=r"nothing was frozen in this Sequential.*Dense"):
    freeze(nn.Sequential([nn.Dense(2)])).init(jax.random.key(0), X)
  with pytest.raises(ValueError, match=r"NnxNetwork: it has .* blocks/0/norm, .* where="):
    freeze(networks.nnx_network(), where=lambda path, layer: False)
  with pytest.raises(ValueError, match="never changed"):
    freeze(networks.PreActivation(), copy=False)


def test_a_missing_collection_is_said_with_the_layer_and_the_mend():
  model = networks.Bare()
  params = {"params": networks.init(model, X)["params"]}
  with pytest.raises(errors.ScopeCollectionNotFound, match=r"Norm_0.*pass to apply all"):
    freeze(model).apply(params, X, train=True)
