"""The leaf `count` beside a mean: added to statistics and taken away."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxbn import _checks
from jaxbn._track import without_initial_values
from jaxbn._types import RunningStats
from jaxbn.surgery import _nnx
from jaxbn.surgery._collection import each, pairs
from jaxbn.surgery._trees import without


def add_count(statistics: Any, updates: Any, *, momentum: float | None = None) -> Any:
  """With the leaf `count` beside each mean: what debias=True and momentum=None need to train on.

  Args:
    statistics: without it, such as those of a checkpoint of Flax's layers.
    updates: how many each layer has had; 0 where the next one shall replace them.
    momentum: of the layers that tracked them, without `debias`: the initial mean 0 and variance 1,
      which still weigh momentum^updates, are taken out. None leaves mean and var as they are.

  Returns:
    The same with it.

  Raises:
    ValueError: there is one already; a momentum out of range, or with updates=0.

  >>> import jax.numpy as jnp
  >>> from jaxbn.surgery import stats
  >>> stats.add_count({"norm": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}, 100)["norm"]["count"]
  Array([100.], dtype=float32)
  """

  if momentum is not None:
    _checks.momentum_in_range(momentum, debias=True)
    if updates < 1:
      raise ValueError(f"updates={updates} with a momentum: there is nothing but initial values.")

  def counted(state: RunningStats) -> RunningStats:
    if state.count is not None:
      raise ValueError("there is a leaf count already: drop_count takes it away.")
    if momentum is not None:
      state = without_initial_values(state, momentum, updates)
    return state._replace(count=jnp.full(state.mean.shape, updates, jnp.float32))

  if isinstance(statistics, nnx.Module):  # a variable more
    statistics = nnx.clone(statistics)
    for _, layer, _ in _nnx.layers(statistics):
      if not hasattr(layer, "count"):
        new = counted(RunningStats(layer.mean[...], layer.var[...]))
        layer.mean[...], layer.var[...], layer.count = new.mean, new.var, nnx.BatchStat(new.count)
    return statistics
  return each(counted, statistics)


def drop_count(statistics: Any) -> Any:
  """Without the leaf `count`, as Flax's layers have them.

  Args:
    statistics: with or without it.

  Returns:
    The same without it.

  >>> import jaxbn
  >>> from jaxbn.surgery import stats
  >>> stats.drop_count({"norm": jaxbn.init(1, debias=True)._asdict()})["norm"].keys()
  dict_keys(['mean', 'var'])
  """
  if isinstance(statistics, nnx.Module):
    statistics = nnx.clone(statistics)
    for _, layer, _ in _nnx.layers(statistics):
      if hasattr(layer, "count"):
        del layer.count
    return statistics
  places = [(*place, "count") for place, _ in pairs(statistics)]
  return without(statistics, places)
