"""The layers of normalizer-free networks for NNX: see `jaxbn.alternatives.normalizer_free`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn.alternatives.normalizer_free import scaled_weight_standardization


class WSConv(nnx.Conv):
  r"""A convolution with scaled weight standardization (Brock et al. 2021): `flax.nnx.Conv` with

      kernel' = (kernel - mean) / sqrt(fan_in · var + epsilon) · gain

  in place of its kernel, per output channel: see
  `jaxbn.alternatives.normalizer_free.scaled_weight_standardization`. What is learned is the kernel,
  as Flax's layer has it, and `gain`, which weight decay should leave alone as it does scales.

  Args:
    in_features: number of inputs.
    out_features: number of outputs.
    kernel_size: shape of the kernel.
    rngs: rng key.
    gain_init: initializer of gain.
    gain_metadata: metadata of gain.
    epsilon: added to fan_in · var.
    options: whatever else `flax.nnx.Conv` takes, as keyword arguments, except a mask: what a masked
      weight means for the mean of the others, no paper says. dtype is of the result; the
      standardization is in float32 at least.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.WSConv(2, 4, (3, 3), rngs=nnx.Rngs(0))
  >>> y = layer(jnp.ones((1, 8, 8, 2)))
  >>> bool(jnp.allclose(y[:, 1:-1, 1:-1], 0, atol=1e-6))  # a constant image has no signal
  True
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: Any,
    *,
    rngs: nnx.Rngs,
    gain_init: Initializer = nnx.initializers.ones,
    gain_metadata: Mapping[str, Any] = MappingProxyType({}),
    epsilon: float = 1e-5,
    **options: Any,
  ):
    if options.get("mask") is not None:
      raise ValueError(
        "mask is given, but the weights that it leaves out would still count in the mean and "
        "variance of the others: leave mask out, or use flax.nnx.Conv."
      )
    super().__init__(in_features, out_features, kernel_size, rngs=rngs, **options)
    self.gain = _gain(self, rngs, gain_init, gain_metadata)
    self.epsilon = epsilon

  def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
    """Convolves the inputs with the standardized kernel.

    Args:
      inputs: as for `flax.nnx.Conv`.
      out_sharding: likewise.

    Returns:
      As of `flax.nnx.Conv`.
    """
    return nnx.Conv.__call__(_standardized(self), inputs, out_sharding)


class WSLinear(nnx.Linear):
  r"""A linear layer with scaled weight standardization (Brock et al. 2021): `flax.nnx.Linear` with

      kernel' = (kernel - mean) / sqrt(fan_in · var + epsilon) · gain

  in place of its kernel, per output; see `jaxbn.nnx.WSConv`.

  Args:
    in_features: number of inputs.
    out_features: number of outputs.
    rngs: rng key.
    gain_init: initializer of gain.
    gain_metadata: metadata of gain.
    epsilon: added to fan_in · var.
    options: whatever else `flax.nnx.Linear` takes, as keyword arguments.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.WSLinear(3, 4, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((1, 3))).shape
  (1, 4)
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    gain_init: Initializer = nnx.initializers.ones,
    gain_metadata: Mapping[str, Any] = MappingProxyType({}),
    epsilon: float = 1e-5,
    **options: Any,
  ):
    super().__init__(in_features, out_features, rngs=rngs, **options)
    self.gain = _gain(self, rngs, gain_init, gain_metadata)
    self.epsilon = epsilon

  def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
    """Multiplies the inputs with the standardized kernel.

    Args:
      inputs: as for `flax.nnx.Linear`.
      out_sharding: likewise.

    Returns:
      As of `flax.nnx.Linear`.
    """
    return nnx.Linear.__call__(_standardized(self), inputs, out_sharding)


def _gain(layer: Any, rngs: nnx.Rngs, init: Initializer, metadata: Mapping[str, Any]) -> nnx.Param:
  return nnx.Param(init(rngs.params(), (layer.out_features,), layer.param_dtype), **metadata)


def _standardized(layer: Any) -> Any:
  """A copy of the layer for Flax's own call, with the standardized kernel."""
  copy: Any = nnx.clone(layer)
  kernel = scaled_weight_standardization(layer.kernel[...], layer.gain[...], epsilon=layer.epsilon)
  copy.kernel = nnx.Param(kernel)
  return copy


class SkipInit(nnx.Module):
  """`x * scale` with one learned number, at first 0: a residual branch that starts as nothing.

  Source: De & Smith 2020, "Batch normalization biases residual blocks towards the identity function
  in deep networks".

  Args:
    scale_init: initializer of scale.
    dtype: of the result (default: what x and scale promote to).
    param_dtype: of scale.
    rngs: rng key.
    scale_metadata: metadata of scale.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> print(jaxbn.nnx.SkipInit(rngs=nnx.Rngs(0))(jnp.ones(3)))
  [0. 0. 0.]
  """

  def __init__(
    self,
    *,
    scale_init: Initializer = nnx.initializers.zeros,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.scale = nnx.Param(scale_init(rngs.params(), (), param_dtype), **scale_metadata)
    self.dtype = dtype

  def __call__(self, x: Any) -> jax.Array:
    """Scales x.

    Args:
      x: floating-point or complex array of any rank.

    Returns:
      An array of x's shape.
    """
    x, scale = dtypes.promote_dtype((_checks.inexact(x), self.scale[...]), dtype=self.dtype)
    return x * scale
