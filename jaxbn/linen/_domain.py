"""The layer for Flax Linen with statistics for each domain."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxbn import _checks
from jaxbn._types import RunningStats
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._common import mended
from jaxbn.variants.domain import of_layer


class DomainBatchNorm(BatchNorm, kw_only=True):
  r"""Batch normalization in which each example belongs to a domain with statistics of its own.

      y_i = (x_i - mean[d]) / sqrt(var[d] + epsilon) * scale + bias,   d = domains_i

  See `jaxbn.variants.domain`: domain-specific batch normalization and AdvProp's auxiliary one
  (with per_domain_parameters), split batch norm. In `batch_stats` mean and var are
  (domains, channels); a domain that a batch lacks keeps its own as they were.

  Attributes:
    num_domains: number of domains; to be named.
    per_domain_parameters: whether scale and bias are (domains, channels), or (channels,) for all.
    use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale,
      bias_init, scale_init, axis_name, axis_index_groups, use_fast_variance,
      force_float32_reductions, debias, unbiased, skip_nonfinite, detach_stats, masked_value,
      activation: as in `BatchNorm`.
    choose, virtual_batch_size: not here.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.DomainBatchNorm(num_domains=2, use_running_average=False)
  >>> x, domains = jnp.arange(12.0).reshape(4, 3), jnp.array([0, 0, 1, 1])
  >>> variables = layer.init(jax.random.key(0), x, domains)
  >>> jax.tree.map(jnp.shape, variables)
  {'batch_stats': {'mean': (2, 3), 'var': (2, 3)}, 'params': {'bias': (3,), 'scale': (3,)}}
  """

  num_domains: int
  per_domain_parameters: bool = False

  @nn.compact
  @mended
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
    x = _checks.inexact(x)
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)
    if self.per_domain_parameters:
      shape = (self.num_domains, *shape)
    scale = self._parameter("scale", self.scale_init, shape) if self.use_scale else None
    bias = self._parameter("bias", self.bias_init, shape) if self.use_bias else None
    given = {"mask": mask, "weights": weights, "residual": residual}
    return self._normalize(
      x, scale, bias, use_running_average, domains=domains, function=of_layer, **given
    )

  @nn.nowrap
  def _running_stats(self, shape: tuple[int, ...], evaluating: bool) -> RunningStats:
    return super()._running_stats((self.num_domains, *shape), evaluating)
