"""Weight normalization in Linen: the first batch, Flax's layer, the running mean."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from tests.variants.table import double_precision  # noqa: F401

X = np.random.default_rng(0).normal(3, 2, (16, 6, 6, 3))


class Net(nn.Module):
  data_dependent_init: bool = True
  mean_only: bool = False

  @nn.compact
  def __call__(self, x, train=True):
    seen = []
    for layer in (nn.Conv(4, (3, 3), param_dtype=float), nn.Dense(5, param_dtype=float)):
      if self.mean_only:
        layer = layer.clone(use_bias=False)
      x = jaxbn.linen.WeightNorm(layer, data_dependent_init=self.data_dependent_init)(x)
      if self.mean_only:
        x = jaxbn.linen.MeanOnlyBatchNorm(param_dtype=float)(x, not train)
      seen.append(x)
      x = nn.relu(x)
    return seen


def test_init_normalizes_every_layer_s_first_batch():
  variables = jax.jit(Net().init)(jax.random.key(0), X)
  for y in jax.jit(Net().apply)(variables, X):
    axes = tuple(range(y.ndim - 1))
    np.testing.assert_allclose(y.mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(axes), 1, rtol=1e-6)


def test_without_data_it_starts_as_the_layer_does():
  dense = nn.Dense(5, param_dtype=float)
  layer = jaxbn.linen.WeightNorm(dense, data_dependent_init=False)
  key, x = jax.random.key(3), X[..., 0].reshape(16, -1)
  variables = jax.jit(layer.init)(key, x)
  plain = {"params": {k: v for k, v in variables["params"].items() if k != "scale"}}
  np.testing.assert_allclose(layer.apply(variables, x), dense.apply(plain, x), rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_flax_s_layer():
  x = X[:, 0, 0]
  ours = jaxbn.linen.WeightNorm(nn.Dense(4, param_dtype=float))
  params = jax.jit(ours.init)(jax.random.key(0), x)["params"]
  theirs = nn.WeightNorm(nn.Dense(4, param_dtype=float), param_dtype=float)

  def as_theirs(p):
    of_layer = {"kernel": p["kernel"], "bias": p["bias"]}
    return {"layer_instance": of_layer, "layer_instance/kernel/scale": p["scale"]}

  def loss(apply):
    return lambda p: jnp.sum(jnp.sin(apply({"params": p}, x)))

  ours_gradient = jax.jit(jax.grad(loss(ours.apply)))(params)
  expected = jax.jit(jax.grad(lambda p: loss(theirs.apply)(as_theirs(p))))(params)
  chex.assert_trees_all_close(dict(ours_gradient), dict(expected), rtol=1e-9, atol=1e-9)


def test_names_of_mesh_axes_stay_on_the_parameters():
  kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
  bias_init = nn.with_partitioning(nn.initializers.zeros, ("model",))
  layer = jaxbn.linen.WeightNorm(nn.Dense(4, kernel_init=kernel_init, bias_init=bias_init))
  x = X[:, 0, 0]
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  specs = nn.get_partition_spec(variables)["params"]
  assert specs["kernel"] == jax.P(None, "model")
  assert specs["bias"] == jax.P("model")
  np.testing.assert_allclose(jax.jit(layer.apply)(variables, x).mean(0), 0, atol=1e-5)


def test_what_has_no_kernel_is_refused():
  layer = jaxbn.linen.WeightNorm(nn.LayerNorm())
  with pytest.raises(ValueError, match=r"layer=LayerNorm has the parameters \['bias', 'scale'\]"):
    layer.init(jax.random.key(0), X)


def test_mean_only_trains_with_the_batch_s_mean_and_evaluates_with_the_running_one():
  net = Net(mean_only=True)
  variables = jax.jit(net.init)(jax.random.key(0), X)
  assert set(variables["batch_stats"]["MeanOnlyBatchNorm_0"]) == {"mean"}
  chex.assert_trees_all_equal(
    variables["batch_stats"], jax.tree.map(jnp.zeros_like, variables["batch_stats"])
  )
  ys, new = jax.jit(lambda v: net.apply(v, X, mutable=["batch_stats"]))(variables)
  np.testing.assert_allclose(ys[0].mean((0, 1, 2)), 0, atol=1e-6)
  np.testing.assert_allclose(ys[0].std((0, 1, 2)), 1, rtol=1e-6)  # by the first scale
  mean = new["batch_stats"]["MeanOnlyBatchNorm_0"]["mean"]
  evaluated = jax.jit(lambda v: net.apply(v, X, train=False)[0])({**variables, **new})
  # The running mean is a hundredth of the batch's, by which the two differ.
  np.testing.assert_allclose(ys[0] + 100 * mean - evaluated, mean * np.ones_like(ys[0]), atol=1e-4)


def test_mean_only_of_valid_elements_of_all_devices():
  x, mask = X[:8, 0, 0], (np.arange(8) % 3 > 0)[:, None]
  options = {"use_running_average": False, "masked_value": 0.0, "param_dtype": float}
  layer = jaxbn.linen.MeanOnlyBatchNorm(axis_name="batch", momentum=None, **options)
  variables = layer.init(jax.random.key(0), x)
  assert set(variables["batch_stats"]) == {"mean", "count"}

  def shard(x, mask):
    return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

  shards = np.where(mask, x, np.nan).reshape(4, 2, 3), mask.reshape(4, 2, 1)
  y, new = jax.jit(jax.vmap(shard, axis_name="batch"))(*shards)
  mean = x[mask[:, 0]].mean(0)
  np.testing.assert_allclose(y.reshape(8, 3), np.where(mask, x - mean, 0), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(new["batch_stats"]["mean"][2], mean, rtol=1e-6)
  assert np.all(new["batch_stats"]["count"] == 1)
