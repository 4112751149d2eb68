"""The layers of normalizer-free networks for Linen: see `jaxbn.alternatives.normalizer_free`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn.alternatives.normalizer_free import scaled_weight_standardization


class WSConv(nn.Conv):
  r"""A convolution with scaled weight standardization (Brock et al. 2021): `flax.linen.Conv` with

      kernel' = (kernel - mean) / sqrt(fan_in · var + epsilon) · gain

  in place of its kernel, per output channel: see
  `jaxbn.alternatives.normalizer_free.scaled_weight_standardization`. What is learned is the kernel,
  as Flax's layer has it, and `gain`, which weight decay should leave alone as it does scales.

  Attributes:
    features: number of outputs.
    kernel_size: shape of the kernel; and as in `flax.linen.Conv`, where their defaults are too,
      strides, padding, input_dilation, kernel_dilation, feature_group_count, use_bias,
      dtype (of the result; the standardization is in float32 at least), param_dtype, precision,
      kernel_init, bias_init, promote_dtype, conv_general_dilated, conv_general_dilated_cls.
    mask: must be None: what a masked weight means for the mean of the others, no paper says.
    gain_init: initializer of gain.
    epsilon: added to fan_in · var.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.WSConv(4, (3, 3))
  >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
  >>> jax.tree.map(jnp.shape, variables["params"])
  {'bias': (4,), 'gain': (4,), 'kernel': (3, 3, 2, 4)}
  >>> bool(jnp.allclose(y[:, 1:-1, 1:-1], 0, atol=1e-6))  # a constant image has no signal
  True
  """

  gain_init: Initializer = nn.initializers.ones
  epsilon: float = 1e-5

  @nn.nowrap
  def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
    # Flax's layer asks for its parameters here, and is given the standardized kernel. With
    # `nn.map_variables` one call would be two to whoever captures or tabulates calls.
    value = super().param(name, *args, **kwargs)
    if name != "kernel":
      return value
    if self.mask is not None:
      raise ValueError(
        "mask is given, but the weights that it leaves out would still count in the mean and "
        "variance of the others: leave mask out, or use flax.linen.Conv."
      )
    return _standardized(self, value)


class WSDense(nn.Dense):
  r"""A dense layer with scaled weight standardization (Brock et al. 2021): `flax.linen.Dense` with

      kernel' = (kernel - mean) / sqrt(fan_in · var + epsilon) · gain

  in place of its kernel, per output; see `jaxbn.linen.WSConv`.

  Attributes:
    features: number of outputs; and as in `flax.linen.Dense`, where their defaults are too,
      use_bias, dtype (of the result; the standardization is in float32 at least), param_dtype,
      precision, kernel_init, bias_init, promote_dtype, dot_general, dot_general_cls.
    gain_init: initializer of gain.
    epsilon: added to fan_in · var.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.WSDense(4)
  >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3)))
  >>> jax.tree.map(jnp.shape, variables["params"])
  {'bias': (4,), 'gain': (4,), 'kernel': (3, 4)}
  """

  gain_init: Initializer = nn.initializers.ones
  epsilon: float = 1e-5

  @nn.nowrap
  def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
    value = super().param(name, *args, **kwargs)
    return _standardized(self, value) if name == "kernel" else value


def _standardized(layer: Any, kernel: jax.Array) -> jax.Array:
  gain = nn.Module.param(layer, "gain", layer.gain_init, (layer.features,), layer.param_dtype)
  return scaled_weight_standardization(kernel, gain, epsilon=layer.epsilon)


class SkipInit(nn.Module):
  """`x * scale` with one learned number, at first 0: a residual branch that starts as nothing.

  Source: De & Smith 2020, "Batch normalization biases residual blocks towards the identity function
  in deep networks".

  Attributes:
    scale_init: initializer of scale.
    dtype: of the result (default: what x and scale promote to).
    param_dtype: of scale.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> y, variables = jaxbn.linen.SkipInit().init_with_output(jax.random.key(0), jnp.ones(3))
  >>> print(y, variables["params"]["scale"])
  [0. 0. 0.] 0.0
  """

  scale_init: Initializer = nn.initializers.zeros
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Any) -> jax.Array:
    """Scales x.

    Args:
      x: floating-point or complex array of any rank.

    Returns:
      An array of x's shape.
    """
    x = _checks.inexact(x)
    scale = self.param("scale", self.scale_init, (), self.param_dtype)
    x, scale = nn.dtypes.promote_dtype(x, scale, dtype=self.dtype)
    return x * scale
