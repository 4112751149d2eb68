"""jaxbn.surgery.param_labels and decay_mask: parameters by what they are to their layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn.linen
from jaxbn.surgery import decay_mask, param_labels
from tests.surgery import networks
from tests.surgery.networks import X


class Named(nn.Module):
  """Names say nothing: a kernel is called scale, and a norm bias."""

  @nn.compact
  def __call__(self, x, train=True):
    x = jaxbn.linen.WSDense(3, name="bias")(x)
    x = nn.LayerNorm(name="kernel")(networks.norm(train, name="head")(x))
    x = jaxbn.linen.SkipInit(name="skip")(x)
    return x * self.param("scale", nn.initializers.ones, (3,))


def test_labels_are_the_layers_and_not_the_names():
  labels = param_labels(Named(), X)
  assert labels == {
    "bias": {"kernel": "kernel", "gain": "bias", "bias": "bias"},
    "kernel": {"scale": "norm", "bias": "norm"},
    "head": {"scale": "norm", "bias": "norm"},
    "skip": {"scale": "norm"},
    "scale": "other",
  }
  mask = decay_mask(Named(), X, train=False)
  assert jax.tree.map(lambda label: label in ("kernel", "other"), labels) == mask
  frozen = param_labels(Named(), X, labels={"norm": "frozen"})
  assert frozen["head"] == {"scale": "frozen", "bias": "frozen"}


def test_stacks_foreign_norms_and_classes_of_one_s_own():
  variables = jax.eval_shape(lambda: networks.Scanned().init(jax.random.key(0), X))
  assert param_labels(networks.Scanned(), X, variables=variables)["Scan_Step_0"] == {
    "Dense_0": {"kernel": "kernel", "bias": "bias"},
    "BatchNorm_0": {"scale": "norm", "bias": "norm"},
  }
  norm, other = ({"gamma": label, "beta": label} for label in ("norm", "other"))
  theirs, model = networks.Theirs, networks.WithTheirs()
  assert param_labels(model, X)["Theirs_0"] == other
  assert param_labels(model, X, norms=[theirs])["Theirs_0"] == norm
  assert param_labels(model, X, foreign={theirs: networks.THEIRS})["Theirs_0"] == norm


def test_an_optimizer_of_optax_takes_them_for_linen():
  variables = networks.init(Named(), X)
  labels = param_labels(Named(), X, variables=variables)
  rates = {"norm": optax.set_to_zero(), "bias": optax.sgd(1.0), "other": optax.sgd(2.0)}
  optimizer = optax.multi_transform({**rates, "kernel": optax.sgd(3.0)}, labels)
  params = variables["params"]
  updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params))
  assert [float(jnp.max(updates["bias"][v])) for v in ("kernel", "gain")] == [-3.0, -1.0]
  assert not updates["head"]["scale"].any()
  decay = optax.add_decayed_weights(0.5, mask=decay_mask(Named(), X))
  updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
  np.testing.assert_array_equal(updates["bias"]["kernel"], 0.5 * params["bias"]["kernel"])
  assert not updates["head"]["scale"].any()


def test_and_for_nnx():
  model = networks.nnx_network()
  optimizer = nnx.Optimizer(
    model,
    optax.chain(optax.add_decayed_weights(0.5, decay_mask(model)), optax.sgd(1.0)),
    wrt=nnx.Param,
  )
  before = networks.snapshot(model)
  optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
  norm, dense = model.scanned.norm, model.scanned.dense
  np.testing.assert_array_equal(norm.scale[...], before["scanned"]["norm"]["scale"])
  np.testing.assert_array_equal(dense.bias[...], before["scanned"]["dense"]["bias"])
  np.testing.assert_array_equal(dense.kernel[...], 0.5 * before["scanned"]["dense"]["kernel"])


def test_what_cannot_be_is_said():
  with pytest.raises(ValueError, match="labels has 'scale', but there are norm, bias"):
    param_labels(Named(), X, labels={"scale": "frozen"})
  with pytest.raises(ValueError, match="this Dropout has no parameters"):
    param_labels(nn.Dropout(0.5, deterministic=True), X)
