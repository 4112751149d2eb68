"""Factors and shifts of channels: through a change of layout, and into a kernel.

Everywhere they have as many axes as what they are multiplied with or added to, each of its size or,
where they are the same along an axis, of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from jaxbn.surgery._known import Known, made
from jaxbn.surgery._trace import Op

_SAME = {"convert_element_type", "copy", "name", "sharding_constraint"}
_RESHAPES = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim"}


def is_move(op: Op) -> bool:
  """Whether it only lays out or converts its input."""
  before, after = op.operands[0], op.results[0]
  kinds = jnp.floating, jnp.complexfloating  # a factor of one kind is not one of the other
  if not any(all(jnp.issubdtype(a.dtype, k) for a in (before, after)) for k in kinds):
    return False
  if op.name == "broadcast_in_dim":  # which may only add axes of size 1
    return [n for n in before.shape if n != 1] == [n for n in after.shape if n != 1]
  return op.name in _SAME | _RESHAPES | {"transpose"}


def moved(op: Op, channels: Known, back: bool = False) -> Known | None:
  """Of the input's layout to the output's, or back; None where channels mix with others."""
  before, after = op.operands[0].shape, op.results[0].shape
  if op.name in _SAME:
    return channels
  if op.name == "transpose":
    return _transposed(channels, op.eqn.params["permutation"], back)
  order = op.eqn.params.get("dimensions") if op.name == "reshape" else None
  if order is None:
    return _regrouped(channels, after, before) if back else _regrouped(channels, before, after)
  middle = [before[axis] for axis in order]
  if back:
    regrouped = _regrouped(channels, after, middle)
    return None if regrouped is None else _transposed(regrouped, order, back)
  return _regrouped(_transposed(channels, order, back), middle, after)


def _transposed(channels: Known, order: Sequence[int], back: bool) -> Known:
  if back:
    order = sorted(range(len(order)), key=order.__getitem__)
  return made(lambda v: v.transpose(order), channels)


def _regrouped(channels: Known, before: Sequence[Any], after: Sequence[Any]) -> Known | None:
  """As a reshape does it with what `channels` are the channels of."""
  full, shape = [1] * len(before), [1] * len(after)
  for old, new in _groups(before, after):
    if any(channels.shape[axis] != 1 for axis in old):
      for axis in old:
        full[axis] = before[axis]
      for axis in new:
        shape[axis] = after[axis]
  if not all(isinstance(n, int) for n in full + shape):
    return None
  return made(lambda v: jnp.broadcast_to(v, full).reshape(shape), channels)


def _groups(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[range, range]]:
  """Runs of axes, before and after a reshape, that have as many elements."""
  groups, i, j = [], 0, 0
  while i < len(before) or j < len(after):
    start = i, j
    i, j = min(i + 1, len(before)), min(j + 1, len(after))
    while (m := math.prod(before[start[0] : i])) != (n := math.prod(after[start[1] : j])):
      if i == len(before) or j == len(after):  # the rest is one run, as where sizes are symbols
        i, j = len(before), len(after)
        break
      less = m < n if isinstance(m, int) and isinstance(n, int) else n % m == 0
      i, j = (i + 1, j) if less else (i, j + 1)
    groups.append((range(start[0], i), range(start[1], j)))
  return groups


class Linear(NamedTuple):
  """A convolution or a product, one of whose operands is known: the kernel.

  Attributes:
    kernel: the kernel's position among the operands.
    shape: the kernel's.
    ndim: the number of the output's axes.
    ins, outs: for those axes of the kernel that are the input's, or the output's, which of theirs.
    groups: into how many groups a convolution's input channels fall.
    shifts: whether a shift of the input shifts the output by the same everywhere: not so where
      zeros are put around the input or into it.
  """

  kernel: int
  shape: tuple[int, ...]
  ndim: int
  ins: dict[int, int]
  outs: dict[int, int]
  groups: int = 1
  shifts: bool = True

  def onto_outputs(self, channels: Known) -> Known | None:
    """The output's factors as the kernel's; None where they differ within a channel."""
    return self._onto(channels, self.outs)

  def onto_inputs(self, channels: Known) -> Known | None:
    """The input's factors as the kernel's; None where they differ within a channel."""
    size = math.prod(channels.shape)
    if self.groups == 1 or size == 1:
      return self._onto(channels, self.ins)
    (a,), (o,) = self.ins, self.outs
    if size != channels.shape[self.ins[a]]:
      return None

    def grouped(v: jax.Array) -> jax.Array:
      rows = jnp.repeat(v.reshape(self.groups, -1), self.shape[o] // self.groups, axis=0)
      return _laid_out(rows if o < a else rows.T, sorted((a, o)), len(self.shape))

    return made(grouped, channels)

  def of_shift(self, kernel: Known, shift: Known) -> Known | None:
    """What a shift of the input does to the output."""
    shift_of_kernel = self.onto_inputs(shift)
    if shift_of_kernel is None or not self.shifts:
      return None
    kept = sorted(self.outs)
    summed = tuple(a for a in range(len(self.shape)) if a not in kept)
    order = sorted(range(len(kept)), key=lambda i: self.outs[kept[i]])
    axes = sorted(self.outs.values())

    def shifted(kernel: jax.Array, shift: jax.Array) -> jax.Array:
      total = (kernel * shift).sum(summed)
      return _laid_out(total.transpose(order), axes, self.ndim)

    return made(shifted, kernel, shift_of_kernel)

  def _onto(self, channels: Known, axes: dict[int, int]) -> Known | None:
    others = [a for a in range(len(channels.shape)) if a not in axes.values()]
    if any(channels.shape[a] != 1 for a in others):
      return None
    kept = sorted(axes.values())
    order = [kept.index(axes[a]) for a in sorted(axes)]

    def onto(v: jax.Array) -> jax.Array:
      return _laid_out(v.squeeze(others).transpose(order), sorted(axes), len(self.shape))

    return made(onto, channels)


def _laid_out(v: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
  """With its axes at `axes` of ndim."""
  return jnp.expand_dims(v, [a for a in range(ndim) if a not in axes])


def linear(op: Op, kernel: int) -> Linear | None:
  """How an operation treats channels if it is linear, and its operand at `kernel` is known."""
  if op.eqn.primitive is primitives.conv_general_dilated_p and kernel == 1:
    of_op = _convolution(op)
  elif op.eqn.primitive is primitives.dot_general_p:
    of_op = _product(op, kernel)
  else:
    return None
  inexact = all(jnp.issubdtype(a.dtype, jnp.inexact) for a in op.operands)
  return of_op if inexact else None


def _convolution(op: Op) -> Linear | None:
  (_, kernel), (y,), params = op.operands, op.results, op.eqn.params
  if params["batch_group_count"] != 1:
    return None
  lhs, rhs, out = params["dimension_numbers"]
  zeros = any(n > 0 for pair in params["padding"] for n in pair) or {*params["lhs_dilation"]} - {1}
  return Linear(
    1,
    kernel.shape,
    y.ndim,
    {rhs[1]: lhs[1]},
    {rhs[0]: out[1]},
    params["feature_group_count"],
    not zeros,
  )


def _product(op: Op, position: int) -> Linear:
  kernel, (y,) = op.operands[position], op.results
  contracted, batch = op.eqn.params["dimension_numbers"]
  ins = dict(zip(contracted[position], contracted[1 - position], strict=True))
  ins |= dict(zip(batch[position], batch[1 - position], strict=True))
  outs = {axis: i for i, axis in enumerate(batch[position])}
  free = [axis for axis in range(kernel.ndim) if axis not in ins]
  first = len(outs) if position == 0 else y.ndim - len(free)
  outs |= {axis: first + i for i, axis in enumerate(free)}
  return Linear(position, kernel.shape, y.ndim, ins, outs)
