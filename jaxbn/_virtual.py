"""Virtual batches: the global batch in groups of a fixed size, each with statistics of its own.

The examples lie along the first axis that is not a channel's; on several devices along axis_name
they follow each other in the devices' order. Groups are consecutive. Where one array holds several,
an axis of groups is split off that of the examples and taken for one more channel axis: all other
steps are the same with it. Under jit with sharded arrays XLA's partitioner carries the sharding
through the reshape, into both axes where devices share a group. Where a group is spread over the
devices of an axis_name, neighbours share as in `sync`. Many small groups in a large batch: Hoffer,
Hubara & Soudry 2017, "Train longer, generalize better" (ghost batch normalization).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxbn._counts import divisor
from jaxbn._dtypes import promoting
from jaxbn._meshes import by_partitioner
from jaxbn._share import sum_over_devices
from jaxbn._track import unbiased_variance
from jaxbn._types import Axes, Groups, Inputs, Moments, Plan

Step: TypeAlias = Callable[[Plan, Inputs, Any], tuple[jax.Array, Moments]]


def in_groups(
  step: Step, unbiased: bool, plan: Plan, inputs: Inputs, state: Any
) -> tuple[jax.Array, Moments]:
  """A step group by group: y, and the mean over the groups of their moments."""
  assert plan.groups is not None
  groups, sharding = plan.groups, jax.typeof(inputs.x).sharding
  within, position = _within(groups, plan, inputs)

  def split_and_join(inputs: Inputs, state: Any) -> tuple[jax.Array, Moments]:
    shape = inputs.x.shape
    if position is not None:
      inputs = _split(groups, position, inputs)
      state = jax.tree.map(lambda v: jnp.expand_dims(v, position), state)
    y, batch = step(within, inputs, state)
    return y.reshape(shape), _mean(batch, unbiased, position, groups.everyone)

  # No type says that two axes of an array share one of the mesh: this is for the partitioner.
  of_batch: Any = jax.P(*(sharding.spec[a] for a in plan.axes.features))
  out = sharding.spec, Moments(of_batch, of_batch, of_batch)
  placed = by_partitioner(split_and_join, inputs.x, out)
  if sharding.mesh.explicit_axes and sharding.mesh.manual_axes:
    # Of what is typed in this region, JAX can keep nothing for a shard_map's derivative.
    placed = jax.checkpoint(placed)
  return placed(inputs, state)


def _within(groups: Groups, plan: Plan, inputs: Inputs) -> tuple[Plan, int | None]:
  """The plan of one group, or of several beside each other, along that channels' axis."""
  axes, position = plan.axes, None
  if groups.number != 1:
    axes = _split_axes(groups, axes)
    position = axes.features.index(groups.axis)
  activation = _as_given(plan.activation, inputs)  # a new one, which no other layer has
  plan = plan._replace(
    axes=axes,
    activation=activation,
    activation_lasts=activation is None,
    axis_name=groups.axis_name,
    axis_index_groups=groups.axis_index_groups,
  )
  return plan, position


def _as_given(activation: Any, inputs: Inputs) -> Callable[..., jax.Array] | None:
  """The activation of what has x's own shape and type: it may hold arrays that go with these."""
  if activation is None:
    return None
  arguments = (inputs.wide_x, *inputs.constants)
  shape, mesh = inputs.x.shape, jax.typeof(inputs.x).sharding.mesh
  if mesh.explicit_axes:
    activation = jax.sharding.explicit_axes(
      activation,
      axes=mesh.explicit_axes,
      in_sharding=tuple(jax.typeof(a).sharding for a in arguments),
    )
  return lambda x, *constants: activation(x.reshape(shape), *constants).reshape(x.shape)


def _split_axes(groups: Groups, axes: Axes) -> Axes:
  """The same after the axis of groups, a channels' axis, came before that of the examples."""
  features = (a + (a > groups.axis) for a in axes.features)
  reduced = tuple(a + (a >= groups.axis) for a in axes.reduced)
  return Axes(tuple(sorted((*features, groups.axis))), reduced)


def _split(groups: Groups, position: int, inputs: Inputs) -> Inputs:
  """The arrays that are aligned with x, split; and the parameters, the same for all groups."""
  aligned = {name: getattr(inputs, name) for name in ("x", "wide_x", "valid", "weight", "residual")}
  split: dict[str, Any] = {name: _split_examples(groups, v) for name, v in aligned.items()}
  for name in ("scale", "bias"):
    value = getattr(inputs, name)
    if value is not None and value.ndim == inputs.x.ndim:
      split[name] = _split_examples(groups, value)
    else:
      split[name] = None if value is None else jnp.expand_dims(value, position)
  return inputs._replace(**split)


def _split_examples(groups: Groups, x: jax.Array | None) -> jax.Array | None:
  if x is None:
    return None
  # One example: what is the same for all.
  parts = (1, 1) if x.shape[groups.axis] == 1 else (groups.number, groups.size)
  return x.reshape(*x.shape[: groups.axis], *parts, *x.shape[groups.axis + 1 :])


@promoting
def _mean(batch: Moments, unbiased: bool, position: int | None, axis_name: Any) -> Moments:
  """The plain mean over all groups that are not empty; the count is 0 where all are."""
  var = unbiased_variance(batch) if unbiased else batch.var
  there = jnp.broadcast_to(jnp.asarray(batch.count) > 0, var.shape)
  sums = [there.astype(var.dtype), batch.mean, var]  # the moments of nothing are 0
  if position is not None:
    sums = [jnp.sum(v, position) for v in sums]
  if axis_name is not None:
    # Devices that share a group add it as often as there are of them: all alike.
    sums = sum_over_devices(sums, axis_name, None)
  number, *sums = sums
  return Moments(number, *(v / divisor(number, number.dtype) for v in sums))
