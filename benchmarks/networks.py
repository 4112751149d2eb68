"""The networks that are compiled and run, with the norm layer as their parameter.

A norm is a function: `norm(x, rectify=True, residual=None)` normalizes x, adds the residual and,
where `rectify`, applies the activation. A network hands over whole what a layer might do at once,
so that a norm which does it inside and one which leaves it outside compute the same function.
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

Norm = Callable[..., jax.Array]
Activation = Callable[[jax.Array], jax.Array]


# Norms.


def none(*inputs: Any, dtype: Any, **options: Any) -> jax.Array:
  return outside(lambda x: x, *inputs, **options)


def flax(*inputs: Any, dtype: Any, **options: Any) -> jax.Array:
  layer = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=dtype)
  return outside(layer, *inputs, **options)


def outside(
  layer: Activation,
  x: jax.Array,
  rectify: bool = True,
  residual: jax.Array | None = None,
  activation: Activation = nn.relu,
) -> jax.Array:
  """A layer with the sum and the activation after it."""
  y = layer(x) if residual is None else residual + layer(x)
  return activation(y) if rectify else y


def jaxbn(
  x: jax.Array,
  rectify: bool = True,
  residual: jax.Array | None = None,
  activation: Activation = nn.relu,
  sums: bool = False,
  **options: Any,
) -> jax.Array:
  """Ours, with its activation inside where nothing is added before it, or the sum too (`sums`)."""
  options = {"use_running_average": False, "momentum": 0.9, **options}
  if residual is not None and not sums:
    return outside(BatchNorm(**options), x, rectify, residual, activation)
  return BatchNorm(**options, activation=activation if rectify else None)(x, residual=residual)


# Networks.


class Net(nn.Module):
  """A network: its norm, its dtype, and its body, which is given this and the inputs."""

  norm: Norm
  dtype: Any
  body: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return self.body(self, x)

  def conv(
    self, x: jax.Array, features: int, size: int, stride: int = 1, groups: int = 1
  ) -> jax.Array:
    strides, options = (stride,) * 2, {"use_bias": False, "dtype": self.dtype}
    return nn.Conv(features, (size,) * 2, strides, feature_group_count=groups, **options)(x)

  def conv_norm(self, x: jax.Array, *conv: int, **options: int) -> jax.Array:
    """A convolution, its norm and the activation."""
    return self.norm(self.conv(x, *conv, **options))

  def upsample(self, x: jax.Array, features: int, size: int) -> jax.Array:
    """To twice the height and width."""
    options = {"use_bias": False, "dtype": self.dtype}
    return nn.ConvTranspose(features, (size,) * 2, (2, 2), **options)(x)

  def stem(self, x: jax.Array, large: bool) -> jax.Array:
    """ImageNet's, to a quarter of the height and width, or CIFAR's."""
    if not large:
      return self.conv_norm(x, 64, 3)
    return nn.max_pool(self.conv_norm(x, 64, 7, 2), (3, 3), (2, 2), "SAME")

  def classify(self, x: jax.Array) -> jax.Array:
    return nn.Dense(1000, dtype=jnp.float32)(x.mean((1, 2)))


def one(net: Net, x: jax.Array, rectify: bool = True) -> jax.Array:
  return net.norm(x.astype(net.dtype), rectify)


# Residual blocks (He et al. 2016): of each convolution the multiple of the block's features, its
# size, and whether the block's stride is its own.
BLOCKS = {
  "Basic": ((1, 3, True), (1, 3, False)),
  "Bottleneck": ((1, 1, False), (1, 3, True), (4, 1, False)),
}


def residual(net: Net, x: jax.Array, block: str, features: int, stride: int) -> jax.Array:
  """A block of BLOCKS, with a projection beside it where the shape changes."""
  y = x
  for number, (multiple, size, strides) in enumerate(BLOCKS[block]):
    y = net.norm(y) if number else y
    y = net.conv(y, multiple * features, size, stride if strides else 1)
  if x.shape != y.shape:
    x = net.norm(net.conv(x, y.shape[-1], 1, stride), False)
  return net.norm(y, residual=x)


def resnet(
  net: Net, x: jax.Array, block: str, stages: tuple[int, ...], large: bool = False
) -> jax.Array:
  x = net.stem(x, large)
  places = [(stage, number) for stage, blocks in enumerate(stages) for number in range(blocks)]
  for at, (stage, number) in enumerate(places):
    stride = 2 if stage and number == 0 else 1
    body = functools.partial(residual, block=block, features=64 * 2**stage, stride=stride)
    x = Net(net.norm, net.dtype, body, name=f"{block}_{at}")(x)
  return net.classify(x)


def vgg(net: Net, x: jax.Array) -> jax.Array:
  """Convolution, norm, activation, and nothing beside them (Simonyan & Zisserman 2015)."""
  for features in (64, 128, 256):
    x = net.conv_norm(x, features, 3)
    # Not max-pooling: XLA shares the zeros that its gradient starts from with the ReLU before it,
    # which then reads a tensor of zeros, and even the network without a norm pays for that.
    x = nn.avg_pool(x, (2, 2), (2, 2))
  return net.classify(x)


def mobilenet(
  net: Net,
  x: jax.Array,
  stages: tuple[tuple[int, ...], ...] = ((6, 24, 2, 2),),
  stride: int = 1,
  last: int | None = None,
) -> jax.Array:
  """Inverted residuals with depthwise convolutions (MobileNetV2, Sandler et al. 2018).

  Stages are of expansion, features, blocks and the first one's stride, as in the paper's table 2.
  """
  x = net.conv_norm(x, 32, 3, stride)
  for expansion, features, blocks, first_stride in stages:
    for block in range(blocks):
      wide = expansion * x.shape[-1]
      y = net.conv_norm(x, wide, 1) if expansion > 1 else x
      y = net.conv_norm(y, wide, 3, 1 if block else first_stride, groups=wide)
      y = net.conv(y, features, 1)
      x = net.norm(y, False, x if x.shape == y.shape else None)
  return net.classify(net.conv_norm(x, last, 1) if last else x)


def densenet(
  net: Net, x: jax.Array, blocks: tuple[int, ...] = (3,), large: bool = False
) -> jax.Array:
  """Dense blocks (Huang et al. 2017): every layer normalizes all the outputs before it."""
  x = net.stem(x, large) if large else net.conv(x, 64, 3)
  for number, layers in enumerate(blocks):
    if number:
      x = net.conv(net.norm(x), x.shape[-1] // 2, 1)
      x = nn.avg_pool(x, (2, 2), (2, 2))
    for _ in range(layers):
      y = net.conv(net.conv_norm(net.norm(x), 128, 1), 32, 3)
      x = jnp.concatenate([x, y], axis=-1)
  return net.classify(net.norm(x))


def generator(net: Net, x: jax.Array) -> jax.Array:
  """Transposed convolutions from noise to images (DCGAN, Radford et al. 2016)."""
  x = nn.Dense(8 * 8 * 256, use_bias=False, dtype=net.dtype)(x)
  x = net.norm(x.reshape(-1, 8, 8, 256))
  for features in (128, 64):
    x = net.norm(net.upsample(x, features, 4))
  return jnp.tanh(nn.Conv(3, (3, 3), dtype=jnp.float32)(x))


def unet(
  net: Net, x: jax.Array, features: tuple[int, ...] = (64, 128, 256, 512, 1024)
) -> jax.Array:
  """Down and up again, with what was seen on the way down (Ronneberger et al. 2015), padded."""
  seen: list[jax.Array] = []
  for wide in features:
    if seen:
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = net.conv_norm(net.conv_norm(x, wide, 3), wide, 3)
    seen.append(x)
  for wide, skip in zip(features[-2::-1], seen[-2::-1], strict=True):
    x = jnp.concatenate([skip, net.upsample(x, wide, 2)], axis=-1)
    x = net.conv_norm(net.conv_norm(x, wide, 3), wide, 3)
  return nn.Conv(3, (1, 1), dtype=jnp.float32)(x)


@dataclasses.dataclass(frozen=True)
class Network:
  """A network: its body with these options, the shape of an input, and a batch's size."""

  title: str
  body: Callable[..., jax.Array]
  shape: tuple[int, ...]
  batch: int
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  def model(self, norm: Norm, dtype: Any) -> Net:
    body = functools.partial(self.body, **self.options)
    return Net(functools.partial(norm, dtype=dtype), dtype, body)

  def inputs(self) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((self.batch, *self.shape), jnp.float32)


