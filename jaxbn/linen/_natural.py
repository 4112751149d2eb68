"""Whitening at intervals for Flax Linen: parameters and state for `jaxbn.variants.natural`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn.variants import natural


class WhitenedDense(nn.Module):
  r"""A dense layer whose input is whitened at intervals (Desjardins et al. 2015).

      y = (x - center) @ matrix @ kernel + bias

  Center and matrix, in the collection `whitening`, are constants in training; they start as those
  of the plain layer. Where both that collection and `params` are mutable, the layer takes them anew
  from the x that it is called with, and changes kernel and bias so that the function stays. So one
  call of a model, outside of the gradient, whitens all its layers by one batch:

      y, new = model.apply(variables, x, mutable=["params", "whitening"])
      opt_state = jaxbn.variants.natural.rewhiten_optimizer_state(
        opt_state, variables["whitening"], new["whitening"])

  Attributes:
    features: how many outputs.
    epsilon: added to the variances; see `jaxbn.variants.natural.rewhiten`.
    decorrelate: False only centres (Wiesler et al. 2014).
    dtype: of the computation (default: what input and parameters promote to).
    param_dtype: of kernel and bias.
    precision: of the product, as in `jax.lax.dot_general`.
    kernel_init: initializer of the kernel.
    bias_init: initializer of the bias.
    axis_name: the axis of pmap, shard_map or vmap whose members share statistics. Under jit with
      sharded arrays none is needed.
    axis_index_groups: indices along it in groups, each sharing among itself only.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.WhitenedDense(2)
  >>> x = 3 + jax.random.normal(jax.random.key(0), (64, 4))
  >>> variables = layer.init(jax.random.key(1), x)
  >>> y, new = layer.apply(variables, x, mutable=["params", "whitening"])
  >>> jnp.allclose(y, layer.apply(variables, x), atol=1e-5)
  Array(True, dtype=bool)
  >>> jnp.allclose(new["whitening"]["center"], x.mean(0), atol=1e-5)
  Array(True, dtype=bool)
  """

  features: int
  epsilon: float = 1e-3
  decorrelate: bool = True
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: Any = None
  kernel_init: Initializer = nn.initializers.lecun_normal()
  bias_init: Initializer = nn.initializers.zeros
  axis_name: Any = None
  axis_index_groups: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Applies the layer; whitens anew where `params` and `whitening` are mutable.

    Args:
      x: of shape (..., inputs).
      mask: which examples exist, for the statistics: as in `jaxbn.variants.natural.statistics`.

    Returns:
      y, of shape (..., features).
    """
    x = _checks.inexact(x)
    params, whitening = _variables(self, x, (x.shape[-1], self.features), mask)
    x, params = _cast(self.dtype, x, params)
    return natural.whitened_dense(x, **params, whitening=whitening, precision=self.precision)


class WhitenedConv(nn.Module):
  r"""A convolution whose input is whitened, across its channels, at intervals.

  As `WhitenedDense`; see `jaxbn.variants.natural.whitened_conv`.

  Attributes:
    features: how many outputs.
    kernel_size: of the window, a sequence.
    strides: one for all axes, or one for each.
    padding: "SAME", "VALID", or (low, high) for each axis.
    kernel_dilation: one for all axes, or one for each.
    epsilon: added to the variances; see `jaxbn.variants.natural.rewhiten`.
    decorrelate: False only centres.
    dtype: of the computation (default: what input and parameters promote to).
    param_dtype: of kernel and bias.
    precision: of the convolution.
    kernel_init: initializer of the kernel.
    bias_init: initializer of the bias.
    axis_name: the axis of pmap, shard_map or vmap whose members share statistics.
    axis_index_groups: indices along it in groups, each sharing among itself only.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.WhitenedConv(2, kernel_size=(3, 3))
  >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  >>> jax.tree.map(jnp.shape, variables["params"])
  {'bias': (2,), 'kernel': (3, 3, 3, 2)}
  """

  features: int
  kernel_size: Sequence[int]
  strides: int | Sequence[int] = 1
  padding: str | Sequence[tuple[int, int]] = "SAME"
  kernel_dilation: int | Sequence[int] = 1
  epsilon: float = 1e-3
  decorrelate: bool = True
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: Any = None
  kernel_init: Initializer = nn.initializers.lecun_normal()
  bias_init: Initializer = nn.initializers.zeros
  axis_name: Any = None
  axis_index_groups: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Applies the layer; whitens anew where `params` and `whitening` are mutable.

    Args:
      x: of shape (examples, *positions, channels).
      mask: which examples or positions exist, for the statistics.

    Returns:
      y, of shape (examples, *positions, features).
    """
    x = _checks.inexact(x)
    shape = (*self.kernel_size, x.shape[-1], self.features)
    params, whitening = _variables(self, x, shape, mask)
    x, params = _cast(self.dtype, x, params)
    return natural.whitened_conv(
      x,
      **params,
      whitening=whitening,
      strides=self.strides,
      padding=self.padding,
      kernel_dilation=self.kernel_dilation,
      precision=self.precision,
    )


def _variables(
  layer: Any, x: jax.Array, shape: tuple[int, ...], mask: jax.Array | None
) -> tuple[dict[str, jax.Array], natural.Whitening]:
  """Parameters and whitening, anew where they may be."""
  params = {
    "kernel": layer.param("kernel", layer.kernel_init, shape, layer.param_dtype),
    "bias": layer.param("bias", layer.bias_init, shape[-1:], layer.param_dtype),
  }
  plain = natural.init(shape[-2])
  center = layer.variable("whitening", "center", lambda: plain.center)
  matrix = layer.variable("whitening", "matrix", lambda: plain.matrix)
  whitening = natural.Whitening(center.value, matrix.value)
  if layer.is_initializing() or not layer.is_mutable_collection("whitening"):
    return params, whitening
  if not layer.is_mutable_collection("params"):
    raise ValueError(
      "the collection 'whitening' is mutable, but 'params' is not: whitening anew changes both, "
      "or the function would not stay: pass mutable=['params', 'whitening'], or neither."
    )
  statistics = natural.statistics(
    x, mask=mask, axis_name=layer.axis_name, axis_index_groups=layer.axis_index_groups
  )
  params, whitening = natural.rewhiten(
    params, whitening, statistics, epsilon=layer.epsilon, decorrelate=layer.decorrelate
  )
  for name, value in params.items():
    boxed = layer.get_variable("params", name)  # perhaps with names of axes of a mesh
    layer.put_variable("params", name, meta.replace_boxed(boxed, value))
  center.value, matrix.value = whitening
  return params, whitening


def _cast(dtype: Any, x: jax.Array, params: dict[str, jax.Array]) -> Any:
  if dtype is None:
    return x, params
  return x.astype(dtype), {name: value.astype(dtype) for name, value in params.items()}
