"""Batch renormalization for Flax NNX: BatchNorm with two limits, and a count of steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn import _checks
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._common import write
from jaxbn.variants.renorm import Limit, choose_of, is_scheduled


class BatchRenorm(BatchNorm):
  r"""Batch renormalization (Ioffe 2017): `jaxbn.nnx.BatchNorm`, corrected in training.

      y = ((x - mean_B) / sigma_B * r + d) * scale + bias
      r = clip(sigma_B / sigma, 1 / r_max, r_max)
      d = clip((mean_B - mean) / sigma, -d_max, d_max)

  as `jaxbn.variants.renorm.batch_renorm` says, which also has what the paper recommends. Outputs
  are bit-equal to `jaxbn.linen.BatchRenorm`'s, where the paper's schedules are written out. With a
  schedule there is one variable more, the BatchStat `step`: how many training calls there were,
  float32; a schedule is given an int32.

  Args:
    num_features: number of channels (with several axes, the product).
    r_max: number from 1 on, or a schedule: a function of the step that gives one, such as optax's.
      What a schedule gives is checked only where the call is not traced.
    d_max: number from 0 on, or a schedule.
    options: those of `jaxbn.nnx.BatchNorm`, rngs among them.

  >>> import jax.numpy as jnp, jaxbn.nnx, optax
  >>> from flax import nnx
  >>> growing = optax.linear_schedule(0.0, 5.0, 20_000, transition_begin=5_000)
  >>> layer = jaxbn.nnx.BatchRenorm(3, r_max=2.0, d_max=growing, rngs=nnx.Rngs(0))
  >>> y = layer(jnp.arange(12.0).reshape(4, 3))
  >>> layer.step[...]
  Array(1., dtype=float32)
  """

  def __init__(
    self, num_features: int, *, r_max: Limit = 3.0, d_max: Limit = 5.0, **options: Any
  ) -> None:
    super().__init__(num_features, **options)
    self.r_max = r_max
    self.d_max = d_max
    if is_scheduled(r_max, d_max):
      self.step = nnx.BatchStat(jnp.zeros((), jnp.float32))

  def _normalize(
    self, x: jax.Array, scale: Any, bias: Any, use_running_average: bool | None, **given: Any
  ) -> jax.Array:
    evaluating = self.use_running_average if use_running_average is None else use_running_average
    if evaluating is not None:
      _checks.static_bool("use_running_average", evaluating)
    if evaluating:
      return super()._normalize(x, scale, bias, use_running_average, **given)
    step = self.step[...] if is_scheduled(self.r_max, self.d_max) else None
    given["choose"] = choose_of(self, step)
    y = super()._normalize(x, scale, bias, use_running_average, **given)
    if step is not None:
      write(self, self.step, step + 1)
    return y
