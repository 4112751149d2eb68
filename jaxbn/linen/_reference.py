"""Reference batch normalization for Flax Linen: a layer that remembers a reference batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from jaxbn import Moments, _checks
from jaxbn._names import ByOurNames
from jaxbn.linen._common import called, first_activation, mended, pure
from jaxbn.variants.reference import of_layer


class ReferenceBatchNorm(ByOurNames, nn.Module):
  r"""Normalizes each example by the statistics of a reference batch and of itself.

  "Virtual batch normalization" of Salimans et al. 2016, section 3.5: see
  `jaxbn.variants.reference`. (`BatchNorm(virtual_batch_size=)` cuts a batch in groups instead.)

  Apply the network twice with the same parameters: to the reference batch with is_reference=True,
  which normalizes it by its own statistics and writes their moments to the collection `reference`;
  then to the data with that collection. There is no difference between training and evaluation.
  Gradients flow through the collection; `jax.lax.stop_gradient` it where they shall not.
  Initialization takes any batch for the reference, and creates parameters only.

  Attributes:
    axis, epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
      use_fast_variance, masked_value, activation: as in `BatchNorm`.
    axis_name, axis_index_groups: as in `BatchNorm`, where members hold parts of the reference
      batch; None where each has all of it.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.ReferenceBatchNorm()
  >>> reference_batch, x = jnp.array([[0.0], [2.0], [4.0]]), jnp.array([[2.0], [6.0]])
  >>> params = layer.init(jax.random.key(0), x)
  >>> _, reference = layer.apply(params, reference_batch, is_reference=True, mutable=["reference"])
  >>> print(layer.apply(params | reference, x).ravel().round(3))
  [0.    1.342]
  """

  axis: int | Sequence[int] = -1
  epsilon: float = 1e-5
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: Initializer = nn.initializers.zeros
  scale_init: Initializer = nn.initializers.ones
  axis_name: Any = None
  axis_index_groups: Any = None
  use_fast_variance: bool = True
  masked_value: float | None = None
  activation: Callable[..., Any] | None = None

  @nn.compact
  @mended
  def __call__(
    self,
    x: Any,
    is_reference: bool = False,
    *,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    residual: jax.Array | None = None,
  ) -> jax.Array:
    """Normalizes x.

    Args:
      x: real or complex array, with its examples along the first axis that is not a channel's.
      is_reference: whether x is the reference batch, which is remembered.
      mask: binary, broadcasts against x: which elements exist.
      weights: real, not negative, broadcasts against x: how often each element counts.
      residual: of x's shape, added before the activation, or None.

    Returns:
      y, of x's shape.
    """
    x = _checks.inexact(x)
    is_reference = _checks.static_bool("is_reference", is_reference)
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)
    scale, bias = (
      self.param(name, initializer, shape, self.param_dtype) if wanted else None
      for name, initializer, wanted in (
        ("scale", self.scale_init, self.use_scale),
        ("bias", self.bias_init, self.use_bias),
      )
    )
    given: dict[str, Any] = {"residual": residual, "dtype": self.dtype, "activation": pure(self)}
    if self.is_initializing():
      y, _ = of_layer(self, x, scale, bias, None, mask, weights, **given)
      return first_activation(self, y, mask, weights)
    if is_reference:
      if not self.is_mutable_collection("reference"):
        raise ValueError(
          f"{called(self)} remembers its reference batch, but the collection "
          "reference is not mutable: pass mutable=['reference'] to apply, which then returns it."
        )
      given |= {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
      y, reference = of_layer(self, x, scale, bias, None, mask, weights, **given)
      for name, value in reference._asdict().items():
        self.put_variable("reference", name, value)
      return y
    return of_layer(self, x, scale, bias, self._reference(), mask, weights, **given)[0]

  @nn.nowrap
  def _reference(self) -> Moments:
    if not self.has_variable("reference", "mean"):
      raise ValueError(
        f"{called(self)} has no reference batch: apply the network to it "
        "first, with is_reference=True and mutable=['reference'], and pass the collection that "
        "this returns along with the parameters."
      )
    return Moments(*(self.get_variable("reference", name) for name in Moments._fields))
