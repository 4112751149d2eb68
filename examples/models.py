"""The networks: an MLP, a VGG and a ResNet, with the norm that the config names; one without any.

All are described by the same few numbers: stages, where stage `i` has
`blocks[i]` blocks of width `widths[i]`. A block is one dense layer (MLP), one 3x3
convolution (VGG) or one residual pair of 3x3 convolutions (ResNet), each followed by a
norm. Any norm of `examples.norms` fits any of the three. The fourth network is a ResNet of the same
description that needs none (NFResNet).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from examples import norms
from examples.norms import Layer
from examples.settings import UserError, lookup
from jaxbn import linen as bn
from jaxbn.alternatives import normalizer_free
from jaxbn.surgery import decay_mask


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
  """(B, H, W, C) to (B, H/size, W/size, C*size*size): what a strided first layer sees, cheaper."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // size, size, w // size, size, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // size, w // size, size * size * c)


class Network(nn.Module):
  """What the three networks share.

  Attributes:
    classes: number of classes.
    widths, blocks: width and number of blocks of each stage.
    patch: side of the square of pixels that `space_to_depth` folds into the channels.
    skip: whether the blocks of a ResNet, with norm or without, add their input.
    norm: a name in `norms.NORMS`.
    norm_options: keyword arguments of the function that it names.
    momentum: share of the old running statistics kept at each step.
    dtype: of the computation; parameters, statistics and logits stay float32.
    axis_name: the axis or axes over which the norm is synchronized; None for one device.
    virtual_batch_size: how many examples share statistics; None for all.
  """

  classes: int
  widths: Sequence[int]
  blocks: Sequence[int]
  patch: int = 1
  skip: bool = True
  norm: str = "batch"
  norm_options: Mapping[str, Any] = FrozenDict()
  momentum: float = 0.9
  dtype: Any = jnp.float32
  axis_name: Any = None
  virtual_batch_size: int | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
    """(B, H, W, C) images to (B, classes) float32 logits.

    Where a mask (B,) is given, the statistics are of the examples for which it is true. The others
    are blank, so that whatever they hold does not reach a gradient: 0 * NaN is NaN.
    """
    if mask is not None:
      images = jnp.where(mask.reshape(-1, 1, 1, 1), images, 0)
    norm = norms.NORMS[self.norm](self, train, mask, **self.norm_options)
    x = space_to_depth(images.astype(self.dtype), self.patch)
    x = self.features(x, norm)
    return nn.Dense(self.classes, name="head")(x.astype(jnp.float32))

  def features(self, x: jax.Array, norm: Layer) -> jax.Array:
    """(B, h, w, c) to (B, features)."""
    raise NotImplementedError

  def conv(self, width: int, size: int = 3, stride: int = 1) -> nn.Conv:
    """A convolution without bias: the norm that follows it brings one."""
    return nn.Conv(width, (size, size), strides=stride, use_bias=False, dtype=self.dtype)


class MLP(Network):
  """Dense layers, each with its norm."""

  def features(self, x: jax.Array, norm: Layer) -> jax.Array:
    x = x.reshape(len(x), -1)
    for width, blocks in zip(self.widths, self.blocks, strict=True):
      for _ in range(blocks):
        x = norm(activation=nn.relu)(nn.Dense(width, use_bias=False, dtype=self.dtype)(x))
    return x


class VGG(Network):
  """3x3 convolutions, halving the image between stages (Simonyan & Zisserman, 2015)."""

  def features(self, x: jax.Array, norm: Layer) -> jax.Array:
    for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
      if stage > 0:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
      for _ in range(blocks):
        x = norm(activation=nn.relu)(self.conv(width)(x))
    return x.mean((1, 2))


class ResNet(Network):
  """Residual blocks (He et al., 2016), each starting as the identity (Goyal et al., 2017).

  Without skip connections it is He et al.'s plain network: the same pairs of convolutions, one
  after the other, and nothing that starts at zero.
  """

  def features(self, x: jax.Array, norm: Layer) -> jax.Array:
    x = norm(activation=nn.relu)(self.conv(self.widths[0])(x))
    for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
      for block in range(blocks):
        x = self.residual(x, norm, width, stride=2 if stage > 0 and block == 0 else 1)
    return x.mean((1, 2))

  def residual(self, x: jax.Array, norm: Layer, width: int, stride: int) -> jax.Array:
    y = norm(activation=nn.relu)(self.conv(width, stride=stride)(x))
    if not self.skip:
      return norm(activation=nn.relu)(self.conv(width)(y))
    y = norm(scale_init=nn.initializers.zeros)(self.conv(width)(y))
    if x.shape != y.shape:
      x = norm()(self.conv(width, size=1, stride=stride)(x))
    return nn.relu(x + y)


