"""jaxbn.surgery.insert: batch norms, and the same outputs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.surgery import insert
from tests.surgery.networks import randomly

RNG = np.random.default_rng(0)
ALL = np.asarray(RNG.normal(1, 2, (6, 5, 5, 2)), np.float32)
BATCHES = [jnp.asarray(ALL[:4]), jnp.asarray(ALL[4:])]
CHANNELS = 3
SUMS = 2e-6  # of float32's sums over 150 elements of like size, relative: 16 ulp


class Vgg(nn.Module):
  """Two convolutions, one of them in remat, and a head; `twice` calls one of them again."""

  twice: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    conv = functools.partial(nn.Conv, CHANNELS, (3, 3), kernel_init=randomly, bias_init=randomly)
    x = nn.elu(conv(name="first")(x))
    second = nn.remat(conv)(name="second") if not self.twice else conv(name="second")
    for _ in range(1 + self.twice):
      x = nn.elu(second(x))
    x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
    return nn.Dense(2, kernel_init=randomly, name="head")(x)


class NnxVgg(nnx.Module):
  def __init__(self, rngs):
    options = {"kernel_init": randomly, "bias_init": randomly, "rngs": rngs}
    self.convs = nnx.List(
      [nnx.Conv(2, CHANNELS, (3, 3), **options), nnx.Conv(CHANNELS, CHANNELS, (3, 3), **options)]
    )
    self.head = nnx.Linear(CHANNELS, 2, **options)

  def __call__(self, x):
    for conv in self.convs:
      x = nnx.elu(conv(x))
    return self.head(x.mean((1, 2)))


@pytest.fixture(scope="module")
def linen():
  model = Vgg()
  variables = model.init(jax.random.key(0), BATCHES[0])
  return model, variables, insert(model, variables, BATCHES)


def relative(a, b):
  return np.max(abs(np.asarray(a) - b)) / np.max(abs(np.asarray(a)))


def test_in_evaluation_outputs_are_what_they_were(linen):
  model, variables, inserted = linen
  before = model.apply(variables, ALL)
  assert relative(before, inserted.model.apply(inserted.variables, ALL)) < 1e-5
  assert inserted.evaluation < 1e-5
  assert [layer.path for layer in inserted.layers] == ["first", "second"]


def test_statistics_are_those_of_all_that_the_layers_gave(linen):
  model, variables, inserted = linen
  _, seen = model.apply(variables, ALL, capture_intermediates=True)
  for name in ("first", "second"):
    y = np.float64(seen["intermediates"][name]["__call__"][0])
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    stats = inserted.variables["batch_stats"][name]["norm"]
    params = inserted.variables["params"][name]["norm"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=SUMS)
    np.testing.assert_allclose(stats["var"], var, rtol=SUMS)
    np.testing.assert_allclose(params["bias"], mean, rtol=SUMS)
    np.testing.assert_allclose(params["scale"], np.sqrt(var + 1e-5), rtol=SUMS)
    kept = {k: v for k, v in inserted.variables["params"][name].items() if k != "norm"}
    jax.tree.map(np.testing.assert_array_equal, kept, variables["params"][name])


def test_it_trains_as_with_batch_norms(linen):
  model, variables, inserted = linen
  del model

  def loss(params, x):
    y, new = inserted.model.apply(
      inserted.variables | {"params": params}, x, mutable=["batch_stats"]
    )
    return jnp.sum(y**2), (y, new)

  grads, (y, new) = jax.grad(loss, has_aux=True)(inserted.variables["params"], BATCHES[0])
  # A convolution's bias goes away with the batch's mean.
  assert abs(grads["first"]["bias"]).max() < 1e-4 * abs(grads["first"]["norm"]["bias"]).max()
  assert relative(inserted.model.apply(inserted.variables, BATCHES[0]), y) == pytest.approx(
    inserted.training, rel=1e-3
  )
  assert inserted.training > 1e-3
  old = inserted.variables["batch_stats"]
  assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).any(), old, new["batch_stats"]))
  assert jax.tree.structure(variables["params"]["head"]) == jax.tree.structure(grads["head"])


def test_nnx_outputs_stay_and_modes_switch():
  model = NnxVgg(nnx.Rngs(0))
  inserted = insert(model, None, BATCHES)
  assert not hasattr(model.convs[0], "norm")
  assert inserted.variables is None
  assert [layer.path for layer in inserted.layers] == ["convs/0", "convs/1"]
  y = model.convs[0](ALL)
  norm = inserted.model.convs[0].norm
  assert isinstance(norm, jaxbn.nnx.BatchNorm)
  np.testing.assert_allclose(norm.mean[...], y.mean((0, 1, 2)), rtol=SUMS)
  np.testing.assert_allclose(norm.scale[...], np.sqrt(y.var((0, 1, 2)) + 1e-5), rtol=SUMS)
  before = model(BATCHES[0])
  assert relative(before, inserted.model(BATCHES[0])) < 1e-5
  inserted.model.train()
  assert relative(before, inserted.model(BATCHES[0])) == pytest.approx(inserted.training, rel=1e-3)


def test_a_norm_of_ones_choice_behind_a_layer_that_is_called_twice():
  model = Vgg(twice=True)
  variables = model.init(jax.random.key(0), BATCHES[0])
  inserted = insert(
    model,
    variables,
    lambda: BATCHES,
    where=lambda path, layer: layer.calls > 1,
    norm=functools.partial(jaxbn.linen.BatchNorm, debias=True, epsilon=1e-3),
    train=False,
  )
  assert [layer.path for layer in inserted.layers] == ["second"]
  new = {k: v["second"]["norm"] for k, v in inserted.variables.items()}
  assert (new["batch_stats"]["count"] == len(BATCHES)).all()
  np.testing.assert_allclose(
    new["params"]["scale"], np.sqrt(new["batch_stats"]["var"] + 1e-3), rtol=1e-6
  )


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    def step(layer, x, _):
      return layer(x), None

    layer = nn.Dense(2, kernel_init=randomly)
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    return nn.Dense(2)(nn.scan(step, length=2, **axes)(layer, x, None)[0])


def test_what_cannot_be_is_refused(linen):
  model, variables, inserted = linen
  del inserted
  with pytest.raises(ValueError, match="batches gave none"):
    insert(model, variables, iter([]))
  with pytest.raises(ValueError, match=r"calls \[.*Dense head\], and where= takes none"):
    insert(model, variables, BATCHES, where=lambda path, layer: path == "third")
  alone = nn.Sequential([nn.Dense(2)])
  given = alone.init(jax.random.key(0), ALL[0, 0]), [ALL[0, 0]]
  with pytest.raises(ValueError, match=r"all but the last: where=lambda path, layer: True"):
    insert(alone, *given)
  assert len(insert(alone, *given, where=lambda path, layer: True).layers) == 1
  with pytest.raises(TypeError, match="of type NoneType"):
    insert(model, None, BATCHES)
  with pytest.raises(ValueError, match=r"BatchNorm first/norm is given has a NaN"):
    insert(model, variables, [BATCHES[0].at[0].set(jnp.nan)])
  bare = functools.partial(jaxbn.linen.BatchNorm, use_bias=False)
  with pytest.raises(TypeError, match="norm has to make a layer with scale and bias"):
    insert(model, variables, BATCHES, norm=bare)
  scanned, x = Scanned(), ALL[0, 0]
  variables = scanned.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="variable_axes has to name batch_stats"):
    insert(scanned, variables, [x])
