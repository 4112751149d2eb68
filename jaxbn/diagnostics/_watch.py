"""What a step of training adds to the history of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn.diagnostics._observe import SAMPLED, by_channel, elements, some
from jaxbn.surgery._find import Layer
from jaxbn.surgery._foreign import Read
from jaxbn.surgery._network import Network
from jaxbn.surgery._population import observing
from jaxbn.surgery._trees import get

PERCENTILES = (15, 50, 85)  # those of figure 1 of Ioffe & Szegedy 2015


class Moment(NamedTuple):
  """One channel of a layer at one step; as the paper shows one unit.

  Attributes:
    channel: which; of all calls the same.
    percentiles: of its input in training mode.
    running_mean: at that step.
    running_std: likewise.
  """

  channel: Any
  percentiles: Any
  running_mean: Any
  running_std: Any

  def row(self, step: int | None) -> dict[str, Any]:
    """In plain numbers."""
    return {
      "step": step,
      "channel": int(self.channel),
      "percentiles": np.asarray(self.percentiles, float).tolist(),
      "running_mean": float(self.running_mean),
      "running_std": float(self.running_std),
    }


def middle(means: Any) -> Any:
  """The channel that is shown where none was so far: the one whose mean is in the middle."""
  return means.argsort()[means.size // 2]


Watch = Callable[[Any, Mapping[str, Any], Any, Sequence[Any]], dict[str, Moment]]


def watch(network: Network) -> Watch:
  """A function of variables, each layer's channel (below 0: the middle one), step and arguments."""

  def note(so_far: Any, said: Read, options: Mapping[str, Any], y: Any) -> tuple[Any, Any]:
    x = elements(said.x, options, so_far.shape[1:])
    return some(jnp.asarray(x, jnp.float32)), y

  run = observing(network.model, network.layers, network.foreign, False, network.arguments, note)

  def seen(tree: Any, channels: Mapping[str, Any], step: Any, args: Sequence[Any]) -> Any:
    none = {v.path: jnp.zeros((*v.stacked, SAMPLED, *v.shape)) for v in network.layers}
    _, rows = run(tree, none, step, args)
    return {v.path: moment(v, tree, rows[v.path], channels[v.path]) for v in network.layers}

  def moment(layer: Layer, tree: Any, rows: Any, channel: Any) -> Moment:
    x = by_channel(layer, rows)
    channel = jnp.where(channel < 0, middle(x.mean(0)), channel)
    mean, var = (
      jnp.ravel(get(tree, network.place(layer, name)))[channel].astype(jnp.float32)
      for name in ("mean", "var")
    )
    return Moment(channel, jnp.percentile(x[:, channel], jnp.array(PERCENTILES)), mean, var**0.5)

  return seen
