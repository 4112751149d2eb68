"""The norms: what `config.norm` may name, ours and Flax's, so that they compare on one task.

A norm is a function of `(network, train, mask)` that gives a layer constructor: it is called with
`scale_init` and `activation`, or without, once for each place in the network. The activation is
the norm's to apply, so that it need not be kept for the derivative. `network` has the fields of
`examples.models.Network`, of which `axis_name`, `momentum` and `dtype` are for its norms; the mask
(B,) is true for the examples that count.

To add one, write its function and name it in `NORMS`; if it normalizes virtual batches, in
`VIRTUAL` too. What else it needs are its keyword-only arguments, with a value by default each:
`config.norm_options` sets them, as in --config.norm_options=channels=4,epsilon=1e-3.
"""

import ast
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from examples.settings import UserError, lookup, nearest
from jaxbn import linen as bn

Layer = Callable[..., Callable[[jax.Array], jax.Array]]
Mask = jax.Array | None


def batch_norm(network: Any, train: bool, mask: Mask, *, epsilon: float = 1e-5) -> Layer:
  """Batch statistics of all valid examples of the global batch in training, running ones else."""
  return _of_batches(network, train, mask, bn.BatchNorm, epsilon=epsilon)


def batch_renorm(
  network: Any,
  train: bool,
  mask: Mask,
  *,
  epsilon: float = 1e-5,
  r_max: float = 3.0,
  d_max: float = 5.0,
  warmup: int = 100,
) -> Layer:
  """Batch renormalization (Ioffe, 2017): batch norm, corrected towards the running statistics.

  For `warmup` steps it is batch norm; the limits then grow to theirs within as many again.
  """
  limits = {
    "r_max": optax.linear_schedule(1.0, r_max, warmup, warmup),
    "d_max": optax.linear_schedule(0.0, d_max, warmup, warmup),
  }
  return _of_batches(network, train, mask, bn.BatchRenorm, epsilon=epsilon, **limits)


def whitening(
  network: Any, train: bool, mask: Mask, *, epsilon: float = 1e-3, group_size: int = 8
) -> Layer:
  """Decorrelated batch norm (Huang et al., 2018): batch norm that whitens groups of channels."""
  return _whitened(network, train, mask, group_size, epsilon=epsilon, method="zca")


def iternorm(
  network: Any,
  train: bool,
  mask: Mask,
  *,
  epsilon: float = 1e-3,
  group_size: int = 8,
  iterations: int = 5,
) -> Layer:
  """The same by some iterations of Newton's method (Huang et al., 2019)."""
  newton = {"method": "newton", "iterations": iterations}
  return _whitened(network, train, mask, group_size, epsilon=epsilon, **newton)


def _whitened(network: Any, train: bool, mask: Mask, group_size: int, **settings: Any) -> Layer:
  """A layer whose groups are as large as a divisor of its width allows."""
  if group_size < 1:
    raise UserError(f"config.norm_options has group_size={group_size}, but must be at least 1")
  if train:
    settings["axis_name"] = network.axis_name

  def layer(activation: Callable[[jax.Array], jax.Array] | None = None, **options: Any) -> Any:
    def call(x: jax.Array) -> jax.Array:
      norm = bn.WhiteningNorm(
        use_running_average=not train,
        momentum=network.momentum,
        dtype=network.dtype,
        group_size=math.gcd(group_size, x.shape[-1]),
        **settings,
        **options,
      )
      y = masked(norm, mask)(x)
      return y if activation is None else activation(y)

    return call

  return layer


def _of_batches(
  network: Any, train: bool, mask: Mask, module: Callable[..., nn.Module], **settings: Any
) -> Layer:
  """A layer of our `module`, whose statistics are of the batch."""
  if train:
    settings["axis_name"] = network.axis_name
    if network.virtual_batch_size is not None:
      settings["virtual_batch_size"] = network.virtual_batch_size

  def layer(**options: Any) -> Callable[[jax.Array], jax.Array]:
    norm = module(
      use_running_average=not train,
      momentum=network.momentum,
      dtype=network.dtype,
      **settings,
      **options,
    )
    return masked(norm, mask)

  return layer


def masked(norm: Any, mask: Mask) -> Callable[[jax.Array], jax.Array]:
  """`norm` with the mask of the examples, in the shape that broadcasts against its input."""
  if mask is None:
    return norm
  return lambda x: norm(x, mask=mask.reshape(-1, *[1] * (x.ndim - 1)))


class Affine(nn.Module):
  """`x * scale + bias` per channel: what batch normalization leaves when it normalizes nothing.

  Kept, so that networks with and without a norm have the same parameters, and so that a
  residual branch can start at zero in both.
  """

  scale_init: nn.initializers.Initializer = nn.initializers.ones
  activation: Callable[[jax.Array], jax.Array] | None = None
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", self.scale_init, x.shape[-1:], jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
    y = x * scale.astype(x.dtype) + bias.astype(x.dtype)
    return y if self.activation is None else self.activation(y)


def no_norm(network: Any, train: bool, mask: Mask) -> Layer:
  """Nothing but the affine map: the network to compare the norms with."""
  del train, mask  # a norm without statistics has no use for them
  return functools.partial(Affine, dtype=network.dtype)


# Flax's norms. Their statistics are of one example, so that it makes no difference whether it is
# for training, which other examples there are, where they are, or whether they count.


