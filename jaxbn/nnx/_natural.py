"""Whitening at intervals for Flax NNX: parameters and state for `jaxbn.variants.natural`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn.nnx._common import tuples
from jaxbn.variants import natural

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
    epsilon: float,
    decorrelate: bool,
    dtype: Dtype | None,
    param_dtype: Dtype,
    precision: Any,
    kernel_init: Initializer,
    bias_init: Initializer,
    axis_name: Any,
    axis_index_groups: Sequence[Sequence[int]] | None,
    rewhitening: bool,
    rngs: nnx.Rngs,
  ):
    self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
    self.bias = nnx.Param(bias_init(rngs.params(), shape[-1:], param_dtype))
    plain = natural.init(shape[-2])
    self.center = Whitening(plain.center)
    self.matrix = Whitening(plain.matrix)
    self.epsilon = epsilon
    self.decorrelate = decorrelate
    self.dtype = dtype
    self.precision = precision
    self.axis_name = axis_name
    # NNX compares and hashes what is not data: lists become tuples.
    self.axis_index_groups = axis_index_groups and tuple(map(tuple, axis_index_groups))
    self.rewhitening = rewhitening

  def _given(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
    """x and the parameters, in the dtype of the computation; whitened anew in that mode."""
    x = _checks.inexact(x)
    params = {"kernel": self.kernel[...], "bias": self.bias[...]}
    whitening = natural.Whitening(self.center[...], self.matrix[...])
    if self.rewhitening:
      statistics = natural.statistics(
        x, mask=mask, axis_name=self.axis_name, axis_index_groups=self.axis_index_groups
      )
      params, whitening = natural.rewhiten(
        params, whitening, statistics, epsilon=self.epsilon, decorrelate=self.decorrelate
      )
      for name, value in {**params, **whitening._asdict()}.items():
        getattr(self, name).set_value(value)
    if self.dtype is not None:
      x, params = x.astype(self.dtype), {k: v.astype(self.dtype) for k, v in params.items()}
    return x, {**params, "whitening": whitening, "precision": self.precision}


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
      state = jaxbn.variants.natural.rewhiten_optimizer_state(optimizer.opt_state, old, new)
      optimizer.opt_state = nnx.data(state)

  Args:
    in_features: how many inputs.
    out_features: how many outputs.
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
    rewhitening: whether calls whiten anew.
    rngs: rng key.

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

  def __init__(
    self,
    in_features: int,
    out_features: int,
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
    super().__init__(
      (in_features, out_features),
      epsilon=epsilon,
      decorrelate=decorrelate,
      dtype=dtype,
      param_dtype=param_dtype,
      precision=precision,
      kernel_init=kernel_init,
      bias_init=bias_init,
      axis_name=axis_name,
      axis_index_groups=axis_index_groups,
      rewhitening=rewhitening,
      rngs=rngs,
    )

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Applies the layer; whitens anew in that mode.

    Args:
      x: of shape (..., in_features).
      mask: which examples exist, for the statistics: as in `jaxbn.variants.natural.statistics`.

    Returns:
      y, of shape (..., out_features).
    """
    x, given = self._given(x, mask)
    return natural.whitened_dense(x, **given)


class WhitenedConv(_Whitened):
  r"""A convolution whose input is whitened, across its channels, at intervals.

  As `WhitenedLinear`; see `jaxbn.variants.natural.whitened_conv`.

  Args:
    in_features: how many input channels.
    out_features: how many outputs.
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
    rewhitening: whether calls whiten anew.
    rngs: rng key.

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
    super().__init__(
      (*kernel_size, in_features, out_features),
      epsilon=epsilon,
      decorrelate=decorrelate,
      dtype=dtype,
      param_dtype=param_dtype,
      precision=precision,
      kernel_init=kernel_init,
      bias_init=bias_init,
      axis_name=axis_name,
      axis_index_groups=axis_index_groups,
      rewhitening=rewhitening,
      rngs=rngs,
    )
    self.strides, self.padding, self.kernel_dilation = map(
      tuples, (strides, padding, kernel_dilation)
    )

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Applies the layer; whitens anew in that mode.

    Args:
      x: of shape (examples, *positions, in_features).
      mask: which examples or positions exist, for the statistics.

    Returns:
      y, of shape (examples, *positions, out_features).
    """
    x, given = self._given(x, mask)
    return natural.whitened_conv(
      x,
      **given,
      strides=self.strides,
      padding=self.padding,
      kernel_dilation=self.kernel_dilation,
    )
