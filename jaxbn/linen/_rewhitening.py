"""Whitening at intervals for Linen: parameters and state for `jaxbn.alternatives.rewhitening`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn.alternatives import rewhitening


class WhitenedDense(nn.Module):
  r"""A dense layer whose input is whitened at intervals (Desjardins et al. 2015).

      y = (x - center) @ matrix @ kernel + bias

  Center and matrix, in the collection `whitening`, are constants in training; they start as those
  of the plain layer. Where both that collection and `params` are mutable, the layer takes them anew
  from the x that it is called with, and changes kernel and bias so that the function stays. So one
  call of a model, outside of the gradient, whitens all its layers by one batch:

      y, new = model.apply(variables, x, mutable=["params", "whitening"])
      opt_state = jaxbn.alternatives.rewhitening_optimizer.rewhiten_optimizer_state(
        opt_state, variables["whitening"], new["whitening"])

  Attributes:
    features: how many outputs.
    epsilon, decorrelate: as in `jaxbn.alternatives.rewhitening.rewhiten`.
    dtype: of the computation (default: what input and parameters promote to).
    param_dtype, kernel_init, bias_init, precision: as in `flax.linen.Dense`.
    axis_name, axis_index_groups: as in `jaxbn.sync`. Under jit with sharded arrays none is needed.

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
      mask: which examples exist: as in `jaxbn.alternatives.rewhitening.statistics`.

    Returns:
      y, of shape (..., features).
    """
    return rewhitening.whitened_dense(**_arguments(self, (), x, mask))


class WhitenedConv(nn.Module):
  r"""A convolution whose input is whitened, across its channels, at intervals.

  As `WhitenedDense`; see `jaxbn.alternatives.rewhitening.whitened_conv`.

  Attributes:
    features: how many outputs.
    kernel_size: of the window, a sequence.
    strides, padding, kernel_dilation: as in `jaxbn.alternatives.rewhitening.whitened_conv`.
    epsilon, decorrelate, dtype, param_dtype, precision, kernel_init, bias_init, axis_name,
      axis_index_groups: as in `WhitenedDense`.

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
    return rewhitening.whitened_conv(
      **_arguments(self, self.kernel_size, x, mask),
      strides=self.strides,
      padding=self.padding,
      kernel_dilation=self.kernel_dilation,
    )


def _arguments(layer: Any, window: Sequence[int], x: Any, mask: Any) -> dict[str, Any]:
  """What both functions take: parameters and whitening anew where they may be."""
  x = _checks.inexact(x)
  shape = (*window, x.shape[-1], layer.features)
  params = {
    "kernel": layer.param("kernel", layer.kernel_init, shape, layer.param_dtype),
    "bias": layer.param("bias", layer.bias_init, shape[-1:], layer.param_dtype),
  }
  plain = rewhitening.init(x.shape[-1])
  center = layer.variable("whitening", "center", lambda: plain.center)
  matrix = layer.variable("whitening", "matrix", lambda: plain.matrix)
  whitening = rewhitening.Whitening(center.value, matrix.value)
  if layer.is_mutable_collection("whitening") and not layer.is_initializing():
    params, whitening = _anew(layer, params, whitening, x, mask)
    center.value, matrix.value = whitening
  if layer.dtype is not None:
    x, params = jax.tree.map(lambda leaf: leaf.astype(layer.dtype), (x, params))
  return {"x": x, **params, "whitening": whitening, "precision": layer.precision}


def _anew(layer: Any, params: Any, whitening: Any, x: jax.Array, mask: Any) -> Any:
  """Whitens anew by x, and stores the parameters that go with it."""
  if not layer.is_mutable_collection("params"):
    raise ValueError(
      "the collection 'whitening' is mutable, but 'params' is not: whitening anew changes both, "
      "or the function would not stay: pass mutable=['params', 'whitening'], or neither."
    )
  statistics = rewhitening.statistics(
    x, mask=mask, axis_name=layer.axis_name, axis_index_groups=layer.axis_index_groups
  )
  params, whitening = rewhitening.rewhiten(
    params, whitening, statistics, epsilon=layer.epsilon, decorrelate=layer.decorrelate
  )
  for name, value in params.items():
    boxed = layer.get_variable("params", name)  # perhaps with names of axes of a mesh
    layer.put_variable("params", name, meta.replace_boxed(boxed, value))
  return params, whitening
