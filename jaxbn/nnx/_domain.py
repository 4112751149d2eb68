"""The layer for Flax NNX with statistics for each domain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer

from jaxbn import _checks
from jaxbn._names import by_our_names
from jaxbn._types import RunningStats
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._common import of_shape
from jaxbn.variants.domain import of_layer


class DomainBatchNorm(BatchNorm):
  r"""Batch normalization in which each example belongs to a domain with statistics of its own.

      y_i = (x_i - mean[d]) / sqrt(var[d] + epsilon) * scale + bias,   d = domains_i

  See `jaxbn.variants.domain`: domain-specific batch normalization and AdvProp's auxiliary one
  (with per_domain_parameters), split batch norm. The statistics `mean` and `var` are
  (domains, channels); a domain that a batch lacks keeps its own as they were.

  Args:
    num_features: number of channels (with several axes, the product).
    num_domains: number of domains.
    per_domain_parameters: whether scale and bias are (num_domains, num_features), or
      (num_features,) for all.
    scale_init: initializer of scale, called with its shape.
    bias_init: initializer of bias, likewise.
    rngs: rng key.
    options: as in `BatchNorm`, except `choose` and `virtual_batch_size`.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.DomainBatchNorm(3, num_domains=2, rngs=nnx.Rngs(0))
  >>> layer(jnp.arange(12.0).reshape(4, 3), jnp.array([0, 0, 1, 1])).shape, layer.mean.shape
  ((4, 3), (2, 3))
  """

  def __init__(
    self,
    num_features: int,
    num_domains: int,
    *,
    per_domain_parameters: bool = False,
    scale_init: Initializer = nnx.initializers.ones,
    bias_init: Initializer = nnx.initializers.zeros,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    def table(initializer: Initializer) -> Initializer:
      if not per_domain_parameters:
        return initializer
      return lambda key, shape, *args: initializer(key, (num_domains, *shape), *args)

    scale_init, bias_init = table(scale_init), table(bias_init)
    super().__init__(num_features, scale_init=scale_init, bias_init=bias_init, rngs=rngs, **options)
    for name in RunningStats._fields:
      if (one := getattr(self, name, None)) is not None:
        setattr(self, name, nnx.BatchStat(jnp.tile(one[...], (num_domains, 1))))
    self.num_domains = num_domains
    self.per_domain_parameters = per_domain_parameters

  @by_our_names
  def __call__(  # type: ignore[override]
    self,
    x: Any,
    domains: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    residual: jax.Array | None = None,
  ) -> jax.Array:
    """Normalizes x.

    Args:
      x: real or complex array, with its examples along the first axis that is not a channel's.
      domains: each example's domain, integers of shape (N,), or one for all.
      use_running_average, mask, weights, residual: as in `BatchNorm`.

    Returns:
      y, of x's shape.
    """
    given = {"mask": mask, "weights": weights, "residual": residual}
    return self._normalize(
      _checks.inexact(x),
      self.scale,
      self.bias,
      use_running_average,
      domains=domains,
      function=of_layer,
      **given,
    )

  def _promoted(
    self, x: jax.Array, scale: Any, bias: Any, use_running_average: bool
  ) -> tuple[jax.Array, Any, Any, RunningStats, Any]:
    x, scale, bias, state, dtype = super()._promoted(x, scale, bias, use_running_average)
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)

    def by_axes(value: Any) -> Any:
      return None if value is None else of_shape(value, (self.num_domains, *shape))

    if self.per_domain_parameters:
      scale, bias = map(by_axes, (scale, bias))
    return x, scale, bias, RunningStats(*map(by_axes, state)), dtype
