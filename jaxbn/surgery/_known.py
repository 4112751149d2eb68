"""What a program knows without its input, evaluated only when it is asked for."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._dtypes import promoting, wide
from jaxbn.surgery._trace import Op

# Operations that give the same along an axis along which their inputs are the same.
_ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "convert_element_type", "copy"}


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
  """A value that does not depend on the input: a function of other such values.

  Attributes:
    shape, dtype: its own.
    leaves: the names of the variables and closed-over arrays that it is made of.
    function: what makes it of the inputs; None for one that is given.
    inputs: other known values.
    narrowed: the same of size 1 along axes along which it is seen to be repeated, if it is.
    outer: for what the body of a loop is given, the value outside.
    sliced: whether each turn gets its slice of that.
  """

  shape: tuple[Any, ...]
  dtype: Any
  leaves: frozenset[str] = frozenset()
  function: Callable[..., Any] | None = None
  inputs: tuple[Known, ...] = ()
  narrowed: Known | None = None
  outer: Known | None = None
  sliced: bool = False

  @property
  def narrow(self) -> Known:
    return self if self.narrowed is None else self.narrowed

  def reshaped(self, shape: Sequence[int]) -> Known:
    shape = tuple(shape)
    return Known(shape, self.dtype, self.leaves, lambda v: v.reshape(shape), (self,))

  def cast(self, dtype: Any) -> Known:
    return Known(self.shape, dtype, self.leaves, lambda v: v.astype(dtype), (self,))


def made(function: Callable[..., Any], *inputs: Known) -> Known:
  """The value of a function of known ones, computed in float32 at least."""

  @promoting
  def widely(*values: Any) -> Any:
    return function(*map(wide, values))

  like = jax.eval_shape(widely, *(jax.ShapeDtypeStruct(i.shape, i.dtype) for i in inputs))
  return Known(like.shape, like.dtype, _leaves(inputs), widely, inputs)


def computed(op: Op, inputs: Sequence[Known]) -> list[Known]:
  """What an operation gives, all of whose inputs are known."""
  leaves = _leaves(inputs)
  results = Known((), None, leaves, lambda *values: op.run(values), tuple(inputs))
  narrowed = _narrowed(op, inputs)
  return [
    Known(a.shape, a.dtype, leaves, operator.itemgetter(i), (results,), narrowed)
    for i, a in enumerate(op.results)
  ]


def _leaves(inputs: Iterable[Known]) -> frozenset[str]:
  return frozenset().union(*(i.leaves for i in inputs))


def _narrowed(op: Op, inputs: Sequence[Known]) -> Known | None:
  """The result for narrow inputs, or None where it is no smaller."""
  whole = op.results[0]
  narrow = [i.narrow for i in inputs]
  if op.name == "broadcast_in_dim":
    shape = [1] * whole.ndim
    for axis, size in zip(op.eqn.params["broadcast_dimensions"], narrow[0].shape, strict=True):
      shape[axis] = size
    return None if tuple(shape) == whole.shape else narrow[0].reshaped(shape)
  if all(i.narrowed is None for i in inputs):
    return None
  if op.name == "transpose":
    shape = [narrow[0].shape[axis] for axis in op.eqn.params["permutation"]]
  elif op.name in _ELEMENTWISE:
    shape = list(jnp.broadcast_shapes(*(n.shape for n in narrow)))
  else:
    return None
  if tuple(shape) == whole.shape:
    return None
  leaves = _leaves(narrow)
  return Known(tuple(shape), whole.dtype, leaves, lambda *v: op.run(v)[0], tuple(narrow))
