"""The least that batch norm adds to what a training step moves, layer by layer.

What a norm costs depends on its place in the network, which is read off the network as traced.
docs/templates/compiled.md has the count of reads and writes, with the norm and without it, where
convolutions are kernels of their own; docs/design.md where they take what is elementwise before and
after them, and sums, as on a TPU.
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
LANES, SUBLANES = 128, 8  # a TPU's tile
Uses = dict[Any, list[Any]]


def floor_bytes(network: Network, dtype: Any) -> int:
  return sum(floor for _, floor in layers(network, dtype))


def layers(network: Network, dtype: Any) -> Iterator[tuple[int, int]]:
  """The bytes of each tensor that is normalized, and the least that its norm moves."""
  uses, _, norms = _traced(network, dtype)
  for step in norms:
    size = _size(step.invars[0])
    yield size, _least(size, step.outvars[0], uses)


def fused_layers(network: Network, dtype: Any) -> Iterator[tuple[int, int]]:
  """The same, on a TPU's layouts, where convolutions take what is elementwise and sums."""
  uses, made, norms = _traced(network, dtype)
  for step in norms:
    x, y = step.invars[0], step.outvars[0]
    sums = [use for use in uses[y] if use.primitive.name == "add"]
    # Backward x is read with the cotangent: once for the sums and where a convolution's two
    # gradients are taken. Before a sum it is also written and read by itself.
    passes = 3 - _of_input(x, made) + 2 * bool(sums and sums[0].invars[1] is y)
    yield _padded(x), passes * _padded(x)


def _traced(network: Network, dtype: Any) -> tuple[Uses, dict[Any, Any], list[Any]]:
  """Of a network who uses each value and who made it, and its norms."""
  model = network.model(_marks, dtype)
  variables = jax.eval_shape(model.init, jax.random.key(0), network.inputs())
  steps = jax.make_jaxpr(model.apply)(variables, network.inputs()).jaxpr.eqns
  uses: Uses = collections.defaultdict(list)
  for step in steps:
    for value in step.invars:
      if isinstance(value, jax.extend.core.Var):
        uses[value].append(step)
  made = {value: step for step in steps for value in step.outvars}
  return uses, made, [step for step in steps if _is_mark(step, NORM)]


def _of_input(x: Any, made: dict[Any, Any]) -> bool:
  """Whether x is a convolution of the network's input, which has no gradient."""
  if x not in made or made[x].primitive.name != "conv_general_dilated":
    return False
  x = made[x].invars[0]
  while x in made and made[x].primitive.name == "convert_element_type":
    x = made[x].invars[0]
  return x not in made


def _padded(value: Any) -> int:
  """Bytes in tiles: channels in the lanes and examples in the sublanes, or the other way round."""
  shape = value.aval.shape
  tiles = [
    -(-lanes // LANES) * LANES * (-(-sublanes // SUBLANES) * SUBLANES)
    for lanes, sublanes in ((shape[-1], shape[0]), (shape[0], shape[-1]))
  ]
  return min(tiles) * _size(value) // (shape[0] * shape[-1])


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