class NFResNet(Network):
  """A normalizer-free ResNet (Brock et al., 2021) of the ResNet's stages, blocks and convolutions.

  Each convolution standardizes its kernel, each activation is scaled to keep unit variance, and a
  block is x + alpha * f(x / beta), with the activations first, as the papers have it. beta² is the
  variance that x would have if f did not start at zero. Without skip connections a block is f. The
  x between the blocks can be looked at in the collection `intermediates`, as `signal`.
  """

  alpha: float = 0.2

  def features(self, x: jax.Array, norm: Layer) -> jax.Array:
    del norm
    relu = normalizer_free.scaled_activation(nn.relu)
    blocks = [
      (width, 2 if stage > 0 and block == 0 else 1)
      for stage, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True))
      for block in range(count)
    ]
    alpha = self.alpha if self.skip else 0.0
    variances = normalizer_free.expected_variances([s > 1 for _, s in blocks], alpha=alpha)
    x = self.standardized(self.widths[0])(x)
    for (width, stride), var in zip(blocks, variances, strict=False):
      self.sow("intermediates", "signal", x)
      y = relu(x / var**0.5)
      if self.skip and stride > 1:
        x = self.standardized(width, size=1, stride=stride)(y)
      y = relu(self.standardized(width, stride=stride)(y))
      y = self.standardized(width)(y)
      x = x + alpha * bn.SkipInit(dtype=self.dtype)(y) if self.skip else y
    self.sow("intermediates", "signal", x)
    return relu(x / variances[-1] ** 0.5).mean((1, 2))

  def standardized(self, width: int, size: int = 3, stride: int = 1) -> nn.Conv:
    """A convolution with a bias, for no norm brings one."""
    return bn.WSConv(width, (size, size), strides=stride, dtype=self.dtype)


MODELS: dict[str, type[Network]] = {
  "mlp": MLP,
  "vgg": VGG,
  "resnet": ResNet,
  "nf_resnet": NFResNet,
}


def create(
  config: Any,
  image_shape: Sequence[int],
  classes: int,
  axis_name: Any,
  virtual_batch_size: int | None = None,
) -> Network:
  """The network that `config` describes, for images of shape (H, W, C)."""
  model = lookup(MODELS, config.model, "config.model")
  norm_options = norms.options(config)
  _check(config, model, image_shape)
  network = model(
    classes=classes,
    widths=tuple(config.widths),
    blocks=tuple(config.blocks),
    patch=config.patch,
    skip=config.skip,
    norm=config.norm,
    norm_options=FrozenDict(norm_options),
    momentum=config.norm_momentum,
    dtype=jnp.dtype(config.dtype),
    axis_name=axis_name,
    virtual_batch_size=virtual_batch_size,
  )
  try:  # whatever norms refuse, before there is a run
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), images)
  except (TypeError, ValueError) as error:
    if not norm_options:
      raise
    raise UserError(f"config.norm_options is {config.norm_options!r}: {error}") from error
  return network


def decays(model: Network, image_shape: Sequence[int]) -> Any:
  """True for the parameters that weight decay shrinks: kernels, not what norms and biases have."""
  image = jnp.zeros((1, *image_shape))
  return decay_mask(model, image, norms=[norms.Affine], train=False)


def _check(config: Any, model: type[Network], image_shape: Sequence[int]) -> None:
  """Refuses what describes no network."""
  smallest = min(image_shape[:2])
  if any(side % config.patch for side in image_shape[:2]):
    raise UserError(
      f"config.patch is {config.patch}, but must divide the sides of {config.dataset}'s "
      f"{image_shape[0]}x{image_shape[1]} images; try --config.patch=2"
    )
  if model is VGG and smallest // config.patch < 2 ** (len(config.widths) - 1):
    raise UserError(
      f"config.widths has {len(config.widths)} stages and config.patch is {config.patch}, but a "
      f"VGG halves {config.dataset}'s {image_shape[0]}x{image_shape[1]} images at every stage "
      "after the first and runs out of pixels; give it fewer stages"
    )
  if not config.skip and not issubclass(model, ResNet | NFResNet):
    raise UserError(
      f"config.skip is False, but config.model is {config.model!r}, in which no skip connection "
      "can be left out: leave config.skip out, or try --config.model=resnet"
    )
  if model is NFResNet and config.norm != "none":
    raise UserError(
      f"config.model is {config.model!r}, which has no place for a norm, but config.norm is "
      f"{config.norm!r}: try --config.norm=none, or --config.model=resnet"
    )
  if config.virtual_batch_size != "global" and config.norm not in norms.VIRTUAL:
    raise UserError(
      f"config.virtual_batch_size is {config.virtual_batch_size!r}, but config.norm is "
      f"{config.norm!r}, which takes no virtual batches as {', '.join(norms.VIRTUAL)} does: "
      "leave one of them out"
    )
