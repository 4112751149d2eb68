"""The one finder: which layers a network has, by one abstract run of it."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import errors, nnx
from jax.ad_checkpoint import checkpoint_name

from jaxbn.surgery import _linen, _nnx
from jaxbn.surgery._foreign import Foreign, bound, read

BATCH_NORMS = (*_linen.BATCH_NORMS, *_nnx.BATCH_NORMS)
_MARK = "jaxbn.surgery.find "


class Layer(NamedTuple):
  """A layer that was found.

  Attributes:
    path: where it is, as "block/norm"; of an NNX layer in several places, one of them.
    kind: its class: the one of Flax or of jaxbn that a subclass comes from, or a foreign one.
    options: the arguments of that class's constructor, such as axis, epsilon, momentum, axis_name.
    variables: by name (mean, var, scale, bias, ...) where each is: for Linen keys such as
      ("params", "block", "norm", "scale"), for NNX without the collection.
    shape: of the statistics as the layer sees them; () of a layer that has none.
    stacked: further axes that they have in the network, as inside nn.scan.
    calls: how often it was called; of a graph that was not run, 0.
    evaluating: whether its last call used running statistics; None if that is not known.
    input: shape and dtype of what its first call was given, or None.
    output: likewise of what that gave.
  """

  path: str
  kind: type
  options: Mapping[str, Any]
  variables: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
  shape: tuple[int, ...] = ()
  stacked: tuple[int, ...] = ()
  calls: int = 0
  evaluating: bool | None = None
  input: Any = None
  output: Any = None

  def __repr__(self) -> str:
    return f"{self.kind.__name__} {self.path or '(the top)'}"


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

  >>> import flax.linen as nn, jax.numpy as jnp, jaxbn.surgery
  >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
  >>> jaxbn.surgery.find(model, jnp.zeros((8, 3)))
  [BatchNorm layers_1]
  """
  readings: dict[type, Foreign | None] = {**dict.fromkeys(kinds), **(foreign or {})}
  if isinstance(model, nn.Module):
    return _in_linen(model, example, variables, readings, arguments)
  if example or arguments:
    return _in_nnx_call(model, example, readings, arguments)
  return _in_nnx_graph(model, readings)


def _in_linen(
  model: Any, example: Any, variables: Any, readings: Any, arguments: dict[str, Any]
) -> list[Layer]:
  if variables is None:
    init, arrays = split_static(model.init, jax.random.key(0), *example, **arguments)
    variables = jax.eval_shape(init, arrays)
  found: dict[str, Layer] = {}
  log: list[Any] = []

  def around(call: _linen.Call) -> Any:
    reading = readings.get(call.kind)
    said = read(reading, call.layer, call.arguments)
    before, path = len(log), call.layer.path
    own = _linen.options(call.layer, call.kind)
    where = _linen.here(own)
    y = call.run() if where == own else call.run_instead(call.kind, where)
    if path in log[before:]:  # what was called in its place
      return y
    log.append(path)
    return _record(
      found, _placed(of_call(call, reading), reading, call.places(), variables), said, y
    )

  def apply(mutable: Any) -> list[Layer]:
    found.clear()
    with _linen.intercepting(around, readings, nested=True):
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
    described = _placed(of_node(path, layer, kind, reading), reading, own, state)
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
      return _record(found, _placed(layer, reading, _nnx.places(self, path), state), said, y)

  _nnx.mix_in(copy, readings, Recording)
  graphdef, values = nnx.split(copy)

  def call(values: Any, *args: Any, **kwargs: Any) -> Any:
    return nnx.merge(graphdef, values)(*args, **kwargs)

  run, arrays = split_static(call, values, *example, **arguments)
  return _counted(found, jax.make_jaxpr(run)(arrays))


def of_call(call: _linen.Call, reading: Foreign | None = None) -> Layer:
  """The layer of a call, before its variables are known."""
  own = reading.options_of(call.layer) if reading else _linen.options(call.layer, call.kind)
  return Layer("/".join(call.layer.path), call.kind, own)


def of_node(path: Any, layer: Any, kind: type, reading: Foreign | None = None) -> Layer:
  """The layer that a node of a graph is."""
  own = reading.options_of(layer) if reading else _nnx.options(layer, kind)
  return Layer("/".join(map(str, path)), kind, own)


def _placed(layer: Layer, reading: Foreign | None, own: Any, whole: Any) -> Layer:
  """With its variables, given by place and value, and with all of the network's."""
  layer = layer._replace(variables={name: place for name, (place, _) in own.items()})
  mean = "mean" if reading is None else reading.name("mean")
  if mean not in own:
    return layer
  place, value = own[mean]
  for key in place:
    whole = whole[key]
  shape = np.shape(value)
  return layer._replace(shape=shape, stacked=whole.shape[: whole.ndim - len(shape)])


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


def split_static(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
  """The function of the arrays among these arguments, and those; flags and names are left."""
  leaves, tree = jax.tree.flatten((args, kwargs))
  is_array = [hasattr(v, "dtype") and not isinstance(v, np.generic) for v in leaves]

  def of_arrays(arrays: list[Any]) -> Any:
    rest = iter(arrays)
    filled = [next(rest) if on else v for on, v in zip(is_array, leaves, strict=True)]
    args, kwargs = jax.tree.unflatten(tree, filled)
    return function(*args, **kwargs)

  return of_arrays, [v for on, v in zip(is_array, leaves, strict=True) if on]


def nothing(done: str, model: Any, others: set[str]) -> str:
  """What an error says where no batch norm was found that is wanted."""
  return (
    f"nothing was {done} in this {type(model).__name__}: it has no batch norm of Flax's or ours "
    f"that is wanted. There are {', '.join(sorted(others)) or 'no other layers'}. If one is a "
    "batch norm, say how to read it: foreign={ItsClass: jaxbn.surgery.Foreign(...)}."
  )
