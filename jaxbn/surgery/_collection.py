"""Statistics of a whole network, layer by layer, without the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from jaxbn._types import RunningStats
from jaxbn.surgery._trees import Place, get, put, with_statistics, with_tree


def _tree(statistics: Any) -> Any:
  if isinstance(statistics, nnx.Module):
    return nnx.to_pure_dict(nnx.state(statistics))
  if not isinstance(statistics, Mapping):
    raise TypeError(
      "statistics are the variables of a Linen module, its batch_stats, or an NNX module; these "
      f"are of type {type(statistics).__name__}."
    )
  return statistics


def pairs(*statistics: Any) -> Iterator[tuple[Place, tuple[RunningStats, ...]]]:
  """Layer by layer the statistics of each."""
  trees = [_tree(s) for s in statistics]
  places = [list(with_statistics(tree)) for tree in trees]
  if not places[0]:
    raise ValueError(
      "there is no mean beside a var in these statistics, which have "
      f"{', '.join(map(str, trees[0])) or 'nothing'}: give batch_stats, or all variables."
    )
  for other in places[1:]:
    for place in {*places[0]} ^ {*other}:
      raise ValueError(
        f"there are statistics in {'/'.join(map(str, place))} of one network and not of the other: "
        "give those of the same layers."
      )
  for place in places[0]:
    states = [
      RunningStats(*(get(tree, (*place, name)) for name in RunningStats._fields)) for tree in trees
    ]
    shapes = [np.shape(state.mean) for state in states]
    if len({*shapes}) > 1:
      raise ValueError(
        f"the means in {'/'.join(map(str, place))} have shapes {shapes[0]} and {shapes[1]}: give "
        "statistics of the same layers."
      )
    yield place, tuple(states)


def each(change: Callable[..., RunningStats], *statistics: Any) -> Any:
  """The first statistics, changed layer by layer; leaves keep their dtypes."""
  values: dict[Place, Any] = {}
  for place, states in pairs(*statistics):
    for name, value in change(*states)._asdict().items():
      if value is not None:
        was = getattr(states[0], name)
        values[*place, name] = value if was is None else value.astype(was.dtype)
  new = put(_tree(statistics[0]), values)
  return with_tree(statistics[0], new) if isinstance(statistics[0], nnx.Module) else new
