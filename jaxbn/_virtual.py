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

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._moments import How, Moments, divisor, is_symbolic
from jaxbn._rule import Form, Given, promoting
from jaxbn._running import unbiased_variance
from jaxbn._share import sum_over_devices


class Groups(NamedTuple):
  """How x is grouped, where there is more than one group."""

  axis: int  # of the examples
  size: int  # examples of x in one group
  number: int  # of groups that x holds, or holds a part of
  sharing: tuple[Any, Any]  # axis_name and axis_index_groups of the devices that share a group
  everyone: Any  # axis_name of all devices


def require_size(virtual_batch_size: Any, axis_index_groups: Any) -> None:
  """Refuses what is no size of a virtual batch, and two ways at once to say who shares."""
  if virtual_batch_size is None:
    return
  given = f"virtual_batch_size={virtual_batch_size!r}"
  allowed = "pass a number of examples, 'device' for those of each device, or None for all."
  if isinstance(virtual_batch_size, str):
    if virtual_batch_size != "device":
      raise ValueError(f"{given} is no size: {allowed}")
  else:
    try:
      if isinstance(virtual_batch_size, bool) or not _checks.concrete(virtual_batch_size):
        raise TypeError
      size = operator.index(virtual_batch_size)
    except TypeError:
      raise TypeError(f"{given} is not a Python int: {allowed}") from None
    if size < 1:
      raise ValueError(f"{given}: a group holds at least one example: {allowed}")
  if axis_index_groups is not None:
    raise ValueError(
      f"{given} with axis_index_groups={axis_index_groups!r}: both say which examples share their "
      "statistics: leave one of them out (a virtual batch makes its own groups of devices)."
    )


def groups(virtual_batch_size: Any, x: jax.Array, how: How) -> Groups | None:
  """The groups of x, of a size that `require_size` has seen; None if one holds everything."""
  if virtual_batch_size is None:
    return None
  if virtual_batch_size == "device" and how.axis_name is None:
    raise ValueError(
      "virtual_batch_size='device' without axis_name: x is then one array (under jit also where it "
      "is sharded), and which device holds which part is not known here: pass the number of "
      "examples that a device holds, or, under pmap, shard_map or vmap, axis_name."
    )
  if not how.axes.reduced:
    raise ValueError(
      f"virtual_batch_size={virtual_batch_size!r}, but x of shape {x.shape} has channels on all "
      "its axes, and no axis of examples to group."
    )
  axis = how.axes.reduced[0]
  share, devices = x.shape[axis], 1 if how.axis_name is None else _checks.axis_size(how.axis_name)
  size = share if virtual_batch_size == "device" else operator.index(virtual_batch_size)
  if share % size and (size % share or devices % (size // share)):
    held = f"x holds {share} examples, along axis {axis}"
    if how.axis_name is not None:
      held += f", on each of the {devices} devices of axis_name={how.axis_name!r}"
      held += f", a global batch of {share * devices}"
    if is_symbolic(share):
      raise ValueError(
        f"virtual_batch_size={size}: {held}, of which it cannot be seen that groups of {size} fit: "
        f"export with a size that shows it, such as jax.export.symbolic_shape('{size}*b')."
      )
    raise ValueError(
      f"virtual_batch_size={size} does not fit: {held}. All groups have the same size, and each is "
      "part of a device's examples or all those of some devices: pass one of "
      f"{', '.join(map(str, _fitting(share, devices)))}."
    )
  if size == share * devices:
    return None
  if size <= share:
    return Groups(axis, size, share // size, (None, None), how.axis_name)
  n = size // share
  members = tuple(tuple(range(first, first + n)) for first in range(0, devices, n))
  return Groups(axis, share, 1, (how.axis_name, members), how.axis_name)


def _fitting(share: int, devices: int) -> list[int]:
  """All sizes that a group can have: what divides a share, and shares of what divides devices."""
  within = [n for n in range(1, share + 1) if share % n == 0]
  across = [share * n for n in range(2, devices + 1) if devices % n == 0]
  return within + across


def by_group(
  groups: Groups,
  step: Callable[..., tuple[jax.Array, Moments]],
  unbiased: bool,
  form: Form,
  how: How,
  given: Given,
  weight: Any,
  state: Any,
) -> tuple[jax.Array, Moments]:
  """y, normalized group by group, and the mean over the groups of their moments."""
  shape, position, axes = given.x.shape, None, form.axes
  if groups.number != 1:
    axes = _split_axes(groups, form.axes)
    position = axes.features.index(groups.axis)
  sharding = jax.typeof(given.x).sharding
  activation = _as_given(form.activation, given)  # a new one, which no other layer has
  within = form._replace(axes=axes, activation=activation, traced_once=activation is None)
  axis_name, members = groups.sharing
  how = how._replace(axes=axes, axis_name=axis_name, axis_index_groups=members)

  def grouped(given: Given, weight: Any, state: Any) -> tuple[jax.Array, Moments]:
    if position is not None:
      given, weight = _split(groups, position, given), _split_examples(groups, weight)
      state = jax.tree.map(lambda v: jnp.expand_dims(v, position), state)
    y, batch = step(within, how, given, weight, state)
    return y.reshape(shape), _mean(batch, unbiased, position, groups.everyone)

  if sharding.mesh.explicit_axes:
    # No type says that two axes of an array share one of the mesh: this is for the partitioner.
    per_channel = jax.P(*(sharding.spec[a] for a in form.axes.features))
    of_batch = jax.NamedSharding(sharding.mesh, per_channel)
    grouped = jax.sharding.auto_axes(
      grouped,
      axes=sharding.mesh.explicit_axes,
      out_sharding=(sharding, Moments(of_batch, of_batch, of_batch)),
    )
    if sharding.mesh.manual_axes:
      # Of what is typed in this region, JAX can keep nothing for a shard_map's derivative.
      grouped = jax.checkpoint(grouped)
  return grouped(given, weight, state)


def _as_given(activation: Any, given: Given) -> Callable[..., jax.Array] | None:
  """The activation of what has x's own shape and type: it may hold arrays that go with these."""
  if activation is None:
    return None
  arguments = (given.wide, *given.constants)
  shape, mesh = given.x.shape, jax.typeof(given.x).sharding.mesh
  if mesh.explicit_axes:
    activation = jax.sharding.explicit_axes(
      activation,
      axes=mesh.explicit_axes,
      in_sharding=tuple(jax.typeof(a).sharding for a in arguments),
    )
  return lambda x, *constants: activation(x.reshape(shape), *constants).reshape(x.shape)


def _split_axes(groups: Groups, axes: _checks.Axes) -> _checks.Axes:
  """The same after the axis of groups, a channels' axis, came before that of the examples."""
  features = (a + (a > groups.axis) for a in axes.features)
  reduced = tuple(a + (a >= groups.axis) for a in axes.reduced)
  return _checks.Axes(tuple(sorted((*features, groups.axis))), reduced)


def _split(groups: Groups, position: int, given: Given) -> Given:
  """The arrays that are aligned with x, split; and the parameters, the same for all groups."""
  aligned = {name: getattr(given, name) for name in ("x", "wide", "residual", "valid")}
  split: dict[str, Any] = {name: _split_examples(groups, v) for name, v in aligned.items()}
  for name in ("scale", "bias"):
    value = getattr(given, name)
    if value is not None and value.ndim == given.x.ndim:
      split[name] = _split_examples(groups, value)
    else:
      split[name] = None if value is None else jnp.expand_dims(value, position)
  return given._replace(**split)


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