def layer_norm(
  network: Any, train: bool, mask: Mask, *, epsilon: float = 1e-6, per_position: bool = False
) -> Layer:
  """Statistics of all positions and channels of an example (Ba et al., 2016).

  So it is what Wu & He (2018, figure 2) compare group norm with: one group. ConvNeXt's, of the
  channels at each position alone, is `per_position`. `scale` and `bias` are of channels either way.
  """
  del train, mask
  return _of_examples(network, nn.LayerNorm, _axes(network, per_position), epsilon)


def rms_norm(
  network: Any, train: bool, mask: Mask, *, epsilon: float = 1e-6, per_position: bool = False
) -> Layer:
  """Layer norm that subtracts no mean (Zhang & Sennrich, 2019), of the same elements; no bias."""
  del train, mask
  return _of_examples(network, nn.RMSNorm, _axes(network, per_position), epsilon)


def group_norm(
  network: Any, train: bool, mask: Mask, *, epsilon: float = 1e-6, channels: int = 8
) -> Layer:
  """Statistics of all positions of `channels` channels of an example (Wu & He, 2018).

  Where `channels` does not divide a layer's width, their greatest common divisor is taken: as many
  channels in every group. Eight is the paper's 32 groups at 256 channels.
  """
  del train, mask
  if channels < 1:
    raise UserError(f"config.norm_options has channels={channels}, but must be at least 1")

  def options(x: jax.Array) -> dict[str, Any]:
    size = math.gcd(channels, x.shape[-1])
    _several(network, size * math.prod(x.shape[1:-1]), x)
    return {"num_groups": None, "group_size": size}

  return _of_examples(network, nn.GroupNorm, options, epsilon)


def instance_norm(network: Any, train: bool, mask: Mask, *, epsilon: float = 1e-6) -> Layer:
  """Statistics of all positions of each channel of an example (Ulyanov et al., 2016)."""
  del train, mask

  def options(x: jax.Array) -> dict[str, Any]:
    _several(network, math.prod(x.shape[1:-1]), x)
    return {}

  return _of_examples(network, nn.InstanceNorm, options, epsilon)


def _of_examples(
  network: Any,
  module: Callable[..., nn.Module],
  by_shape: Callable[[jax.Array], dict[str, Any]],
  epsilon: float,
) -> Layer:
  """A layer of Flax's `module`, whose further arguments follow from the shape of its input."""

  def layer(activation: Callable[[jax.Array], jax.Array] | None = None, **options: Any) -> Any:
    def call(x: jax.Array) -> jax.Array:
      y = module(epsilon=epsilon, dtype=network.dtype, **by_shape(x), **options)(x)
      return y if activation is None else activation(y)

    return call

  return layer


def _axes(network: Any, per_position: bool) -> Callable[[jax.Array], dict[str, Any]]:
  def options(x: jax.Array) -> dict[str, Any]:
    axes = (-1,) if per_position else tuple(range(1, x.ndim))
    _several(network, math.prod(x.shape[a] for a in axes), x)
    return {"reduction_axes": axes}

  return options


def _several(network: Any, elements: int, x: jax.Array) -> None:
  """Refuses statistics of one element each: they leave nothing of it but, at most, its sign."""
  if elements < 2:
    raise UserError(
      f"config.norm is {network.norm!r}, but where the network's examples have the shape "
      f"{x.shape[1:]} each statistic would be of one element, and nothing be left of it: "
      "choose another norm, or give the network wider layers or fewer stages"
    )


NORMS: dict[str, Callable[..., Layer]] = {
  "batch": batch_norm,
  "renorm": batch_renorm,
  "whitening": whitening,
  "iternorm": iternorm,
  "none": no_norm,
  "layer": layer_norm,
  "group": group_norm,
  "instance": instance_norm,
  "rms": rms_norm,
}
VIRTUAL = ("batch", "renorm")  # those that normalize virtual batches


def options(config: Any) -> dict[str, Any]:
  """The keyword arguments that `config.norm_options` gives to the norm, as in `a=1,b=zca`."""
  parameters = inspect.signature(lookup(NORMS, config.norm, "config.norm")).parameters.values()
  allowed = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
  values = _keywords(config.norm_options)
  for name, value in values.items():
    if name not in allowed:
      raise UserError(
        f"config.norm_options has {name!r}, but config.norm is {config.norm!r}, whose options are "
        f"{', '.join(allowed) or 'none'}{nearest(name, allowed)}"
      )
    kind = type(allowed[name])
    if allowed[name] is not None and type(value) not in (kind, *((int,) if kind is float else ())):
      raise UserError(
        f"config.norm_options has {name}={value!r}, but must be of type {kind.__name__}, such as "
        f"--config.norm_options={name}={allowed[name]}"
      )
  return values


def _keywords(text: str) -> dict[str, Any]:
  """What stands between the parentheses of a call: literals, or names for strings."""
  try:
    call = ast.parse(f"norm({text})", mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
      raise ValueError
    return {
      str(k.arg): k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value)
      for k in call.keywords
    }
  except (SyntaxError, ValueError):
    raise UserError(
      f"config.norm_options is {text!r}, but must be NAME=VALUE, several with commas between them, "
      "as in --config.norm_options=channels=4,epsilon=1e-3"
    ) from None