CIFAR, IMAGENET = (32, 32, 3), (224, 224, 3)
RESNET50 = {"block": "Bottleneck", "stages": (3, 4, 6, 3), "large": True}
MOBILENET_V2 = (
  *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
  *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
WHOLE_MOBILENET = {"stages": MOBILENET_V2, "stride": 2, "last": 1280}
DENSENET121 = {"blocks": (6, 12, 24, 16), "large": True}
NETWORKS = {
  "resnet50": Network("ResNet-50", resnet, IMAGENET, 128, RESNET50),
  "resnet": Network(
    "ResNet, bottleneck blocks", resnet, (64, 64, 3), 256, {**RESNET50, "stages": (2, 2)}
  ),
  "basic": Network(
    "ResNet, basic blocks", resnet, CIFAR, 128, {"block": "Basic", "stages": (1, 1)}
  ),
  "vgg": Network("VGG", vgg, CIFAR, 128),
  "mobilenet": Network("MobileNetV2", mobilenet, CIFAR, 128),
  "densenet": Network("DenseNet block", densenet, CIFAR, 128),
  "generator": Network("GAN generator", generator, (128,), 256),
}
# As they are trained.
WHOLE = {
  "resnet50": NETWORKS["resnet50"],
  "mobilenet": Network("MobileNetV2", mobilenet, IMAGENET, 128, WHOLE_MOBILENET),
  "densenet": Network("DenseNet-121", densenet, IMAGENET, 64, DENSENET121),
  "unet": Network("U-Net", unet, (256, 256, 3), 32),
}
# As wide as they are trained, and with as large a batch on one chip, but few layers of each kind.
TRAINED = {
  "bottleneck": Network(
    "ResNet-50's first stages", resnet, IMAGENET, 64, {**RESNET50, "stages": (2, 1)}
  ),
  "identity": Network(
    "ResNet-50, first and last blocks", resnet, IMAGENET, 64, {**RESNET50, "stages": (1, 2)}
  ),
  "basic": Network(
    "ResNet-18's first stages",
    resnet,
    IMAGENET,
    64,
    {**RESNET50, "block": "Basic", "stages": (2, 1)},
  ),
  "vgg": Network("VGG", vgg, (128, 128, 3), 64),
  "mobilenet": Network(
    *("MobileNetV2's first stages", mobilenet, IMAGENET, 128),
    {"stages": MOBILENET_V2[:2], "stride": 2},
  ),
  "densenet": Network(
    "DenseNet's first layers", densenet, IMAGENET, 64, {"blocks": (3,), "large": True}
  ),
  "unet": Network("U-Net of two levels", unet, (256, 256, 3), 32, {"features": (64, 128)}),
  "generator": Network("DCGAN generator", generator, (128,), 1024),
}
# What a CPU compiles and runs in moments, and what tests do.
SMALL_RESNET = Network("ResNet", resnet, CIFAR, 64, {"block": "Basic", "stages": (1, 1, 1)})
TINY_RESNET = Network("ResNet", resnet, (8, 8, 3), 2, {"block": "Basic", "stages": (1,)})


# A step of training.

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def train_step(
  model: nn.Module, axes: tuple[str, ...] = (), apart: tuple[str, ...] = ()
) -> Callable[..., Any]:
  """One step of training.

  Under shard_map, `axes` are those that the batch lies on; its checks then sum the gradients too.
  `apart` are those among them along which the layers' statistics differ.
  """

  def step(params: Any, stats: Any, opt_state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
    def loss(params: Any) -> tuple[jax.Array, Any]:
      variables = {"params": params, "batch_stats": stats}
      outputs, new = model.apply(variables, inputs, mutable=["batch_stats"])
      return mean(_loss(outputs, targets), axes), new.get("batch_stats", {})

    (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), mean(new_stats, apart), opt_state, value

  return step


def mean(tree: Any, axes: tuple[str, ...]) -> Any:
  """The means of a tree's leaves along axes of a mesh, if there are any."""
  return jax.lax.pmean(tree, axes) if axes else tree


def step_arguments(network: Network, model: nn.Module) -> tuple[Any, ...]:
  """What a step takes, as shapes."""
  inputs = network.inputs()
  outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), inputs)
  params, stats = variables["params"], variables.get("batch_stats", {})
  images = len(outputs.shape) == 4
  targets = outputs if images else jax.ShapeDtypeStruct(outputs.shape[:1], jnp.int32)
  return params, stats, jax.eval_shape(OPTIMIZER.init, params), inputs, targets


def _loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross entropy of classes, square error of images."""
  if outputs.shape == targets.shape:
    return jnp.mean((outputs - targets) ** 2)
  return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
