"""Virtual batches: the global batch in groups of a fixed size, each with statistics of its own.

The examples lie along the first axis that is not a channel's; on several devices along axis_name
they follow each other in the devices' order. Groups are consecutive, so that where a device holds
several, one more axis of x tells them apart, and the statistics have it as one more channel axis:
every other step is the same with it. Where a group is spread over neighbouring devices, these
share as in `sync`. Large-batch training with small groups: Hoffer, Hubara & Soudry 2017, "Train
longer, generalize better" (ghost batch normalization).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._moments import Moments, divisor, sum_over_devices
from jaxbn._rule import Form, Given
from jaxbn._running import unbiased_variance

Size = int | str | None


class Groups(NamedTuple):
  """How x is divided, where there is more than one group."""

  axis: int  # of the examples
  size: int  # examples of one group in this x
  cut: bool  # whether this x holds several groups
  axis_name: Any = None  # of all devices
  axis_index_groups: Any = None  # of the devices that share a group; None where none do

  def sharing(self) -> tuple[Any, Any]:
    """Over which devices a group's moments are shared, as `sync` takes it."""
    if self.axis_index_groups is None:
      return None, None
    return self.axis_name, self.axis_index_groups

  def divide(self, form: Form, given: Given, weight: Any) -> tuple[Form, Given, Any]:
    """x and what is aligned with it with an axis of groups before that of the examples."""
    if not self.cut:
      return form, given, weight
    features = tuple(a + (a > self.axis) for a in form.axes.features)
    reduced = tuple(a + (a >= self.axis) for a in form.axes.reduced)
    axes = _checks.Axes(tuple(sorted((*features, self.axis))), reduced)
    aligned = {name: self._split(getattr(given, name)) for name in _ALIGNED}
    per_channel = {name: self._broadcast(axes, getattr(given, name)) for name in ("scale", "bias")}
    activation = self._undivided(form.activation, given.x.shape)
    form = form._replace(axes=axes, activation=activation)
    return form, given._replace(**aligned, **per_channel), self._split(weight)

  def _split(self, x: jax.Array | None) -> jax.Array | None:
    if x is None:
      return None
    n = x.shape[self.axis]  # 1 where it is the same for all examples
    parts = (1, 1) if n == 1 else (n // self.size, self.size)
    return x.reshape(*x.shape[: self.axis], *parts, *x.shape[self.axis + 1 :])

  def _broadcast(self, axes: _checks.Axes, parameter: jax.Array | None) -> jax.Array | None:
    return None if parameter is None else jnp.expand_dims(parameter, axes.features.index(self.axis))

  def _undivided(self, activation: Any, shape: tuple[int, ...]) -> Callable[..., Any] | None:
    """An activation as it was given: parameters that it holds may have x's shape."""
    if activation is None:
      return None
    return lambda x, *constants: activation(x.reshape(shape), *constants).reshape(x.shape)

  def mean(self, form: Form, batch: Moments, unbiased: bool) -> Moments:
    """The mean over the groups that are not empty of their means and variances.

    The same on every device; the count is that of the groups.
    """
    var = unbiased_variance(batch) if unbiased else batch.var
    there = jnp.broadcast_to(jnp.asarray(batch.count) > 0, var.shape)
    # The moments of nothing are 0: added, they change no sum.
    sums = [there.astype(var.dtype), batch.mean, var]
    if self.cut:
      position = form.axes.features.index(self.axis)
      sums = [jnp.sum(v, position) for v in sums]
    if self.axis_name is not None:
      sums = sum_over_devices(sums, self.axis_name, None)
    n, mean, var = sums
    return Moments(n, mean / divisor(n, n.dtype), var / divisor(n, n.dtype))


_ALIGNED = ("x", "wide", "residual", "valid")


def require_size(virtual_batch_size: Any, axis_index_groups: Any) -> None:
  """Refuses what is no size of a virtual batch, and two ways at once to say who shares."""
  if virtual_batch_size is None:
    return
  given = f"virtual_batch_size={virtual_batch_size!r}"
  if isinstance(virtual_batch_size, str):
    if virtual_batch_size != "device":
      raise ValueError(
        f"{given}: pass a number of examples, 'device' for those of each device, or None for all."
      )
  else:
    try:
      if isinstance(virtual_batch_size, bool) or not _checks.concrete(virtual_batch_size):
        raise TypeError
      size = operator.index(virtual_batch_size)
    except TypeError:
      raise TypeError(
        f"{given} is not a Python int: pass a number of examples, 'device' for those of each "
        "device, or None for all."
      ) from None
    if size < 1:
      raise ValueError(f"{given}: a group holds at least one example.")
  if axis_index_groups is not None:
    raise ValueError(
      f"{given} with axis_index_groups={axis_index_groups!r}: both say which examples share their "
      "statistics: leave one of them out (virtual_batch_size makes the groups of devices itself)."
    )


def groups(
  virtual_batch_size: Any, x: jax.Array, axes: _checks.Axes, axis_name: Any
) -> Groups | None:
  """The groups of x, of a size that has been checked; None where there is one group only."""
  if virtual_batch_size is None:
    return None
  devices = 1 if axis_name is None else _checks.axis_size(axis_name)
  if virtual_batch_size == "device" and axis_name is None:
    raise ValueError(
      "virtual_batch_size='device' without axis_name: without a name for the devices (as under "
      "jit with sharded arrays) x is one array, and which device holds what is not seen here: pass "
      "the number of examples that each device holds."
    )
  if not axes.reduced:
    raise ValueError(
      f"virtual_batch_size={virtual_batch_size!r}, but all axes of x of shape {x.shape} are "
      "channels' axes: there are no examples to group."
    )
  axis = axes.reduced[0]
  share = x.shape[axis]
  size = share if virtual_batch_size == "device" else operator.index(virtual_batch_size)
  fits = share % size == 0 or (size % share == 0 and devices % (size // share) == 0)
  if not fits:
    raise ValueError(_misfit(size, share, devices, axis, axis_name))
  if size == share * devices:
    return None
  if isinstance(axis_name, list):
    axis_name = tuple(axis_name)
  if size <= share:
    return Groups(axis, size, size < share, axis_name)
  neighbours = size // share
  members = tuple(
    tuple(range(first, first + neighbours)) for first in range(0, devices, neighbours)
  )
  return Groups(axis, share, False, axis_name, members)


def _misfit(size: int, share: int, devices: int, axis: int, axis_name: Any) -> str:
  fitting = {*_divisors(share), *(share * n for n in _divisors(devices))}
  where = f"x has {share} examples along axis {axis}"
  if axis_name is not None:
    where += (
      f" on each of {devices} devices along axis_name={axis_name!r}: a global batch of "
      f"{share * devices}"
    )
  return (
    f"virtual_batch_size={size} does not fit: {where}. A group lies within one device's examples "
    "or is all those of some devices, and all groups are of one size: pass one of "
    f"{', '.join(map(str, sorted(fitting)))}, or None for all."
  )


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]
