"""What is known of a network and of its run: what the faults are looked for in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxbn._share import merge
from jaxbn._types import Moments, RunningStats
from jaxbn.diagnostics._observe import Flow, Seen
from jaxbn.diagnostics.measures import batch_noise, covariate_shift
from jaxbn.surgery._layer import Layer

_PIECE = 512  # channels


def _in_pieces(function: Callable[..., Any]) -> Callable[..., Any]:
  """A function of each channel, compiled once for whatever number of them; the last axis is theirs.

  To compile it takes a tenth of a second, and a network has layers of many widths.
  """
  compiled = jax.jit(function)

  def run(*given: Any, **options: Any) -> Any:
    channels = jax.tree.leaves(given)[0].shape[-1]

    def piece(a: Any, start: int) -> np.ndarray:
      filled = np.zeros((*a.shape[:-1], _PIECE), np.float32)
      shown = a[..., start : start + _PIECE]
      filled[..., : shown.shape[-1]] = shown
      return filled

    starts = range(0, channels, _PIECE)
    pieces = [
      compiled(*jax.tree.map(functools.partial(piece, start=i), given), **options) for i in starts
    ]
    return jax.tree.map(lambda *v: np.concatenate(v, -1)[..., :channels], *pieces)

  return run


_merge, _shift, _noise = _in_pieces(merge), _in_pieces(covariate_shift), _in_pieces(batch_noise)


@dataclasses.dataclass(frozen=True)
class LayerFacts:
  """One layer, its statistics flat: of several layers in one, as inside nn.scan, all channels.

  Attributes:
    layer: where it is, its options, how often it was called.
    running: its running statistics.
    dtype: theirs.
    scale: or None.
    bias: or None.
    training: by batch, what was seen of it in training mode.
    evaluation: likewise in evaluation mode.
    trains: whether it normalizes by the batch when the network is trained; None: not known.
    earlier: its running statistics at an earlier step, or None.
    replicas: those of each replica, along a first axis, or None.
    gradient: the squared norm of the gradient at its output, by channel, or None.
    other_padding: the moments of its first input with something else in the padding, or None.
  """

  layer: Layer
  running: RunningStats
  dtype: np.dtype
  scale: np.ndarray | None
  bias: np.ndarray | None
  training: Sequence[Seen]
  evaluation: Sequence[Seen]
  trains: bool | None = None
  earlier: RunningStats | None = None
  replicas: RunningStats | None = None
  gradient: np.ndarray | None = None
  other_padding: Moments | None = None

  @property
  def epsilon(self) -> float:
    return float(self.layer.options.get("epsilon", 1e-5))

  @property
  def momentum(self) -> float | None:
    """None where it is a cumulative average, or not known."""
    momentum = self.layer.options.get("momentum")
    return None if momentum is None else float(momentum)

  @functools.cached_property
  def data(self) -> Moments:
    """The moments of all that it was given in training mode."""
    merged = functools.reduce(_merge, (seen.given for seen in self.training))
    values: Any = [np.asarray(v, np.float64) for v in merged]
    return Moments(*values)

  @functools.cached_property
  def batches(self) -> Moments:
    """Those of each batch, along a first axis."""
    given: Any = zip(*(seen.given for seen in self.training), strict=True)
    values: Any = [np.stack(v).astype(np.float64) for v in given]
    return Moments(*values)

  @functools.cached_property
  def is_finite(self) -> bool:
    """Whether all that it was given in training mode is."""
    return bool(np.isfinite(self.batches.mean).all() and np.isfinite(self.batches.var).all())

  @functools.cached_property
  def drift(self) -> float:
    """How much information evaluation loses to wrong running statistics, in nats per element."""
    return self.lost(self.running.mean, self.running.var)

  @functools.cached_property
  def drift_of_a_batch(self) -> float:
    """Likewise what training loses to the noise of a batch's statistics; 0 of one batch."""
    several = len(self.training)
    _, means, variances = self.batches
    lost = [self.lost(mean, var) for mean, var in zip(means, variances, strict=True)]
    return float(np.mean(lost)) * several / max(several - 1, 1)

  def lost(self, mean: Any, var: Any) -> float:
    """What the data lose to normalization by these: see `covariate_shift`; mean over channels."""
    return lost(RunningStats(mean, var), self.data, self.epsilon)

  @functools.cached_property
  def noise(self) -> np.ndarray:
    """Variance of a batch's mean over that of an element: one over how many are independent.

    Of two batches or more.
    """
    return np.square(np.asarray(_noise(self.batches).mean, np.float64))

  @property
  def rounding(self) -> float:
    """Standard error of a batch's mean by rounding, relative: of n roundings in a random order."""
    return float(np.finfo(np.float32).eps * np.sqrt(np.max(self.batches.count)))

  @functools.cached_property
  def distance(self) -> float:
    """Between what it gives in training and in evaluation mode, in standard deviations."""
    pairs = zip(self.training, self.evaluation, strict=True)
    square = np.mean([np.mean((t.y - e.y) ** 2) for t, e in pairs])
    spread = np.mean([np.var(t.y, axis=0).mean() for t in self.training])
    return float(np.sqrt(square / spread)) if spread > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Facts:
  """A network, and what was said of its run.

  Attributes:
    layers: in the order of their first calls.
    kernels: by the place of each bias that is not a batch norm's, that of the kernel beside it.
    flow: gradients, or None.
    unit: the rounding of the parameters' dtype.
    decayed: the places of the parameters that are decayed, or None where that is not known.
    rows: the number of examples of each batch.
    steps: how many the run has done, or None.
    batch_size: examples of a training batch, or None where it is that of the batches.
    moved: whether parameters changed since the earlier step; None: there is none.
  """

  layers: Sequence[LayerFacts]
  kernels: Mapping[tuple[Any, ...], tuple[Any, ...]]
  flow: Flow | None
  unit: float
  decayed: Sequence[tuple[Any, ...]] | None
  rows: Sequence[int]
  steps: int | None = None
  batch_size: int | None = None
  moved: bool | None = None


def lost(used: Any, true: Any, epsilon: float) -> float:
  """In nats per element, mean over channels."""
  return float(np.mean(_shift(used, true, epsilon=epsilon)))
