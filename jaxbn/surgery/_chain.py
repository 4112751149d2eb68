"""Per-channel affine steps on one value, gathered while a program is read."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax.numpy as jnp

from jaxbn.surgery._known import Known, made
from jaxbn.surgery._linear import Linear, is_move, moved
from jaxbn.surgery._trace import Op

_AFFINE = {"add": 2, "add_any": 2, "sub": 2, "mul": 2, "div": 1, "neg": 1}  # of which operands
Inputs = tuple[Known | None, ...]  # None stands for what the step before gave
Steps = tuple[tuple[Op, Inputs], ...]


def is_affine(op: Op, inputs: Inputs) -> bool:
  """Whether it is affine in the input that is not known."""
  inexact = jnp.issubdtype(op.results[0].dtype, jnp.inexact)
  return inexact and inputs.index(None) < _AFFINE.get(op.name, 0)


@dataclasses.dataclass(frozen=True)
class Chain:
  """A value that is not computed yet: steps on an array, and what they amount to.

      value = layout(linear(layout(base), kernel * before * scale) + shift)

  or, without a linear operation, layout(base) * scale + shift, where None is 1 or 0.

  Attributes:
    base: an array.
    origin: why no step before `base` is one of these.
    steps: operations and their inputs, as the program has them.
    scale, shift: in the layout of what the linear operation gives, or, without one, of the value.
    linear, kernel, at: of the linear operation, which is steps[at].
    before: factors of its input, laid out like the kernel.
    factors, shifts: what is multiplied by, and added, except numbers that stand in the program.
  """

  base: Any
  origin: str
  steps: Steps = ()
  scale: Known | None = None
  shift: Known | None = None
  linear: Linear | None = None
  kernel: Known | None = None
  at: int = -1
  before: Known | None = None
  factors: tuple[Known, ...] = ()
  shifts: tuple[Known, ...] = ()

  @property
  def is_norm(self) -> bool:
    """Whether it is more than a linear operation with its bias."""
    return bool(self.factors) or len(self.shifts) > 1

  def moves(self) -> tuple[Steps, Steps]:
    """The changes of layout before and after the linear operation."""
    before, after = self.steps[: self.at], self.steps[self.at + 1 :]
    return tuple(s for s in before if is_move(s[0])), tuple(s for s in after if is_move(s[0]))

  def and_then(self, op: Op, inputs: Inputs, **changes: Any) -> Chain:
    return dataclasses.replace(self, steps=(*self.steps, (op, inputs)), **changes)

  def moved(self, op: Op, inputs: Inputs) -> Chain | str:
    """With a change of layout."""
    if self.linear is not None:
      return self.and_then(op, inputs)
    channels = {k: getattr(self, k) for k in ("scale", "shift") if getattr(self, k) is not None}
    laid_out = {name: moved(op, value) for name, value in channels.items()}
    if None in laid_out.values():
      return f"a {op.name} mixes its channels"
    return self.and_then(op, inputs, **laid_out)

  def affine(self, op: Op, inputs: Inputs) -> Chain | str:
    """With a factor or a shift."""
    position = inputs.index(None)
    whole = op.results[0]
    if op.operands[position].shape != whole.shape:
      return "it repeats its input"
    ones = [1] * whole.ndim
    minus = self._back(made(lambda: jnp.full(ones, -1.0)))
    known = minus if op.name == "neg" else inputs[1 - position]
    assert known is not None
    counts = (known,) if known.leaves else ()
    if op.name != "neg":
      known = self._back(known.narrow if known.shape else known.reshaped(ones))
    if known is None:
      return "its channels are not those of the kernel before it"
    match op.name, position:
      case "neg", _:
        factor, term = minus, None
      case "mul", _:
        factor, term = known, None
      case "div", _:
        factor, term = made(lambda v: 1 / v, known), None
      case "sub", 0:
        factor, term = None, made(operator.neg, known)
      case "sub", 1:
        factor, term = minus, known
      case _:
        factor, term = None, known
    shift = self.shift
    if shift is not None and factor is not None:
      shift = made(operator.mul, shift, factor)
    return self.and_then(
      op,
      inputs,
      scale=_of_both(operator.mul, self.scale, factor),
      shift=_of_both(operator.add, shift, term),
      factors=self.factors + (counts if term is None else ()),
      shifts=self.shifts + (() if term is None else counts),
    )

  def through(self, op: Op, inputs: Inputs, linear: Linear, kernel: Known) -> Chain | str:
    """With a linear operation, which takes up the steps before it."""
    start: dict[str, Any] = {"linear": linear, "kernel": kernel, "at": len(self.steps)}
    if self.linear is not None:
      return "it is folded into the kernel before it"
    if self.scale is not None:
      start["before"] = linear.onto_inputs(self.scale)
      if start["before"] is None:
        return f"its channels are not those of the kernel of the {op.name} after it"
    if self.shift is not None:
      start["shift"] = linear.of_shift(kernel, self.shift)
      if start["shift"] is None:
        return f"the {op.name} after it puts zeros around or between what it gives"
    return self.and_then(op, inputs, **start, scale=None)

  def folded_kernel(self) -> Known:
    """The kernel, and all factors, in the kernel's own dtype."""
    assert self.linear is not None
    assert self.kernel is not None
    scale = None if self.scale is None else self.linear.onto_outputs(self.scale)
    kernel = _of_both(operator.mul, _of_both(operator.mul, self.kernel, self.before), scale)
    assert kernel is not None
    return kernel.cast(self.kernel.dtype)

  def _back(self, channels: Known) -> Known | None:
    """In the layout of what the linear operation, if any, gives; None if not of its channels."""
    if self.linear is None:
      return channels
    for op, _ in reversed(self.steps[self.at + 1 :]):
      if is_move(op):
        laid_out = moved(op, channels, back=True)
        if laid_out is None:
          return None
        channels = laid_out
    return None if self.linear.onto_outputs(channels) is None else channels


def _of_both(function: Any, a: Known | None, b: Known | None) -> Known | None:
  """The function of two, or the one that there is."""
  return made(function, a, b) if a is not None and b is not None else a if b is None else b
