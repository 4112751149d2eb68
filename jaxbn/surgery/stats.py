"""A network's statistics as a whole: averaged, interpolated, reset, compared; with a count or not.

Each function takes the variables of a Linen module, its collection `batch_stats` alone, or an NNX
module, and gives back the same with other statistics; what was given stays. Whatever has a `mean`
beside a `var` is the statistics of a layer. All but `compare` run under jit.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn._share import merge
from jaxbn._track import init, update
from jaxbn._types import Moments, RunningStats
from jaxbn.surgery._collection import each, pairs
from jaxbn.surgery._count import add_count, drop_count

__all__ = [
  "Difference",
  "add_count",
  "average_replicas",
  "compare",
  "drop_count",
  "interpolate",
  "reset",
]


def __dir__() -> list[str]:
  return __all__


def average_replicas(statistics: Any, *, axis: int = 0) -> Any:
  """One set of statistics from those of replicas, along an axis: the moments of all their data.

  Of equally many elements each, so that a variance has in it how far the replicas' means lie apart
  (`jaxbn.merge`). Where statistics were synchronized these are one replica's.

  Args:
    statistics: with the replicas along an axis of each leaf, as `jax.pmap` leaves them.
    axis: which.

  Returns:
    The same without this axis of the statistics; other leaves stay.

  >>> import jax.numpy as jnp
  >>> from jaxbn.surgery import stats
  >>> both = {"norm": {"mean": jnp.array([[0.0], [2.0]]), "var": jnp.array([[1.0], [3.0]])}}
  >>> stats.average_replicas(both)["norm"]["var"].tolist()
  [3.0]
  """

  def averaged(state: RunningStats) -> RunningStats:
    parts = [jnp.moveaxis(leaf, axis, 0) for leaf in state[:2]]
    ones = [Moments(jnp.float32(1), m, v) for m, v in zip(*parts, strict=True)]
    whole = functools.reduce(merge, ones)
    count = None if state.count is None else jnp.max(state.count, axis)
    return RunningStats(whole.mean, whole.var, count)

  return each(averaged, statistics)


def interpolate(old: Any, new: Any, share: Any) -> Any:
  """(1 - share) old + share new, of means and of variances; the count of updates is the new one's.

  What an exponential moving average of the weights does to them, so that statistics go with it:
  take one minus its decay for the share.

  Args:
    old: statistics.
    new: those of the same layers.
    share: of the new ones, from 0 to 1; may be traced.

  Returns:
    Like old.

  Raises:
    ValueError: statistics of other layers, or with another shape.

  >>> import jax.numpy as jnp
  >>> from jaxbn.surgery import stats
  >>> old = {"norm": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}
  >>> new = {"norm": {"mean": jnp.ones(1), "var": jnp.ones(1)}}
  >>> stats.interpolate(old, new, 0.25)["norm"]["mean"].tolist()
  [0.25]
  """

  def between(a: RunningStats, b: RunningStats) -> RunningStats:
    # The old ones in the place of a batch, for 1 - share is near 1 and rounds little.
    moments = Moments(np.int32(1), a.mean, a.var)
    mixed = update(RunningStats(b.mean, b.var), moments, momentum=share)
    return mixed._replace(count=a.count if b.count is None else b.count)

  return each(between, old, new)


def reset(statistics: Any) -> Any:
  """Statistics as before the first update: mean 0, variance 1, count 0.

  Args:
    statistics: to be reset.

  Returns:
    The same, reset.

  >>> import jax.numpy as jnp
  >>> from jaxbn.surgery import stats
  >>> stats.reset({"norm": {"mean": jnp.ones(1), "var": jnp.zeros(1)}})
  {'norm': {'mean': Array([0.], dtype=float32), 'var': Array([1.], dtype=float32)}}
  """

  def start(state: RunningStats) -> RunningStats:
    return init(state.mean.shape, debias=state.count is not None)

  return each(start, statistics)


class Difference(NamedTuple):
  """How far two layers' statistics lie apart, in the worst channel.

  Attributes:
    mean: the distance of the means, in standard deviations of the first.
    low: the smallest ratio of the second's variance to the first's.
    high: the largest.
  """

  mean: float
  low: float
  high: float


class _Table(dict[str, Difference]):
  def __str__(self) -> str:
    width = max(map(len, self))
    head = f"{'layer':{width}}  mean (std)  var ratio\n"
    return head + "\n".join(
      f"{path:{width}}  {d.mean:10.3g}  {d.low:.3g} to {d.high:.3g}" for path, d in self.items()
    )


def compare(first: Any, second: Any) -> dict[str, Difference]:
  """How far the statistics of each layer lie apart; printed, a table.

  Args:
    first: statistics.
    second: those of the same layers.

  Returns:
    A dict of `Difference` by path.

  Raises:
    ValueError: statistics of other layers, or with another shape.

  >>> import jax.numpy as jnp
  >>> from jaxbn.surgery import stats
  >>> old = {"norm": {"mean": jnp.zeros(2), "var": jnp.full(2, 4.0)}}
  >>> new = {"norm": {"mean": jnp.ones(2), "var": jnp.array([4.0, 8.0])}}
  >>> print(stats.compare(old, new))
  layer  mean (std)  var ratio
  norm         0.5  1 to 2
  """
  table = _Table()
  for place, (a, b) in pairs(first, second):
    with np.errstate(divide="ignore", invalid="ignore"):
      distance: Any = np.abs(np.subtract(b.mean, a.mean)) / np.sqrt(a.var)
      ratio: Any = np.divide(b.var, a.var)
    table["/".join(map(str, place))] = Difference(
      *map(float, (distance.max(), ratio.min(), ratio.max()))
    )
  return table
