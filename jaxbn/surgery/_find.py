"""The one finder: which layers a network has, by one abstract run of it."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import errors, nnx
from jax.ad_checkpoint import checkpoint_name

from jaxbn.surgery import _linen, _nnx
from jaxbn.surgery._abstract import saying_what_lacks, shapes_of_variables, split_static
from jaxbn.surgery._bound_axes import here
from jaxbn.surgery._foreign import Foreign, bound, read
from jaxbn.surgery._layer import Layer, of_call, of_node, placed

BATCH_NORMS = (*_linen.BATCH_NORMS, *_nnx.BATCH_NORMS)
_MARK = "jaxbn.surgery.find "


def find(
  model: Any,
  *example: Any,
  variables: Any = None,
  kinds: Sequence[type] = BATCH_NORMS,
  foreign: Mapping[type, Foreign] | None = None,
  **arguments: Any,
) -> list[Layer]:
  """The layers of a network, in the order in which their first calls end.

  The network is traced, not computed, and not changed: `example` may hold `jax.ShapeDtypeStruct`.

  Args:
    model: a module of Flax Linen or NNX.
    *example: what it is called with. Of an NNX module, without one the graph is searched instead:
      in its own order, and without calls and the shapes of inputs.
    variables: of a Linen module, or their shapes; None: those that init makes.
    kinds: which classes of layers; default, Flax's batch norm and ours.
    foreign: batch norms that are not Flax's, by their class, and how to read them.
    **arguments: further arguments of `module.apply` (`train=False`, `method=`, `rngs=`), or of the
      NNX module.

  Returns:
    A list of `Layer`; an empty one if there is none.

  Raises:
    TypeError: variables for an NNX module.
    ValueError: variables that lack a collection, or a leaf of it.

  >>> import flax.linen as nn, jax.numpy as jnp, jaxbn.surgery
  >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
  >>> jaxbn.surgery.find(model, jnp.zeros((8, 3)))
  [BatchNorm layers_1]
  """
  readings: dict[type, Foreign | None] = {**dict.fromkeys(kinds), **(foreign or {})}
  if isinstance(model, nn.Module):
    return _in_linen(model, example, variables, readings, arguments)
  if variables is not None:
    raise TypeError("an NNX module has its variables in it: leave variables out.")
  if example or arguments:
    return _in_nnx_call(model, example, readings, arguments)
  return _in_nnx_graph(model, readings)


def _in_linen(
  model: Any, example: Any, variables: Any, readings: Any, arguments: dict[str, Any]
) -> list[Layer]:
  if variables is None:
    variables = shapes_of_variables(model, example, arguments)
  found: dict[str, Layer] = {}
  log: list[Any] = []

  def around(call: _linen.Call) -> Any:
    reading = readings.get(call.kind)
    said = read(reading, call.layer, call.arguments)
    before, path = len(log), call.layer.path
    own = _linen.options(call.layer, call.kind)
    where = here(own)
    y = call.run() if where == own else call.run_instead(call.kind, where)
    if path in log[before:]:  # what was called in its place
      return y
    log.append(path)
    return _record(
      found, placed(of_call(call, reading), reading, call.places(), variables), said, y
    )

  def apply(mutable: Any) -> list[Layer]:
    found.clear()
    with saying_what_lacks(), _linen.intercepting(around, readings, nested=True):
      run, arrays = split_static(model.apply, variables, *example, mutable=mutable, **arguments)
      return _counted(found, jax.make_jaxpr(run)(arrays))

  try:  # as it is evaluated, for some networks train where batch_stats may change
    return apply(False)
  except errors.ModifyScopeVariableError:
    return apply([collection for collection in variables if collection != "params"])


def _in_nnx_graph(model: Any, readings: Any) -> list[Layer]:
  state = nnx.to_pure_dict(nnx.state(model))
  found = []
  for path, layer, kind in _nnx.layers(model, readings):
    reading = readings.get(kind)
    own = _nnx.places(layer, path)
    described = placed(of_node(path, layer, kind, reading), reading, own, state)
    if described.shape and hasattr(layer, "num_features"):
      stacked = described.shape[:-1] if np.prod(described.shape) != layer.num_features else ()
      shape = described.shape[len(stacked) :]
      described = described._replace(shape=shape, stacked=stacked)
    found.append(described)
  return found


def _in_nnx_call(model: Any, example: Any, readings: Any, arguments: dict[str, Any]) -> list[Layer]:
  found: dict[str, Layer] = {}
  copy = nnx.clone(model)
  state = nnx.to_pure_dict(nnx.state(model))

  class Recording(nnx.Module):
    surgery_place: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
      path, kind = self.surgery_place
      reading = readings.get(kind)
      said = read(reading, self, bound(functools.partial(kind.__call__, self), *args, **kwargs))
      with _nnx.here(self):
        y = super().__call__(*args, **kwargs)
      layer = of_node(path, self, kind, reading)
      return _record(found, placed(layer, reading, _nnx.places(self, path), state), said, y)

  _nnx.mix_in(copy, readings, Recording)
  graphdef, values = nnx.split(copy)

  def call(values: Any, *args: Any, **kwargs: Any) -> Any:
    return nnx.merge(graphdef, values)(*args, **kwargs)

  run, arrays = split_static(call, values, *example, **arguments)
  return _counted(found, jax.make_jaxpr(run)(arrays))


def _record(found: dict[str, Layer], layer: Layer, said: Any, y: Any) -> Any:
  """Notes a call, and gives its result with a mark that the trace shows."""
  shapes = {"input": _shapes(said.x), "output": _shapes(y)}
  first = found.get(layer.path, layer._replace(**shapes))
  found[layer.path] = first._replace(evaluating=said.evaluating)
  (marked, *others), tree = jax.tree.flatten(y)
  return jax.tree.unflatten(tree, [checkpoint_name(marked, _MARK + layer.path), *others])


def _counted(found: dict[str, Layer], traced: Any) -> list[Layer]:
  """With the number of calls: what Flax traces twice is in the trace once."""
  calls = collections.Counter(_names(traced.jaxpr))
  return [v._replace(calls=calls[_MARK + path]) for path, v in found.items()]


def _names(jaxpr: Any) -> Iterator[str]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "name":
      yield equation.params["name"]
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _names(inner)


def _shapes(values: Any) -> Any:
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jax.numpy.result_type(a)), values)
