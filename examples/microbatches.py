"""Gradient accumulation: a device's share of the batch, cut into microbatches within the step.

The optimizer sees the gradient of the whole batch either way. What differs is whose statistics
a batch normalization uses (`config.microbatch_statistics`):

  each    Each microbatch is normalized by its own, synchronized over the devices, one after the
          other: memory for one. The batch that is normalized is K times smaller. The running
          statistics are updated once a step, with the mean of the microbatches' statistics.
  merged  All microbatches share the statistics of the whole batch: the result is that of a step
          without accumulation, to rounding. Every layer needs all microbatches before it can give
          any, so they run in lockstep, and memory is that of the whole batch: this saves nothing.
          It is there to compare with, to tell what smaller normalized batches do to a training
          from what accumulating does.

With "each", microbatch k has the examples k, K + k, 2K + k, ... of the share, and so, wherever K
divides the shares, of the global batch: the result does not depend on the number of devices. Their
gradients are added up on each device and once, at the end, over the devices; but under jit, where
the compiler decides, over the devices in each microbatch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AXIS = "microbatch"

# (params, batch) -> (its part of the loss, what else is wanted); see `steps.train_step`.
Loss = Callable[[Any, Any], tuple[jax.Array, Any]]


def create(count: int, statistics: str) -> Callable[[Loss, Any, Any], tuple[Any, Any]]:
  """How `count` microbatches are worked off, as `accumulate` of `steps.train_step`.

  Each is a function of (loss, params, batch) that gives the gradient of the sum of the losses of
  the microbatches, and the rest of what `loss` gave, with a leading axis of microbatches.
  """
  if count == 1:
    return whole
  return functools.partial({"each": each, "merged": merged}[statistics], count)


def axes(axis_name: str | None, count: int, statistics: str) -> Any:
  """The axes over which a network shares its statistics, for the devices' `axis_name`."""
  if count == 1 or statistics == "each":
    return axis_name
  return AXIS if axis_name is None else (axis_name, AXIS)


def whole(loss: Loss, params: Any, batch: Any) -> tuple[Any, Any]:
  """One microbatch: all of it."""
  grads, rest = jax.grad(loss, has_aux=True)(params, batch)
  return grads, jax.tree.map(lambda x: x[None], rest)


def each(count: int, loss: Loss, params: Any, batch: Any) -> tuple[Any, Any]:
  """One after the other: of each, only the gradient is kept."""

  def add(grads: Any, part: Any) -> tuple[Any, Any]:
    more, rest = jax.grad(loss, has_aux=True)(params, part)
    return jax.tree.map(jnp.add, grads, more), rest

  # Dealt like cards, so that a part has its share of every device's examples under jit as well.
  parts = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0), batch
  )
  return lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)


def merged(count: int, loss: Loss, params: Any, batch: Any) -> tuple[Any, Any]:
  """In lockstep, so that layers can share statistics over `AXIS`."""
  # Which examples a part has makes no difference, and in their order nothing moves under jit.
  parts = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), batch)

  def total(params: Any) -> tuple[jax.Array, Any]:
    losses, rest = jax.vmap(loss, in_axes=(None, 0), axis_name=AXIS)(params, parts)
    return losses.sum(), rest

  return jax.grad(total, has_aux=True)(params)
