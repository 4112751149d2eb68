"""Operations with programs inside, such as loops: each program is a scope for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from jaxbn.surgery._known import Known
from jaxbn.surgery._scope import Scope
from jaxbn.surgery._trace import Op, flatten

Interpret = Callable[[Scope], list[Any]]


def can_be_looked_into(op: Op) -> bool:
  """A choice by the platform keeps what it is: its branches compile on one platform each."""
  return op.name in _KINDS and not op.eqn.params.get("branches_platforms")


def outputs(scope: Scope, op: Op, inputs: Sequence[Any], interpret: Interpret) -> Sequence[Any]:
  """What an operation gives that can be looked into, for inputs that are known, or arrays."""
  return _KINDS[op.name](scope, op, inputs, interpret)


def _start(op: Op) -> str:
  return f"the start of a {op.name}: move the kernel before it inside, too"


def _inside(value: Any, aval: Any, sliced: bool = False) -> Any:
  """What a body sees of a value from around it, all of it or, in a loop, a slice in each turn."""
  if not isinstance(value, Known):
    return value
  return Known(aval.shape, aval.dtype, value.leaves, outer=value, sliced=sliced)


def _arrays(scope: Scope, inputs: Sequence[Any]) -> list[Any]:
  return [scope.value(v) if isinstance(v, Known) else v for v in inputs]


def _scan(scope: Scope, op: Op, inputs: Sequence[Any], interpret: Interpret) -> Sequence[Any]:
  params, body = op.eqn.params, op.eqn.params["jaxpr"]
  inner = [v.aval for v in body.jaxpr.invars]
  sliced = [a.ndim > b.ndim for a, b in zip(op.operands, inner, strict=True)]
  results = zip(op.results, (v.aval for v in body.jaxpr.outvars), strict=True)
  carried = sum(a.ndim == b.ndim for a, b in results)
  first = len(inputs) - sum(sliced) - carried
  program, key = flatten(body), (*scope.key, op.outputs[0])
  rows = {i: inputs[i] for i, s in enumerate(sliced) if s and not isinstance(inputs[i], Known)}

  def turn(carry: Any, given: Any) -> Any:
    index, rows = given
    values = [
      carry[i - first]
      if first <= i < first + carried
      else rows[i]
      if i in rows
      else _inside(v, a, sliced[i])
      for i, (v, a) in enumerate(zip(inputs, inner, strict=True))
    ]
    given_back = interpret(Scope(scope.session, program, values, key, scope, index, _start(op)))
    return given_back[:carried], given_back[carried:]

  start = _arrays(scope, inputs[first : first + carried])
  settings = {name: params[name] for name in ("reverse", "unroll")}
  carry, stacked = lax.scan(turn, start, (jnp.arange(params["length"]), rows), **settings)
  return [*carry, *stacked]


def _while(scope: Scope, op: Op, inputs: Sequence[Any], interpret: Interpret) -> Sequence[Any]:
  params = op.eqn.params
  of_cond, constants = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]

  def part(name: str, number: int, own: Sequence[Any]) -> Callable[[Any], list[Any]]:
    body = params[f"{name}_jaxpr"]
    program, key = flatten(body), (*scope.key, op.outputs[0], number)
    around = [_inside(v, a) for v, a in zip(own, body.in_avals, strict=False)]
    return lambda carry: interpret(
      Scope(scope.session, program, [*around, *carry], key, scope, start=_start(op))
    )

  goes_on = part("cond", 0, inputs[:of_cond])
  turn = part("body", 1, inputs[of_cond:constants])
  return lax.while_loop(lambda carry: goes_on(carry)[0], turn, _arrays(scope, inputs[constants:]))


def _cond(scope: Scope, op: Op, inputs: Sequence[Any], interpret: Interpret) -> Sequence[Any]:
  index, *operands = inputs
  arrays = {i: v for i, v in enumerate(operands) if not isinstance(v, Known)}

  def branch(number: int, body: Any) -> Callable[[Any], list[Any]]:
    program, key = flatten(body), (*scope.key, op.outputs[0], number)

    def run(arrays: dict[int, Any]) -> list[Any]:
      values = [
        arrays[i] if i in arrays else _inside(v, a)
        for i, (v, a) in enumerate(zip(operands, body.in_avals, strict=True))
      ]
      return interpret(Scope(scope.session, program, values, key, scope, start=_start(op)))

    return run

  branches = [branch(i, body) for i, body in enumerate(op.eqn.params["branches"])]
  return lax.switch(*_arrays(scope, [index]), branches, arrays)


def _shard_map(scope: Scope, op: Op, inputs: Sequence[Any], interpret: Interpret) -> Sequence[Any]:
  """What is known and the same on all devices is closed over, and so the folded kernels are."""
  params = op.eqn.params
  body = ClosedJaxpr(params["jaxpr"], ())
  program, key = flatten(body), (*scope.key, op.outputs[0])
  same = [
    isinstance(v, Known) and not any(spec)
    for v, spec in zip(inputs, params["in_specs"], strict=True)
  ]

  def on_a_device(*given: Any) -> tuple[Any, ...]:
    arrays = iter(given)
    values = [
      _inside(v, a) if whole else next(arrays)
      for v, a, whole in zip(inputs, body.in_avals, same, strict=True)
    ]
    return tuple(interpret(Scope(scope.session, program, values, key, scope, start=_start(op))))

  split = [i for i, whole in enumerate(same) if not whole]
  # jax 0.9 calls them manual_axes.
  axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
  mapped = jax.shard_map(
    on_a_device,
    mesh=params["mesh"],
    in_specs=tuple(params["in_specs"][i] for i in split),
    out_specs=tuple(params["out_specs"]),
    axis_names=axes,
    check_vma=params["check_vma"],
  )
  return mapped(*_arrays(scope, [inputs[i] for i in split]))


_KINDS = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}
