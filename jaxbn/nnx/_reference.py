"""Reference batch normalization for Flax NNX: a layer that remembers a reference batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer

from jaxbn import Moments, _checks
from jaxbn._names import ByOurNames, by_our_names
from jaxbn.nnx._common import as_function, of_shape, parameter, put, tuples
from jaxbn.variants.reference import of_layer


class ReferenceBatchNorm(nnx.Module, ByOurNames):
  r"""Normalizes each example by the statistics of a reference batch and of itself.

  "Virtual batch normalization" of Salimans et al. 2016, section 3.5: see
  `jaxbn.variants.reference`. (`BatchNorm(virtual_batch_size=)` cuts a batch in groups instead.)

  At every step call the network with the reference batch and is_reference=True, which normalizes it
  by its own statistics and keeps their moments in `mean`, `var` and `count` (BatchStat); then with
  the data. There is no difference between training and evaluation. Inside one `nnx.grad` gradients
  flow through the reference. Before the first reference batch there are no results: NaN under jit.

  Args:
    num_features: number of channels (with several axes, the product).
    axis, epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
      use_fast_variance, masked_value, activation, rngs: as in `BatchNorm`.
    axis_name, axis_index_groups: as in `BatchNorm`, where members hold parts of the reference
      batch; None where each has all of it.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.ReferenceBatchNorm(1, rngs=nnx.Rngs(0))
  >>> _ = layer(jnp.array([[0.0], [2.0], [4.0]]), is_reference=True)
  >>> print(layer(jnp.array([[2.0], [6.0]])).ravel().round(3))
  [0.    1.342]
  """

  def __init__(
    self,
    num_features: int,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = nnx.initializers.zeros,
    scale_init: Initializer = nnx.initializers.ones,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
    masked_value: float | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    rngs: nnx.Rngs,
  ):
    made = (num_features,), param_dtype, rngs
    self.scale = parameter(use_scale, scale_init, *made)
    self.bias = parameter(use_bias, bias_init, *made)
    # NaN, not 0: without a reference batch no result shall look like one.
    self.mean = nnx.BatchStat(jnp.full((num_features,), jnp.nan))
    self.var = nnx.BatchStat(jnp.full((num_features,), jnp.nan))
    self.count = nnx.BatchStat(jnp.ones((num_features,)))
    self.num_features = num_features
    self.axis = tuples(axis)
    self.epsilon = epsilon
    self.dtype = dtype
    self.axis_name = axis_name
    self.axis_index_groups = tuples(axis_index_groups)
    self.use_fast_variance = use_fast_variance
    self.masked_value = masked_value
    self.activation = activation

  @by_our_names
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

    def value(variable: Any) -> Any:
      return None if variable is None else of_shape(variable, shape)

    scale, bias = value(self.scale), value(self.bias)
    activation = as_function(self.activation, x)
    given: dict[str, Any] = {"residual": residual, "dtype": self.dtype, "activation": activation}
    if not is_reference:
      reference = Moments(value(self.count), value(self.mean), value(self.var))
      _require_reference(reference)
      return of_layer(self, x, scale, bias, reference, mask, weights, **given)[0]
    given |= {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
    y, reference = of_layer(self, x, scale, bias, None, mask, weights, **given)
    for name, moment in reference._asdict().items():
      variable = getattr(self, name)
      put(self, variable, moment.reshape(variable.shape))
    return y


def _require_reference(reference: Moments) -> None:
  if _checks.concrete(reference.mean) and np.all(np.isnan(np.asarray(reference.mean))):
    raise ValueError(
      "the layer has no reference batch, or one that is NaN throughout: call the network with it "
      "first, with is_reference=True."
    )
