"""The networks: shapes, norms, and configs that describe none."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import models, norms, parallelism
from examples.settings import UserError
from jaxbn import linen as bn
from tests.examples import helpers


def create(**changes):
  return models.create(helpers.config(**changes), (8, 8, 1), 10, None)


def shapes(model, size=8):
  images = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
  init = functools.partial(model.init, train=False)
  return images, jax.eval_shape(init, jax.random.key(0), images)


PAIRS = set(itertools.product(("mlp", "vgg", "resnet"), norms.NORMS))
PAIRS -= {("mlp", "instance")}  # which has no positions to normalize over


@pytest.mark.parametrize(("name", "norm"), sorted(PAIRS))
def test_every_model_takes_every_norm(name, norm):
  model = create(model=name, norm=norm, widths=(4, 6), blocks=(1, 2), dtype="bfloat16")
  images, variables = shapes(model)
  logits = jax.eval_shape(functools.partial(model.apply, train=False), variables, images)
  assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
  names = {path[-1].key for path, _ in jax.tree.leaves_with_path(variables["params"])}
  assert names == {"kernel", "scale", "bias"}


def test_widths_and_blocks_give_the_size():
  counts = {}
  for name in models.MODELS:
    norm = "none" if name == "nf_resnet" else "batch"
    _, variables = shapes(create(model=name, norm=norm, widths=(4, 6), blocks=(1, 2)))
    counts[name] = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(variables["params"]))
  # Kernels: three blocks and the head; a ResNet's stem, pairs, and the shortcut that widens.
  assert counts == {"mlp": 4, "vgg": 4, "resnet": 1 + 6 + 1 + 1, "nf_resnet": 1 + 6 + 1 + 1}


@pytest.mark.parametrize("norm", norms.NORMS)
def test_residual_blocks_start_as_the_identity(norm):
  """The last scale of each block starts at zero, and no other does."""
  model = create(norm=norm, widths=(4, 6), blocks=(2, 1))

  @jax.jit  # of the scales alone: what makes random kernels is left out
  def scales():
    params = model.init(jax.random.key(0), helpers.batch(2)["image"], train=False)["params"]
    return [x[0] for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "scale"]

  assert sorted(map(float, scales())) == [0.0] * 3 + [1.0] * 5


@pytest.mark.parametrize("name", ["resnet", "nf_resnet"])
def test_without_skip_connections_nothing_starts_at_zero(name):
  """The same pairs of convolutions, and neither a sum nor what widens its other side."""
  model = create(model=name, skip=False, norm="none", widths=(4, 6), blocks=(2, 1))
  images = helpers.batch(2)["image"]
  logits, variables = jax.jit(functools.partial(model.init_with_output, train=False))(
    jax.random.key(0), images
  )
  assert np.abs(logits[0] - logits[1]).max() > 1e-3
  kernels = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
  assert len(kernels) == 1 + 6
  assert all(shape[0] == 3 for shape in kernels)


# Without a norm.


class Circular(models.NFResNet):
  """Without an edge, at which fewer weights meet the image."""

  def standardized(self, width, size=3, stride=1):
    return bn.WSConv(width, (size, size), strides=stride, padding="CIRCULAR")


def without_skip_init(params):
  """SkipInit at one: the network that the papers' variances are of."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "scale" else leaf, params
  )


@pytest.mark.parametrize(
  ("skip", "expected"), [(True, [1, 2, 3, 4, 2, 3, 4]), (False, [1, 1, 1, 1, 1, 1, 1])]
)
def test_signals_have_the_variance_that_was_computed(skip, expected):
  """A signal propagation plot at initialization: as computed in every block, to within chance."""
  model = Circular(classes=10, widths=(64, 96), blocks=(3, 3), skip=skip, alpha=1.0)
  images = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
  init = jax.jit(functools.partial(model.init, train=False))
  params = without_skip_init(init(jax.random.key(0), images[:1])["params"])
  forward = jax.jit(functools.partial(model.apply, train=False, mutable=["intermediates"]))
  signals = forward({"params": params}, images)[1]["intermediates"]["signal"]
  variances = [float(x.var()) for x in signals]
  # Random kernels of 64 outputs are off by sqrt(2 / 64) at most, were all positions alike; they
  # are not, and from seed to seed it is 3%.
  np.testing.assert_allclose(variances, expected, rtol=0.1)
  # Nor do the channels' means grow from block to block, as without standardized kernels.
  assert all(float((x.mean((0, 1, 2)) ** 2).mean()) < 0.02 * float(x.var()) for x in signals)


def test_normalizer_free_blocks_start_as_the_identity():
  model = create(model="nf_resnet", norm="none", widths=(4,), blocks=(3,))
  images = helpers.batch(2)["image"]
  params = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)
  forward = jax.jit(functools.partial(model.apply, train=False, mutable=["intermediates"]))
  first, *others = forward(params, images)[1]["intermediates"]["signal"]
  assert len(others) == 3
  for x in others:
    np.testing.assert_array_equal(x, first)


def test_a_normalizer_free_network_trains_the_same_in_every_parallelism():
  """In microbatches too, for nothing in it depends on other examples; clipped, in low precision."""
  changes = {"model": "nf_resnet", "norm": "none", "adaptive_clip": 0.1, "skip_nonfinite": 1}
  batch = helpers.batch(32)
  batch["mask"] = np.arange(32) % 5 != 2
  whole = {key: x[batch["mask"]] for key, x in batch.items() if key != "mask"}
  batch["image"][~batch["mask"]] = np.nan
  expected, _ = helpers.Job(helpers.config(parallelism="jit", **changes), 1).train([whole] * 2)
  for mode in parallelism.MODES:
    job = helpers.Job(helpers.config(parallelism=mode, microbatches=2, **changes), 4)
    state, results = job.train([batch] * 2)
    assert not any(int(sums.skipped) for sums in results)
    # As in test_parallelism.
    chex.assert_trees_all_close(state._asdict(), expected._asdict(), rtol=2e-5, atol=2e-6)


def test_space_to_depth_keeps_every_pixel_in_its_square():
  image = np.arange(16).reshape(1, 4, 4, 1)
  folded = models.space_to_depth(image, 2)
  assert folded.shape == (1, 2, 2, 4)
  np.testing.assert_array_equal(folded[0, 0, 1], [2, 3, 6, 7])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": "resnt"}, "config.model is 'resnt', .* mlp, vgg, resnet, nf_resnet; did you mean"),
    ({"patch": 3}, "config.patch is 3, .*8x8 images"),
    ({"model": "vgg", "widths": (4,) * 5, "blocks": (1,) * 5}, "config.widths has 5 stages"),
    (
      {"model": "nf_resnet"},
      "'nf_resnet', .* no place for a norm, but config.norm is 'batch': try",
    ),
    ({"model": "vgg", "skip": False}, "config.skip is False, but config.model is 'vgg'"),
  ],
)
def test_impossible_networks_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    create(**changes)
