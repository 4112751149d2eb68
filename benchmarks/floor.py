"""The least that batch norm adds to what a training step moves, layer by layer.

What a norm costs depends on its place in the network, which is read off the network as traced.
docs/templates/compiled.md has the count of reads and writes, with the norm and without it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.extend
from jax.ad_checkpoint import checkpoint_name

from benchmarks.networks import Network, outside

NORM, ACTIVATION = "norm", "activation"
POOLS = ("reduce_sum", "reduce_window_sum")  # means are made of them
Uses = dict[Any, list[Any]]


def floor_bytes(network: Network, dtype: Any) -> int:
  return sum(floor for _, floor in layers(network, dtype))


def layers(network: Network, dtype: Any) -> Iterator[tuple[int, int]]:
  """The bytes of each tensor that is normalized, and the least that its norm moves."""
  model = network.model(_marks, dtype)
  variables = jax.eval_shape(model.init, jax.random.key(0), network.inputs())
  steps = jax.make_jaxpr(model.apply)(variables, network.inputs()).jaxpr.eqns
  uses: Uses = collections.defaultdict(list)
  for step in steps:
    for value in step.invars:
      if isinstance(value, jax.extend.core.Var):
        uses[value].append(step)
  for step in steps:
    if _is_mark(step, NORM):
      size = _size(step.invars[0])
      yield size, _least(size, step.outvars[0], uses)


def _least(size: int, y: Any, uses: Uses) -> int:
  """Bytes that a norm of so many adds at least, from what is done with its result y."""
  residual, sums = y, [step for step in uses[y] if step.primitive.name == "add"]
  if sums:
    y = sums[0].outvars[0]
  activations = [step for step in uses[y] if _is_mark(step, ACTIVATION)]
  if not activations:
    return 6 * size + 2 * _cotangent(y, uses)
  if sums:
    shares_kernels = sums[0].invars[0] is residual  # with the norm that it is added to
    return (3 if shares_kernels else 5) * size
  return 2 * size + _cotangent(activations[0].outvars[0], uses)


def _cotangent(y: Any, uses: Uses) -> int:
  """Bytes of y's cotangent as it comes: from a mean it is as small as the mean."""
  return max((_coming(step, y, uses) for step in uses[y]), default=_size(y))


def _coming(step: Any, y: Any, uses: Uses) -> int:
  if step.primitive.name == "convert_element_type":
    return _cotangent(step.outvars[0], uses)
  return _size(step.outvars[0] if step.primitive.name in POOLS else y)


def _marks(*inputs: Any, dtype: Any, **options: Any) -> jax.Array:
  """In a norm's place: what leaves its name in the trace."""
  options["activation"] = partial(checkpoint_name, name=ACTIVATION)
  return outside(partial(checkpoint_name, name=NORM), *inputs, **options)


def _is_mark(step: Any, name: str) -> bool:
  return step.primitive.name == "name" and step.params["name"] == name


def _size(value: Any) -> int:
  return value.aval.size * value.aval.dtype.itemsize
