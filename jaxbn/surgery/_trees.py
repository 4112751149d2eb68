"""Variables as nested dicts, of Linen or of NNX, read and written by place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze

Place = tuple[Any, ...]


def tree_of(model: Any, variables: Any) -> Any:
  """The variables of a Linen module, which are given, or of an NNX module, which has them."""
  if isinstance(model, nn.Module):
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params", {}), Mapping):
      raise TypeError(
        "variables of a Linen module are the dict that init gives, with params and batch_stats; "
        f"these are of type {type(variables).__name__}."
      )
    return variables
  if variables is not None:
    raise TypeError("an NNX module has its variables in it: give None for variables.")
  return nnx.to_pure_dict(nnx.state(model))


def with_tree(model: Any, tree: Any) -> Any:
  """What a verb gives back: the variables of Linen, or a copy of an NNX module that has them."""
  if isinstance(model, nn.Module):
    return tree
  copy = nnx.clone(model)
  state = nnx.state(copy)
  nnx.replace_by_pure_dict(state, tree)
  nnx.update(copy, state)
  return copy


def get(tree: Any, place: Place) -> Any:
  """The value at a place, or None if there is none."""
  for key in place:
    if not isinstance(tree, Mapping) or key not in tree:
      return None
    tree = tree[key]
  return tree


def put(tree: Any, values: Mapping[Place, Any]) -> Any:
  """A tree like this with other values in some places."""
  if () in values:
    return values[()]
  inner: dict[Any, dict[Place, Any]] = {}
  for (key, *rest), value in values.items():
    inner.setdefault(key, {})[tuple(rest)] = value
  new = {**tree, **{key: put(tree.get(key, {}), below) for key, below in inner.items()}}
  return freeze(new) if isinstance(tree, FrozenDict) else new


def without(tree: Any, places: Iterable[Place]) -> Any:
  """A tree like this without the values in some places."""
  gone = set(places)

  def kept(tree: Any, place: Place) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    items = {k: kept(v, (*place, k)) for k, v in tree.items() if (*place, k) not in gone}
    return freeze(items) if isinstance(tree, FrozenDict) else items

  return kept(tree, ())


def with_statistics(
  tree: Any, names: Iterable[tuple[str, str]] = (("mean", "var"),), place: Place = ()
) -> Iterator[Place]:
  """Where there are a mean and a variance, of whatever names."""
  if isinstance(tree, Mapping):
    if any({*pair} <= tree.keys() for pair in names):
      yield place
    for key, below in tree.items():
      yield from with_statistics(below, names, (*place, key))
