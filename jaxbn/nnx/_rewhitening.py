"""Whitening at intervals for NNX: parameters and state for `jaxbn.alternatives.rewhitening`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn.alternatives import rewhitening as functions
from jaxbn.nnx._common import tuples

_KERNEL_INIT = nnx.initializers.lecun_normal()


class Whitening(nnx.Variable):
  """What a whitened layer does to its input: constants of training, no parameters.

  Args:
    value: the array.
    **metadata: as of any `nnx.Variable`.

  >>> import jaxbn.nnx
  >>> from flax import nnx
  >>> model = nnx.Sequential(jaxbn.nnx.WhitenedLinear(4, 2, rngs=nnx.Rngs(0)))
  >>> [path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, jaxbn.nnx.Whitening))]
  ['center', 'matrix']
  """

  def __init__(self, value: Any, **metadata: Any):
    super().__init__(value, **metadata)


class _Whitened(nnx.Module):
  """What both layers do alike."""

  def __init__(
    self,
    shape: tuple[int, ...],
    *,
    epsilon: float = 1e-3,
    decorrelate: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: Any = None,
    kernel_init: Initializer = _KERNEL_INIT,
    bias_init: Initializer = nnx.initializers.zeros,
    axis_name: Any = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    rewhitening: bool = False,
    rngs: nnx.Rngs,
  ):
    self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
    self.bias = nnx.Param(bias_init(rngs.params(), shape[-1:], param_dtype))
    plain = functions.init(shape[-2])
    self.center = Whitening(plain.center)
    self.matrix = Whitening(plain.matrix)
    self.epsilon = epsilon
    self.decorrelate = decorrelate
    self.dtype = dtype
    self.precision = precision
    self.axis_name = axis_name
    self.axis_index_groups = tuples(axis_index_groups)
    self.rewhitening = rewhitening

  def _arguments(self, x: Any, mask: jax.Array | None) -> dict[str, Any]:
    """What both functions take: parameters and whitening anew in that mode."""
    x = _checks.inexact(x)
    params = {"kernel": self.kernel[...], "bias": self.bias[...]}
    whitening = functions.Whitening(self.center[...], self.matrix[...])
    if self.rewhitening:
      statistics = functions.statistics(
        x, mask=mask, axis_name=self.axis_name, axis_index_groups=self.axis_index_groups
      )
      params, whitening = functions.rewhiten(
        params, whitening, statistics, epsilon=self.epsilon, decorrelate=self.decorrelate
      )
      for name, value in {**params, **whitening._asdict()}.items():
        getattr(self, name).set_value(value)
    if self.dtype is not None:
      x, params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), (x, params))
    return {"x": x, **params, "whitening": whitening, "precision": self.precision}


class WhitenedLinear(_Whitened):
  r"""A dense layer whose input is whitened at intervals (Desjardins et al. 2015).

      y = (x - center) @ matrix @ kernel + bias

  Center and matrix are of the variable type `Whitening`, constants in training; they start as those
  of the plain layer. In another mode, a call takes them anew from its x, and changes kernel and
  bias so that the function stays. So one batch whitens all layers of a model, outside of the
  gradient:

      old = nnx.to_pure_dict(nnx.state(model, jaxbn.nnx.Whitening))
      model.set_attributes(rewhitening=True)
      model(x)
      model.set_attributes(rewhitening=False)
      new = nnx.to_pure_dict(nnx.state(model, jaxbn.nnx.Whitening))
      state = jaxbn.alternatives.rewhitening_optimizer.rewhiten_optimizer_state(
        optimizer.opt_state, old, new)
      optimizer.opt_state = nnx.data(state)

  Args:
    in_features: how many inputs.
    out_features: how many outputs.
    options: as keyword arguments,
      epsilon, decorrelate: as in `jaxbn.alternatives.rewhitening.rewhiten`;
      dtype: of the computation (default: what input and parameters promote to);
      param_dtype, kernel_init, bias_init, precision, rngs: as in `flax.nnx.Linear`;
      axis_name, axis_index_groups: as in `jaxbn.sync`; with sharded arrays none is needed;
      rewhitening: whether calls whiten anew.

  >>> import jax, jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.WhitenedLinear(4, 2, rngs=nnx.Rngs(0))
  >>> x = 3 + jax.random.normal(jax.random.key(0), (64, 4))
  >>> before = layer(x)
  >>> layer.set_attributes(rewhitening=True)
  >>> jnp.allclose(layer(x), before, atol=1e-5)
  Array(True, dtype=bool)
  >>> jnp.allclose(layer.center[...], x.mean(0), atol=1e-5)
  Array(True, dtype=bool)
  """

  def __init__(self, in_features: int, out_features: int, **options: Any):
    super().__init__((in_features, out_features), **options)

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Applies the layer; whitens anew in that mode.

    Args:
      x: of shape (..., in_features).
      mask: which examples exist: as in `jaxbn.alternatives.rewhitening.statistics`.

    Returns:
      y, of shape (..., out_features).
    """
    return functions.whitened_dense(**self._arguments(x, mask))


class WhitenedConv(_Whitened):
  r"""A convolution whose input is whitened, across its channels, at intervals.

  As `WhitenedLinear`; see `jaxbn.alternatives.rewhitening.whitened_conv`.

  Args:
    in_features: how many input channels.
    out_features: how many outputs.
    kernel_size: of the window, a sequence.
    strides, padding, kernel_dilation: as in `jaxbn.alternatives.rewhitening.whitened_conv`.
    options: as in `WhitenedLinear`.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.WhitenedConv(3, 2, kernel_size=(3, 3), rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((1, 8, 8, 3))).shape
  (1, 8, 8, 2)
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
    **options: Any,
  ):
    super().__init__((*kernel_size, in_features, out_features), **options)
    self.strides = tuples(strides)
    self.padding = tuples(padding)
    self.kernel_dilation = tuples(kernel_dilation)

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Applies the layer; whitens anew in that mode.

    Args:
      x: of shape (examples, *positions, in_features).
      mask: which examples or positions exist, for the statistics.

    Returns:
      y, of shape (examples, *positions, out_features).
    """
    return functions.whitened_conv(
      **self._arguments(x, mask),
      strides=self.strides,
      padding=self.padding,
      kernel_dilation=self.kernel_dilation,
    )
