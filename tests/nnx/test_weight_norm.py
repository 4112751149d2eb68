"""Weight normalization in NNX: bit-equal to Linen's, and what Flax's layer does not do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx

X = np.random.default_rng(0).normal(3, 2, (16, 6, 6, 3)).astype(np.float32)


class Net(nnx.Module):
  def __init__(self, use_bias=True):
    rngs = nnx.Rngs(0)
    conv = nnx.Conv(3, 4, (3, 3), use_bias=use_bias, rngs=rngs)
    self.conv = jaxbn.nnx.WeightNorm(conv)
    self.centre = None if use_bias else jaxbn.nnx.MeanOnlyBatchNorm(4, rngs=rngs)
    self.dense = jaxbn.nnx.WeightNorm(nnx.Linear(4, 5, rngs=rngs))

  def __call__(self, x):
    x = self.conv(x)
    x = x if self.centre is None else self.centre(x)
    return x, self.dense(nnx.relu(x))


def test_it_starts_as_the_layers_are():
  model = Net()
  # The norm of n <= 27 elements and the product with 1 / norm round to about n/2 + 4 places.
  kernel = model.conv.layer.kernel[...]
  y = nnx.jit(lambda model: model(X)[0])(model)
  np.testing.assert_allclose(y, model.conv.layer(X), atol=27 * 2**-24 * 27 * 20)
  np.testing.assert_array_equal(model.conv.layer.kernel[...], kernel)  # a call leaves it


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_call_in_that_mode_normalizes_every_layer_s_first_batch(use_bias):
  model = Net(use_bias)
  model.set_attributes(initializing=True)
  nnx.jit(lambda model: model(X))(model)
  model.set_attributes(initializing=False)
  for y in nnx.jit(lambda model: model(X))(model):
    axes = tuple(range(y.ndim - 1))
    np.testing.assert_allclose(y.mean(axes), 0, atol=1e-5)  # 600 elements of order 1
    np.testing.assert_allclose(y.std(axes), 1, atol=1e-5)


@pytest.mark.optimized
def test_it_is_linen_s_bit_for_bit():
  x = X[:, 0, 0]
  variables = jaxbn.linen.WeightNorm(nn.Dense(4)).init(jax.random.key(0), x)
  params = variables["params"]
  dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  dense.kernel.set_value(params["kernel"])
  layer = jaxbn.nnx.WeightNorm(dense, initializing=True)
  y = layer(x)
  np.testing.assert_array_equal(layer.scale[...], params["scale"])
  np.testing.assert_array_equal(dense.bias[...], params["bias"])
  np.testing.assert_array_equal(y, jaxbn.linen.WeightNorm(nn.Dense(4)).apply(variables, x))


def test_length_and_direction_are_both_trained():
  model = jaxbn.nnx.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  scale, kernel = model.scale[...], model.layer.kernel[...]
  gradient = nnx.grad(lambda model: jnp.sum(model(X[:, 0, 0]) ** 2))(model)
  optimizer.update(model, gradient)
  assert np.all(model.scale[...] != scale)
  assert np.all(model.layer.kernel[...] != kernel)


def test_what_has_no_kernel_is_refused():
  with pytest.raises(ValueError, match="layer=LayerNorm has no kernel"):
    jaxbn.nnx.WeightNorm(nnx.LayerNorm(3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"debias": True}, {"use_bias": False}])
def test_mean_only_is_linen_s(options):
  x = X[:, 0, 0]
  mask = (np.arange(16) % 3 > 0)[:, None]
  linen = jaxbn.linen.MeanOnlyBatchNorm(masked_value=7.0, **options)
  variables = linen.init(jax.random.key(0), x, False)
  layer = jaxbn.nnx.MeanOnlyBatchNorm(3, masked_value=7.0, rngs=nnx.Rngs(0), **options)
  for _ in range(2):
    expected, new = linen.apply(variables, x, False, mask=mask, mutable=["batch_stats"])
    variables = {**variables, **new}
    np.testing.assert_array_equal(layer(x, mask=mask), expected)
    np.testing.assert_array_equal(layer.mean[...], new["batch_stats"]["mean"])
  layer.eval()
  np.testing.assert_array_equal(layer(x), linen.apply(variables, x, True))
  np.testing.assert_array_equal(nnx.view(layer, use_running_average=True)(x), layer(x))


def test_mean_only_needs_a_mode():
  layer = jaxbn.nnx.MeanOnlyBatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"choose with train\(\) and eval\(\)"):
    layer(X)
