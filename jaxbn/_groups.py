"""How examples are cut into virtual batches, and which sizes of these do not fit."""

from __future__ import annotations

import operator
from typing import Any

import jax

from jaxbn import _checks
from jaxbn._names import shown
from jaxbn._types import Groups, Plan


def require_size(virtual_batch_size: Any, axis_index_groups: Any) -> None:
  """Refuses what is no size of a virtual batch, and two ways at once to say who shares."""
  given = f"virtual_batch_size={shown(virtual_batch_size)}"
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
      f"{given} with axis_index_groups={shown(axis_index_groups)}: both say which examples share "
      "their statistics: leave one of them out (a virtual batch makes its own groups of devices)."
    )


def groups(virtual_batch_size: Any, plan: Plan, x: jax.Array) -> Groups | None:
  """The groups of x, of a size that `require_size` has seen; None if one holds everything."""
  if virtual_batch_size == "device" and plan.axis_name is None:
    raise ValueError(
      "virtual_batch_size='device' without axis_name: x is then one array (under jit also where it "
      "is sharded), and which device holds which part is not known here: pass the number of "
      "examples that a device holds, or, under pmap, shard_map or vmap, axis_name."
    )
  if not plan.axes.reduced:
    raise ValueError(
      f"virtual_batch_size={shown(virtual_batch_size)}, but x of shape {x.shape} has channels on "
      "all its axes, and no axis of examples to group."
    )
  axis = plan.axes.reduced[0]
  share, devices = x.shape[axis], 1 if plan.axis_name is None else _checks.axis_size(plan.axis_name)
  size = share if virtual_batch_size == "device" else operator.index(virtual_batch_size)
  if share % size and (size % share or devices % (size // share)):
    held = f"x holds {share} examples, along axis {axis}"
    if plan.axis_name is not None:
      held += f", on each of the {devices} devices of axis_name={plan.axis_name!r}"
      held += f", a global batch of {share * devices}"
    if not isinstance(share, int):
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
    return Groups(axis, size, share // size, None, None, plan.axis_name)
  n = size // share
  members = tuple(tuple(range(first, first + n)) for first in range(0, devices, n))
  return Groups(axis, share, 1, plan.axis_name, members, plan.axis_name)


def _fitting(share: int, devices: int) -> list[int]:
  """All sizes that a group can have: what divides a share, and shares of what divides devices."""
  within = [n for n in range(1, share + 1) if share % n == 0]
  across = [share * n for n in range(2, devices + 1) if devices % n == 0]
  return within + across
