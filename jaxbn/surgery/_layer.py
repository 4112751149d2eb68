"""What is said of a layer that was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxbn.surgery import _linen, _nnx
from jaxbn.surgery._foreign import Foreign


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


def of_call(call: _linen.Call, reading: Foreign | None = None) -> Layer:
  """The layer of a call, before its variables are known."""
  own = reading.options_of(call.layer) if reading else _linen.options(call.layer, call.kind)
  return Layer("/".join(call.layer.path), call.kind, own)


def of_node(path: Any, layer: Any, kind: type, reading: Foreign | None = None) -> Layer:
  """The layer that a node of a graph is."""
  own = reading.options_of(layer) if reading else _nnx.options(layer, kind)
  return Layer("/".join(map(str, path)), kind, own)


def placed(layer: Layer, reading: Foreign | None, own: Any, whole: Any) -> Layer:
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


def nothing(done: str, model: Any, others: set[str], refused: Iterable[str]) -> str:
  """What an error says where no batch norm was found that is wanted."""
  start = f"nothing was {done} in this {type(model).__name__}: "
  if refused := sorted(path or "(the top)" for path in refused):
    return (
      f"{start}it has batch norms in {', '.join(refused)}, and where= or the rule takes none of "
      "these paths."
    )
  return (
    f"{start}it has no batch norm of Flax's or ours. There are "
    f"{', '.join(sorted(others)) or 'no other layers'}. If one is a batch norm, say how to read "
    "it: foreign={ItsClass: jaxbn.surgery.Foreign(...)}."
  )
