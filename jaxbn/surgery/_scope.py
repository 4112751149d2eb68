"""What is known without the input, in a program or in the body of a loop, and the new variables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxbn.surgery._known import Known, computed
from jaxbn.surgery._trace import BETWEEN_DEVICES, Op, Program, reads

Key = frozenset[str]  # the leaves of a kernel: each is folded once


class Fold(NamedTuple):
  """Which layers went where: the names of the new kernel and, if there is one, of the new bias."""

  layers: str
  kernel: str
  bias: str | None


class Session:
  """The variables, and which folds there are: found once, looked up for inputs of other shapes.

  Attributes:
    variables: by name; the original ones while it records, then the folded ones.
    recording: whether it does.
    folds: what is folded where.
    only: the one kernel that something is folded into; None for all.
    left: what is not folded, and why.
    used: the original variables that are still needed.
    new: the folded kernels and biases.
    epsilon: the largest unit in the last place of what a folded kernel gives.
  """

  def __init__(
    self,
    variables: dict[str, Any],
    folds: dict[Key, Fold] | None = None,
    only: Key | None = None,
  ) -> None:
    self.variables = variables
    self.recording = folds is None
    self.folds: dict[Key, Fold] = {} if folds is None else folds
    self.only = only
    self.left: dict[tuple[int, ...], tuple[str, str]] = {}
    self.used: dict[str, Any] = {}
    self.new: dict[str, jax.Array] = {}
    self.epsilon = 0.0
    self._values: dict[Known, Any] = {}

  def variable(self, name: str) -> Any:
    if name not in self.variables:
      raise ValueError(
        f"variables has no {name!r}, but {sorted(self.variables)}. Give the variables that fold "
        "gave. If you did, function is another program for inputs of these shapes than for the "
        "example: fold it with an example of such shapes."
      )
    self.used[name] = self.variables[name]
    return self.variables[name]

  def stored(self, name: str, known: Known) -> Any:
    """The new variable of that name, which is the value of `known`."""
    if not self.recording:
      return self.variable(name)
    with jax.ensure_compile_time_eval():
      self.new[name] = self._value(known)
    return self.new[name]

  def _value(self, known: Known) -> Any:
    if known.function is None:
      return self.variables[next(iter(known.leaves))]
    if known not in self._values:
      self._values[known] = known.function(*map(self._value, known.inputs))
    return self._values[known]


class Scope:
  """A program on its inputs, each of them known or an array: the whole, or one turn of a loop.

  Attributes:
    session, program: the ones that it was made of.
    key: the numbers of the loops around it.
    parent, turn: for the body of an operation, what is around it, and of a scan the turn's index.
    start: where its inputs come from, in words.
    env: what is known of the program's values, and the inputs.
    unknown: the operations of which the input decides.
  """

  def __init__(
    self,
    session: Session,
    program: Program,
    inputs: Sequence[Any],
    key: tuple[int, ...] = (),
    parent: Scope | None = None,
    turn: Any = None,
    start: str = "the input",
  ) -> None:
    self.session, self.program, self.key = session, program, key
    self.parent, self.turn, self.start = parent, turn, start
    self.env: dict[int, Any] = dict(zip(program.inputs, inputs, strict=True))
    self.unknown: list[Op] = []
    self._uses: Counter[str] = Counter()  # of the leaves, by what is not known
    self._values: dict[Known, Any] = {}
    self._outside: dict[Known, tuple[Known, bool]] = {}
    arrays = [i for i, value in program.constants.items() if np.ndim(value)]
    for i, value in program.constants.items():
      a = jax.typeof(value)
      names = ["/".join(map(str, ("constants", *key, arrays.index(i))))] if a.shape else []
      self.env[i] = Known(a.shape, a.dtype, frozenset(names), lambda value=value: value)
    for op in program.ops:
      given = [self.env.get(i) for i in op.inputs]
      known = [v for v in given if isinstance(v, Known)]
      if len(known) == len(given) and not op.eqn.effects and op.name not in BETWEEN_DEVICES:
        self.env.update(zip(op.outputs, computed(op, known), strict=True))
      else:
        self.unknown.append(op)
        self._count(reads(op))
    self._count(program.outputs)

  def _count(self, numbers: Iterable[int]) -> None:
    values = map(self.env.get, numbers)
    self._uses.update(leaf for v in values if isinstance(v, Known) for leaf in v.leaves)

  def shared(self, *leaves: str) -> bool:
    """Whether one of them has two readers."""
    outside = self.parent is not None and self.parent.shared(*leaves)
    return outside or any(self._uses[leaf] > 1 for leaf in leaves)

  def value(self, known: Known) -> Any:
    """What it is, computed from the variables where the program runs."""
    if known not in self._values:
      if known.outer is not None and self.parent is not None:
        value = self._turned(self.parent.value(known.outer), known.sliced)
      elif known.function is None:
        value = self.session.variable(*known.leaves)
      else:
        value = known.function(*map(self.value, known.inputs))
      self._values[known] = value
    return self._values[known]

  def stored(self, name: str, known: Known) -> Any:
    """What it is, as a new variable of that name; for all turns of a loop one."""
    if self.parent is None:
      return self.session.stored(name, known)
    outside, sliced = self.outside(known)
    return self._turned(self.parent.stored(name, outside), sliced)

  def _turned(self, value: Any, sliced: bool) -> Any:
    return lax.dynamic_index_in_dim(value, self.turn, keepdims=False) if sliced else value

  def outside(self, known: Known) -> tuple[Known, bool]:
    """The value for all turns of a loop, and whether they differ."""
    if known.outer is not None:
      return known.outer, known.sliced
    if known not in self._outside:
      assert known.function is not None
      inputs = [self.outside(i) for i in known.inputs]
      lengths = [i.shape[0] for i, sliced in inputs if sliced]
      axes = tuple(0 if sliced else None for _, sliced in inputs)
      function = jax.vmap(known.function, axes) if lengths else known.function
      shape = (*lengths[:1], *known.shape)
      values = tuple(i for i, _ in inputs)
      whole = Known(shape, known.dtype, known.leaves, function, values)
      self._outside[known] = whole, bool(lengths)
    return self._outside[known]
