"""Batch renormalization for Flax Linen: BatchNorm with two limits, and where they depend on it a
count of steps.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import module

from jaxbn import _checks
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._common import called
from jaxbn.variants.renorm import Limit, choose_of, is_scheduled


class BatchRenorm(BatchNorm):
  r"""Batch renormalization (Ioffe 2017): `jaxbn.linen.BatchNorm`, corrected in training.

      y = ((x - mean_B) / sigma_B * r + d) * scale + bias
      r = clip(sigma_B / sigma, 1 / r_max, r_max)
      d = clip((mean_B - mean) / sigma, -d_max, d_max)

  as `jaxbn.variants.renorm.batch_renorm` says, which also has what the paper recommends. Parameters
  and statistics are those of BatchNorm, and so are the names of layers that are given none
  (`BatchNorm_0`), so that a checkpoint of a network with one loads into it with the other. With a
  schedule there is one leaf more, `step` in `batch_stats`: how many training calls there were,
  float32 as the others, so
  that it stays what it is where all are averaged over devices; a schedule is given an int32.
  Evaluation and initialization do not count.

  Attributes:
    r_max: number from 1 on, or a schedule: a function of the step that gives one, such as optax's.
      What a schedule gives is checked only where the call is not traced.
    d_max: number from 0 on, or a schedule.

  The other attributes are those of `jaxbn.linen.BatchNorm`: use_running_average, axis, momentum,
  epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init, axis_name,
  axis_index_groups, use_fast_variance, force_float32_reductions, debias, unbiased, skip_nonfinite,
  detach_stats, masked_value, activation,
  virtual_batch_size; choose is its own.

  The paper's schedules, batch normalization for 5,000 steps, then r_max from 1 to 3 by step 40,000
  and d_max from 0 to 5 by step 25,000:

  >>> import jax, jax.numpy as jnp, jaxbn.linen, optax
  >>> layer = jaxbn.linen.BatchRenorm(
  ...   use_running_average=False,
  ...   r_max=optax.linear_schedule(1.0, 3.0, 35_000, transition_begin=5_000),
  ...   d_max=optax.linear_schedule(0.0, 5.0, 20_000, transition_begin=5_000),
  ... )
  >>> x = jnp.arange(12.0).reshape(4, 3)
  >>> variables = layer.init(jax.random.key(0), x)
  >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
  >>> updates["batch_stats"]["step"]
  Array(1., dtype=float32)
  """

  r_max: Limit = 3.0
  d_max: Limit = 5.0

  def __post_init__(self) -> None:
    # Flax names a layer after its class, and counts each name by itself: a layer without a name has
    # the one that a BatchNorm in its place had, under which the variables of the network are.
    unspecified = self.parent is module._unspecified_parent
    parent = module._context.module_stack[-1] if unspecified else self.parent
    if self.name is None and isinstance(parent, nn.Module) and not parent._state.in_setup:
      prefix = type(self).__name__.replace("BatchRenorm", "BatchNorm")
      number = parent._state.autoname_cursor.get(prefix, 0)
      parent._state.autoname_cursor[prefix] = number + 1
      self.name = f"{prefix}_{number}"
    super().__post_init__()

  @nn.nowrap
  def _normalize(
    self,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    use_running_average: bool | None,
    **given: Any,
  ) -> jax.Array:
    evaluating = self.use_running_average if use_running_average is None else use_running_average
    if evaluating is not None:
      _checks.static_bool("use_running_average", evaluating)
    initializing = self.is_initializing()
    counting = is_scheduled(self.r_max, self.d_max) and (initializing or not evaluating)
    step = self._step() if counting else None
    if not evaluating:
      given["choose"] = choose_of(self, None if step is None else step.value)
    y = super()._normalize(x, scale, bias, use_running_average, **given)
    if step is not None and not initializing:
      step.value += 1
    return y

  @nn.nowrap
  def _step(self) -> nn.Variable:
    if self.has_variable("batch_stats", "mean") and not self.has_variable("batch_stats", "step"):
      raise ValueError(
        f"batch_stats of {called(self)} has a mean but no step, which a "
        "schedule of r_max or d_max needs: it was saved without one. Add the leaf, for instance "
        "step=jnp.zeros((), jnp.float32), or give numbers."
      )
    return self.variable("batch_stats", "step", lambda: jnp.zeros((), jnp.float32))
