"""The networks that are compiled and run, with the norm layer as their parameter.

A norm is a factory: `norm(rectify)` gives a callable `(x, residual=None)` that normalizes x, adds
the residual and, where `rectify`, applies the activation. A network hands over whole what a layer
might do at once, so that a norm which does it inside and one which leaves it to the network compute
the same function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxbn.linen import BatchNorm

Layer = Callable[..., jax.Array]
Norm = Callable[[bool], Layer]


# Norms.


def none(rectify: bool, *, dtype: Any, activation: Layer = nn.relu) -> Layer:
  """No normalization: what the network costs without."""
  del dtype
  return outside(lambda x: x, activation if rectify else None)


def flax(rectify: bool, *, dtype: Any, activation: Layer = nn.relu) -> Layer:
  """Flax's layer, and the rest as its users write it."""
  layer = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=dtype)
  return outside(layer, activation if rectify else None)


def jaxbn(
  rectify: bool, *, dtype: Any, activation: Layer = nn.relu, sums: bool = False, **options: Any
) -> Layer:
  """Ours, with its activation inside where nothing is added before it, or the sum too (`sums`)."""
  options = {"use_running_average": False, "momentum": 0.9, "dtype": dtype, **options}

  def call(x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    if residual is not None and not sums:
      return outside(BatchNorm(**options), activation if rectify else None)(x, residual)
    layer = BatchNorm(**options, activation=activation if rectify else None)
    return layer(x, residual=residual)

  return call


def outside(layer: Layer, activation: Layer | None) -> Layer:
  """A layer with the sum and the activation after it."""

  def call(x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    y = layer(x) if residual is None else residual + layer(x)
    return y if activation is None else activation(y)

  return call


# Networks.


class _Network(nn.Module):
  """What the networks have in common."""

  norm: Norm
  dtype: Any

  def conv(self, features: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv:
    """A convolution before a norm."""
    strides, options = (stride,) * 2, {"use_bias": False, "dtype": self.dtype}
    return nn.Conv(features, (size,) * 2, strides, feature_group_count=groups, **options)

  def upsample(self, features: int, size: int) -> nn.ConvTranspose:
    """To twice the height and width."""
    return nn.ConvTranspose(features, (size,) * 2, (2, 2), use_bias=False, dtype=self.dtype)

  def imagenet_stem(self, x: jax.Array) -> jax.Array:
    """To a quarter of the height and width."""
    x = self.norm(True)(self.conv(64, 7, 2)(x))
    return nn.max_pool(x, (3, 3), (2, 2), "SAME")


class One(_Network):
  """A network that is one layer, with its activation or without."""

  rectify: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(self.rectify)(x.astype(self.dtype))


class Bottleneck(_Network):
  """ResNet-50's block (He et al. 2016): 1x1, 3x3, 1x1."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.norm(True)(self.conv(self.features, 1)(x))
    y = self.norm(True)(self.conv(self.features, 3, self.stride)(y))
    y = self.conv(4 * self.features, 1)(y)
    if x.shape != y.shape:
      x = self.norm(False)(self.conv(4 * self.features, 1, self.stride)(x))
    return self.norm(True)(y, residual=x)


class Basic(_Network):
  """ResNet-18's block: 3x3, 3x3."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.norm(True)(self.conv(self.features, 3, self.stride)(x))
    y = self.conv(self.features, 3)(y)
    if x.shape != y.shape:
      x = self.norm(False)(self.conv(self.features, 1, self.stride)(x))
    return self.norm(True)(y, residual=x)


class ResNet(_Network):
  """Stages of blocks, after ImageNet's stem or after CIFAR's."""

  block: Callable[..., nn.Module]
  stages: tuple[int, ...]
  large: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.imagenet_stem(x) if self.large else self.norm(True)(self.conv(64, 3)(x))
    for i, blocks in enumerate(self.stages):
      for j in range(blocks):
        stride = 2 if i and j == 0 else 1
        x = self.block(self.norm, self.dtype, 64 * 2**i, stride)(x)
    return _classify(x)


class Vgg(_Network):
  """Convolution, norm, activation, and nothing beside them (Simonyan & Zisserman 2015)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for features in (64, 128, 256):
      x = self.norm(True)(self.conv(features, 3)(x))
      # Not max-pooling: XLA shares the zeros that its gradient starts from with the ReLU before it,
      # which then reads a tensor of zeros, and even the network without a norm pays for that.
      x = nn.avg_pool(x, (2, 2), (2, 2))
    return _classify(x)


V2 = (
  *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
  *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


class MobileNet(_Network):
  """Inverted residuals with depthwise convolutions (MobileNetV2, Sandler et al. 2018).

  Stages are of expansion, features, blocks and the first one's stride, as in the paper's table 2.
  """

  stages: tuple[tuple[int, int, int, int], ...] = ((6, 24, 2, 2),)
  stride: int = 1
  last: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.norm(True)(self.conv(32, 3, self.stride)(x))
    for expansion, features, blocks, stride in self.stages:
      for block in range(blocks):
        x = self._block(x, expansion, features, stride if block == 0 else 1)
    if self.last:
      x = self.norm(True)(self.conv(self.last, 1)(x))
    return _classify(x)

  def _block(self, x: jax.Array, expansion: int, features: int, stride: int) -> jax.Array:
    wide = expansion * x.shape[-1]
    y = self.norm(True)(self.conv(wide, 1)(x)) if expansion > 1 else x
    y = self.norm(True)(self.conv(wide, 3, stride, groups=wide)(y))
    y = self.conv(features, 1)(y)
    return self.norm(False)(y, residual=x) if x.shape == y.shape else self.norm(False)(y)


class DenseNet(_Network):
  """Dense blocks (Huang et al. 2017): every layer normalizes all the outputs before it."""

  blocks: tuple[int, ...] = (3,)
  large: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.imagenet_stem(x) if self.large else self.conv(64, 3)(x)
    for number, layers in enumerate(self.blocks):
      if number:
        x = self.conv(x.shape[-1] // 2, 1)(self.norm(True)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
      for _ in range(layers):
        y = self.conv(128, 1)(self.norm(True)(x))
        y = self.conv(32, 3)(self.norm(True)(y))
        x = jnp.concatenate([x, y], axis=-1)
    return _classify(self.norm(True)(x))


class Generator(_Network):
  """Transposed convolutions from noise to images (DCGAN, Radford et al. 2016)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Dense(8 * 8 * 256, use_bias=False, dtype=self.dtype)(x)
    x = self.norm(True)(x.reshape(-1, 8, 8, 256))
    for features in (128, 64):
      x = self.norm(True)(self.upsample(features, 4)(x))
    return jnp.tanh(nn.Conv(3, (3, 3), dtype=jnp.float32)(x))


class UNet(_Network):
  """Down and up again, with what was seen on the way down (Ronneberger et al. 2015), padded."""

  features: tuple[int, ...] = (64, 128, 256, 512, 1024)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    seen = []
    for features in self.features[:-1]:
      seen.append(self._twice(x, features))
      x = nn.max_pool(seen[-1], (2, 2), (2, 2))
    x = self._twice(x, self.features[-1])
    for features, skip in zip(self.features[-2::-1], reversed(seen), strict=True):
      x = jnp.concatenate([skip, self.upsample(features, 2)(x)], axis=-1)
      x = self._twice(x, features)
    return nn.Conv(3, (1, 1), dtype=jnp.float32)(x)

  def _twice(self, x: jax.Array, features: int) -> jax.Array:
    for _ in range(2):
      x = self.norm(True)(self.conv(features, 3)(x))
    return x


def _classify(x: jax.Array) -> jax.Array:
  return nn.Dense(1000, dtype=jnp.float32)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Network:
  """A network, the shape of one of its inputs, and how many of them make a batch."""

  title: str
  module: Callable[..., nn.Module]
  shape: tuple[int, ...]
  batch: int

  def model(self, norm: Callable[..., Layer], dtype: Any) -> nn.Module:
    """The network with a norm, in a dtype."""
    return self.module(norm=functools.partial(norm, dtype=dtype), dtype=dtype)

  def inputs(self) -> jax.ShapeDtypeStruct:
    """A batch."""
    return jax.ShapeDtypeStruct((self.batch, *self.shape), jnp.float32)


def _network(
  title: str, shape: tuple[int, ...], batch: int, module: Callable[..., nn.Module], **options: Any
) -> Network:
  return Network(title, functools.partial(module, **options), shape, batch)


NETWORKS = {
  "resnet50": _network(
    "ResNet-50", (224, 224, 3), 128, ResNet, block=Bottleneck, stages=(3, 4, 6, 3), large=True
  ),
  "resnet": _network(
    "ResNet, bottleneck blocks",
    (64, 64, 3),
    256,
    ResNet,
    block=Bottleneck,
    stages=(2, 2),
    large=True,
  ),
  "basic": _network("ResNet, basic blocks", (32, 32, 3), 128, ResNet, block=Basic, stages=(1, 1)),
  "vgg": _network("VGG", (32, 32, 3), 128, Vgg),
  "mobilenet": _network("MobileNetV2", (32, 32, 3), 128, MobileNet),
  "densenet": _network("DenseNet block", (32, 32, 3), 128, DenseNet),
  "generator": _network("GAN generator", (128,), 256, Generator),
}
# As they are trained.
WHOLE = {
  "resnet50": NETWORKS["resnet50"],
  "mobilenet": _network(
    "MobileNetV2", (224, 224, 3), 128, MobileNet, stages=V2, stride=2, last=1280
  ),
  "densenet": _network(
    "DenseNet-121", (224, 224, 3), 64, DenseNet, blocks=(6, 12, 24, 16), large=True
  ),
  "unet": _network("U-Net", (256, 256, 3), 32, UNet),
}
# What a CPU compiles and runs in moments.
SMALL_RESNET = _network("ResNet", (32, 32, 3), 64, ResNet, block=Basic, stages=(1, 1, 1))


# A step of training.


def train_step(
  model: nn.Module, axes: tuple[str, ...] = (), apart: tuple[str, ...] = ()
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
  """One step of training and the optimizer whose state it takes.

  Under shard_map, `axes` are those that the batch lies on; its checks then sum the gradients too.
  `apart` are those among them along which the layers' statistics differ.
  """
  tx = optax.sgd(0.1, momentum=0.9)

  def step(params: Any, stats: Any, opt_state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
    def loss(params: Any) -> tuple[jax.Array, Any]:
      variables = {"params": params, "batch_stats": stats}
      outputs, new = model.apply(variables, inputs, mutable=["batch_stats"])
      return mean(_loss(outputs, targets), axes), new.get("batch_stats", {})

    (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), mean(new_stats, apart), opt_state, value

  return step, tx


def mean(tree: Any, axes: tuple[str, ...]) -> Any:
  """The means of a tree's leaves along axes of a mesh, if there are any."""
  return jax.lax.pmean(tree, axes) if axes else tree


def step_arguments(network: Network, model: nn.Module, tx: Any) -> tuple[Any, ...]:
  """What a step takes, as shapes."""
  inputs = network.inputs()
  outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), inputs)
  params, stats = variables["params"], variables.get("batch_stats", {})
  images = len(outputs.shape) == 4
  targets = outputs if images else jax.ShapeDtypeStruct(outputs.shape[:1], jnp.int32)
  return params, stats, jax.eval_shape(tx.init, params), inputs, targets


def _loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross entropy of classes, square error of images."""
  if outputs.shape == targets.shape:
    return jnp.mean((outputs - targets) ** 2)
  return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
