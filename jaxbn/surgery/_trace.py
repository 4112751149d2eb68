"""A function as one flat list of operations: calls inlined, with what nothing reads left out."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
# With a derivative of their own, which is lost where they are inlined.
_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"}
_SAYS_NOTHING_OF_VALUES = {"optimization_barrier", "pvary"}
# They depend on the device, whatever is known.
BETWEEN_DEVICES = {
  *("axis_index", "psum", "psum2", "psum_invariant", "pmax", "pmin", "ppermute", "all_gather"),
  *("all_gather_invariant", "all_to_all", "reduce_scatter", "pbroadcast"),
}
LINEAR = {"conv_general_dilated", "dot_general"}
_WORTH_INLINING = LINEAR | {"mul", "sub", "div", "scan", "while", "cond", "shard_map"}


class Op(NamedTuple):
  """An equation of a program, and the values that it reads and gives, by number."""

  eqn: JaxprEqn
  owner: Jaxpr
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def name(self) -> str:
    return self.eqn.primitive.name

  @property
  def operands(self) -> list[Any]:
    """The shapes and dtypes of its inputs."""
    return [v.aval for v in self.eqn.invars]

  @property
  def results(self) -> list[Any]:
    """The shapes and dtypes of its outputs."""
    return [v.aval for v in self.eqn.outvars]

  def run_here(self, values: Sequence[Any]) -> list[Any]:
    """What it gives where it stands, in a shard_map on values that are typed as it takes them."""
    return self.run([_as_typed(a, x) for a, x in zip(self.operands, values, strict=True)])

  def run(self, values: Sequence[Any]) -> list[Any]:
    """What it gives for the values of its inputs."""
    read = {v: x for v, x in zip(self.eqn.invars, values, strict=True) if type(v) is not Literal}
    alone = self.owner.replace(
      eqns=[self.eqn], constvars=[], invars=list(read), outvars=self.eqn.outvars
    )
    return jaxpr_as_fun(ClosedJaxpr(alone, []))(*read.values())


def _as_typed(aval: Any, value: Any) -> Any:
  """The value, typed to vary along the axes along which this type varies."""
  axes = _varying(aval) - _varying(jax.typeof(value))
  return lax.pcast(value, tuple(axes), to="varying") if axes else value


def _varying(aval: Any) -> frozenset[Any]:
  manual = getattr(aval, "manual_axis_type", aval)  # in jax 0.9 the type itself has vma
  return getattr(manual, "varying", getattr(manual, "vma", frozenset()))


class Program(NamedTuple):
  """Operations in order; the values that go in and come out; constants; who reads which value.

  A reader is the position of an operation, or None for the program's output.
  """

  ops: list[Op]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  constants: dict[int, Any]
  readers: dict[int, list[int | None]]


def flatten(closed: ClosedJaxpr) -> Program:
  """The program of a jaxpr. Barriers are left out, since they say nothing about values."""
  number = itertools.count()
  ops: list[Op] = []
  constants: dict[int, Any] = {}

  def constant(value: Any) -> int:
    constants[i := next(number)] = value
    return i

  def inline(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[int]) -> tuple[int, ...]:
    env: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update(zip(jaxpr.constvars, map(constant, consts), strict=True))

    def read(atom: Any) -> int:
      return constant(atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
      given = tuple(map(read, eqn.invars))
      if eqn.primitive.name in _SAYS_NOTHING_OF_VALUES:
        outputs = given
      elif (body := _inlined(eqn)) is not None:
        outputs = inline(body.jaxpr, body.consts, given[-len(body.jaxpr.invars) or len(given) :])
      elif (forwarded := _forwarded(eqn)) is not None:
        outputs = tuple(given[1 + i] for i in forwarded)
      else:
        outputs = tuple(next(number) for _ in eqn.outvars)
        ops.append(Op(eqn, jaxpr, given, outputs))
      env.update(zip(eqn.outvars, outputs, strict=True))
    return tuple(map(read, jaxpr.outvars))

  inputs = tuple(next(number) for _ in closed.jaxpr.invars)
  outputs = inline(closed.jaxpr, closed.consts, inputs)
  live = _live(ops, outputs)
  readers: dict[int, list[int | None]] = defaultdict(list)
  for position, op in enumerate(live):
    for i in op.inputs:
      readers[i].append(position)
  for i in outputs:
    readers[i].append(None)
  return Program(live, inputs, outputs, constants, readers)


def reads(op: Op) -> list[int]:
  """Its inputs, each as often as it is read: those of a choice in each branch that reads it."""
  if op.name != "cond":
    return list(op.inputs)
  read = list(op.inputs[:1])
  for body in op.eqn.params["branches"]:
    atoms = [*body.jaxpr.outvars, *(a for eqn in body.jaxpr.eqns for a in eqn.invars)]
    read_there = {a for a in atoms if not isinstance(a, Literal)}
    read += [i for i, v in zip(op.inputs[1:], body.jaxpr.invars, strict=True) if v in read_there]
  return read


def has_linear(eqn: JaxprEqn) -> bool:
  """Whether a convolution or a product is inside."""
  return any(map(_has(LINEAR), _bodies(eqn)))


def _live(ops: list[Op], outputs: tuple[int, ...]) -> list[Op]:
  needed, live = set(outputs), []
  for op in reversed(ops):
    if op.eqn.effects or needed.intersection(op.outputs):
      live.append(op)
      needed.update(op.inputs)
  return live[::-1]


def _inlined(eqn: JaxprEqn) -> ClosedJaxpr | None:
  name = eqn.primitive.name
  if name in _CALLS or (name in _CUSTOM and any(map(_has(_WORTH_INLINING), _bodies(eqn)))):
    return next(iter(_bodies(eqn)))
  if name == "cond" and isinstance(eqn.invars[0], Literal):
    return eqn.params["branches"][int(eqn.invars[0].val)]
  return None


def _forwarded(eqn: JaxprEqn) -> tuple[int, ...] | None:
  """Which inputs come out of a choice, where all its branches do nothing but forward the same."""
  if eqn.primitive.name != "cond":
    return None
  branches = [flatten(b) for b in eqn.params["branches"]]
  ways = {b.outputs for b in branches}  # inputs are numbered first, in order
  same = len(ways) == 1 and not any(b.ops or b.constants for b in branches)
  return ways.pop() if same else None


def _bodies(eqn: JaxprEqn) -> list[ClosedJaxpr]:
  """The jaxprs among an equation's parameters."""
  leaves = jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda p: isinstance(p, Jaxpr | ClosedJaxpr)
  )
  closed = (ClosedJaxpr(p, ()) if isinstance(p, Jaxpr) else p for p in leaves)
  return [p for p in closed if isinstance(p, ClosedJaxpr)]


def _has(names: set[str]) -> Any:
  def has(closed: ClosedJaxpr) -> bool:
    return any(
      eqn.primitive.name in names or any(map(has, _bodies(eqn))) for eqn in closed.jaxpr.eqns
    )

  return has
