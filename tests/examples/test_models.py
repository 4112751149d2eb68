"""The networks: shapes, norms, and configs that describe none."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import models, norms
from examples.settings import UserError
from tests.examples import helpers


def create(**changes):
  return models.create(helpers.config(**changes), (8, 8, 1), 10, None)


def shapes(model, size=8):
  images = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
  init = functools.partial(model.init, train=False)
  return images, jax.eval_shape(init, jax.random.key(0), images)


PAIRS = set(itertools.product(models.MODELS, norms.NORMS))
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
    _, variables = shapes(create(model=name, widths=(4, 6), blocks=(1, 2)))
    counts[name] = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(variables["params"]))
  # Kernels: three blocks and the head; a ResNet's stem, pairs, and the shortcut that widens.
  assert counts == {"mlp": 4, "vgg": 4, "resnet": 1 + 6 + 1 + 1}


@pytest.mark.parametrize("norm", norms.NORMS)
def test_residual_blocks_start_as_the_identity(norm):
  """The last scale of each block starts at zero, and no other does."""
  config = helpers.config(norm=norm, widths=(4, 6), blocks=(2, 1))
  params = helpers.Job(config, 1).state.params
  scales = [float(x[0]) for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "scale"]
  assert sorted(scales) == [0.0] * 3 + [1.0] * 5


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_without_skip_connections_nothing_starts_at_zero(norm):
  """The same pairs of convolutions, and neither a sum nor what widens its other side."""
  model = create(skip=False, norm=norm, widths=(4, 6), blocks=(2, 1))
  images = helpers.batch(2)["image"]
  logits, variables = jax.jit(functools.partial(model.init_with_output, train=False))(
    jax.random.key(0), images
  )
  assert np.abs(logits[0] - logits[1]).max() > 1e-3
  kernels = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
  assert len(kernels) == 1 + 6
  assert all(shape[0] == 3 for shape in kernels)


def test_space_to_depth_keeps_every_pixel_in_its_square():
  image = np.arange(16).reshape(1, 4, 4, 1)
  folded = models.space_to_depth(image, 2)
  assert folded.shape == (1, 2, 2, 4)
  np.testing.assert_array_equal(folded[0, 0, 1], [2, 3, 6, 7])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": "resnt"}, "config.model is 'resnt', .* mlp, vgg, resnet; did you mean 'resnet'"),
    ({"patch": 3}, "config.patch is 3, .*8x8 images"),
    ({"model": "vgg", "widths": (4,) * 5, "blocks": (1,) * 5}, "config.widths has 5 stages"),
    ({"model": "vgg", "skip": False}, "config.skip is False, but config.model is 'vgg'"),
  ],
)
def test_impossible_networks_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    create(**changes)
