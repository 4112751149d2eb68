"""The networks that `benchmarks.compiled` compiles, with the norm layer as their parameter.

A norm is a factory: `norm(rectify)` gives a callable `(x, residual=None)` that normalizes x, adds
the residual and, where `rectify`, applies the activation. A network hands over whole what a layer
might do at once, so that a norm which does it inside and one which leaves it to the network compute
the same function.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxbn.linen import BatchNorm

Layer = Callable[..., jax.Array]
Norm = Callable[[bool], Layer]
OPTIONS = {field.name for field in dataclasses.fields(BatchNorm)}
TAKES_RESIDUAL = "residual" in inspect.signature(BatchNorm.__call__).parameters


# Norms.


def none(rectify: bool, *, dtype: Any, activation: Layer = nn.relu) -> Layer:
  """No normalization: what the network costs without."""
  del dtype
  return _outside(lambda x: x, activation if rectify else None)


def flax(rectify: bool, *, dtype: Any, activation: Layer = nn.relu) -> Layer:
  """Flax's layer, and the rest as its users write it."""
  layer = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=dtype)
  return _outside(layer, activation if rectify else None)


def jaxbn(
  rectify: bool, *, dtype: Any, activation: Layer = nn.relu, sums: bool = False, **options: Any
) -> Layer:
  """Ours, with its activation inside where it has that option, and the residual where `sums`."""
  options = {"use_running_average": False, "momentum": 0.9, "dtype": dtype, **options}

  def call(x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    if residual is None:
      return _ours(activation if rectify else None, options)(x)
    if sums:
      return _ours(activation if rectify else None, options)(x, residual=residual)
    y = residual + _ours(None, options)(x)  # an activation inside would come before the sum
    return activation(y) if rectify else y

  return call


def _ours(activation: Layer | None, options: dict[str, Any]) -> Layer:
  if activation is None:
    return BatchNorm(**options)
  if "activation" in OPTIONS:
    return BatchNorm(**{**options, "activation": activation})
  return _outside(BatchNorm(**options), activation)


def _outside(layer: Layer, activation: Layer | None) -> Layer:
  def call(x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    y = layer(x) if residual is None else residual + layer(x)
    return y if activation is None else activation(y)

  return call


# Networks.


class Bottleneck(nn.Module):
  """ResNet-50's block (He et al. 2016): 1x1, 3x3, 1x1."""

  features: int
  stride: int
  norm: Norm
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    y = self.norm(True)(conv(self.features, (1, 1))(x))
    y = self.norm(True)(conv(self.features, (3, 3), (self.stride,) * 2)(y))
    y = conv(4 * self.features, (1, 1))(y)
    if x.shape != y.shape:
      x = self.norm(False)(conv(4 * self.features, (1, 1), (self.stride,) * 2)(x))
    return self.norm(True)(y, residual=x)


class Basic(nn.Module):
  """ResNet-18's block: 3x3, 3x3."""

  features: int
  stride: int
  norm: Norm
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    y = self.norm(True)(conv(self.features, (3, 3), (self.stride,) * 2)(x))
    y = conv(self.features, (3, 3))(y)
    if x.shape != y.shape:
      x = self.norm(False)(conv(self.features, (1, 1), (self.stride,) * 2)(x))
    return self.norm(True)(y, residual=x)


class ResNet(nn.Module):
  """Stages of blocks, after ImageNet's stem or after CIFAR's."""

  block: Callable[..., nn.Module]
  stages: tuple[int, ...]
  norm: Norm
  dtype: Any
  large: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    window, stride = ((7, 7), (2, 2)) if self.large else ((3, 3), (1, 1))
    x = nn.Conv(64, window, stride, use_bias=False, dtype=self.dtype)(x)
    x = self.norm(True)(x)
    if self.large:
      x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
    for i, blocks in enumerate(self.stages):
      for j in range(blocks):
        stride_of_block = 2 if i and j == 0 else 1
        x = self.block(64 * 2**i, stride_of_block, self.norm, self.dtype)(x)
    return _classify(x)


class _Network(nn.Module):
  """What those have in common that are described by their norm and dtype alone."""

  norm: Norm
  dtype: Any

  def conv(
    self, features: int, window: tuple[int, int], stride: int = 1, groups: int = 1
  ) -> nn.Conv:
    return nn.Conv(
      features,
      window,
      stride,
      feature_group_count=groups,
      use_bias=False,
      dtype=self.dtype,
    )


class Vgg(_Network):
  """Convolution, norm, activation, and nothing beside them (Simonyan & Zisserman 2015)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for features in (64, 128, 256):
      x = self.conv(features, (3, 3))(x)
      x = self.norm(True)(x)
      # Not max-pooling: XLA shares the zeros that its gradient starts from with the ReLU before it,
      # which then reads a tensor of zeros, and even the network without a norm pays for that.
      x = nn.avg_pool(x, (2, 2), (2, 2))
    return _classify(x)


class MobileNet(_Network):
  """Inverted residuals with depthwise convolutions (MobileNetV2, Sandler et al. 2018)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.norm(True)(self.conv(32, (3, 3))(x))
    for features, stride in ((24, 2), (24, 1)):
      wide = 6 * x.shape[-1]
      y = self.norm(True)(self.conv(wide, (1, 1))(x))
      y = self.norm(True)(self.conv(wide, (3, 3), stride, groups=wide)(y))
      y = self.conv(features, (1, 1))(y)
      x = self.norm(False)(y, residual=x) if x.shape == y.shape else self.norm(False)(y)
    return _classify(x)


class DenseNet(_Network):
  """One dense block (Huang et al. 2017): every layer normalizes all the outputs before it."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv(64, (3, 3))(x)
    for _ in range(3):
      y = self.conv(128, (1, 1))(self.norm(True)(x))
      y = self.conv(32, (3, 3))(self.norm(True)(y))
      x = jnp.concatenate([x, y], axis=-1)
    return _classify(self.norm(True)(x))


class Generator(_Network):
  """Transposed convolutions from noise to images (DCGAN, Radford et al. 2016)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Dense(8 * 8 * 256, use_bias=False, dtype=self.dtype)(x)
    x = self.norm(True)(x.reshape(-1, 8, 8, 256))
    for features in (128, 64):
      x = nn.ConvTranspose(features, (4, 4), (2, 2), use_bias=False, dtype=self.dtype)(x)
      x = self.norm(True)(x)
    return jnp.tanh(nn.Conv(3, (3, 3), dtype=jnp.float32)(x))


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

  def normalized_bytes(self, dtype: Any) -> int:
    """Bytes of all the tensors that the network normalizes, each counted once."""
    sizes: list[int] = []

    def record(rectify: bool, *, dtype: Any) -> Layer:
      def see(x: jax.Array) -> jax.Array:
        sizes.append(math.prod(x.shape))
        return x

      return _outside(see, nn.relu if rectify else None)

    jax.eval_shape(self.model(record, dtype).init, jax.random.key(0), self.inputs())
    return sum(sizes) * jnp.dtype(dtype).itemsize


NETWORKS = {
  "resnet": Network(
    "ResNet, bottleneck blocks",
    functools.partial(ResNet, Bottleneck, (2, 2), large=True),
    (64, 64, 3),
    256,
  ),
  "basic": Network(
    "ResNet, basic blocks", functools.partial(ResNet, Basic, (1, 1)), (32, 32, 3), 128
  ),
  "vgg": Network("VGG", Vgg, (32, 32, 3), 128),
  "mobilenet": Network("MobileNetV2", MobileNet, (32, 32, 3), 128),
  "densenet": Network("DenseNet block", DenseNet, (32, 32, 3), 128),
  "generator": Network("GAN generator", Generator, (128,), 256),
}


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
