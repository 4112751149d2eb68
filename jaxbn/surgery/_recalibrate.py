"""Recalibrate: running statistics become those of all the data, exactly."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._track import init, update
from jaxbn._types import RunningStats
from jaxbn.surgery._foreign import Foreign
from jaxbn.surgery._layer import Layer
from jaxbn.surgery._network import Batches, Network, Population
from jaxbn.surgery._spread import Spread, to_stderr

_MOST_PASSES = 100


def recalibrate(
  model: Any,
  variables: Any,
  batches: Batches,
  *,
  mode: str = "training",
  inputs: Callable[[Any], tuple[Any, ...]] | None = None,
  foreign: Mapping[type, Foreign] | None = None,
  partial: bool = False,
  devices: Sequence[Any] | None = None,
  progress: Callable[[str], None] = to_stderr,
  **arguments: Any,
) -> Any:
  """The running statistics of all batch norms, as the moments of all that the batches hold.

  Wanted where they no longer fit: after an average of weights (EMA, SWA), a change of resolution,
  of precision, of data. They are those of all elements together, of batches of any sizes, and not
  an average over batches (precise batch norm: Wu & Johnson 2021, section 3; PyTorch's `update_bn`).

  In training mode each layer normalizes by its batch, as the layers before it did while the network
  was trained; one pass does it. In evaluation mode each normalizes by the statistics found, so that
  they are exactly those of what evaluation sees: a layer is right when those before it are, which
  takes a pass for each layer that stands behind another, and ends when nothing changes any more.
  The statistics of a layer that is called twice depend on themselves: there it takes more passes.

  Batch norms only are put into this mode: for the rest say it yourself (`train=False`; in NNX
  `model.eval()` before), so that dropout is off unless you want it.

  Args:
    model: a module of Flax Linen or NNX.
    variables: of a Linen module all collections; of an NNX module None.
    batches: what the network is called with: an array, or a tuple of arguments, per batch. For
      evaluation mode something that can be gone through again: a list, or a function that gives an
      iterator.
    mode: "training" or "evaluation".
    inputs: makes of a batch the tuple of arguments, such as `lambda batch: (batch["image"],)`.
    foreign: batch norms that are not Flax's, by their class, and how to read them.
    partial: True leaves statistics as they are of which no layer was called, or none that is known.
    devices: over which a batch is spread, as far as its size allows; default, all local ones.
    progress: is told how far it is, in words; default, a line to a terminal.
    **arguments: further arguments of `module.apply` (`train=False`, `method=`, `rngs=`), or of the
      NNX module.

  Returns:
    For Linen the variables with other `batch_stats`; for NNX a copy of the model. A layer's leaf
    `count`, if it has one, is the number of batches. Layers with `unbiased` get n / (n - 1) times
    the variance.

  Raises:
    TypeError: variables that are not a dict.
    ValueError: no batches, or in evaluation mode an iterator, which can be gone through once; no
      batch norm; statistics without a layer that is known, or the reverse; a NaN or an infinity in
      what a layer is given; statistics that still change after 100 passes.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.surgery
  >>> model = nn.BatchNorm(use_running_average=True)
  >>> variables = model.init(jax.random.key(0), jnp.ones((4, 1)))
  >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[7.0]])]
  >>> new = jaxbn.surgery.recalibrate(model, variables, batches)
  >>> print(new["batch_stats"]["mean"])
  [3.]
  """
  network = Network(
    model, variables, inputs=inputs, foreign=foreign, partial=partial, arguments=arguments
  )

  def as_statistics(layer: Layer, old: RunningStats, found: Population) -> RunningStats:
    # A channel without an element keeps what it had, if that is a number.
    moments = found.moments[layer.path]
    start = init(moments.mean.shape)
    kept = [jnp.where(jnp.isfinite(v), v, s) for v, s in zip(old[:2], start[:2], strict=True)]
    unbiased = layer.options.get("unbiased", False)
    return update(RunningStats(*kept), moments, momentum=0.0, unbiased=unbiased)

  return settle(network, batches, mode, Spread(devices), progress, as_statistics)


def settle(
  network: Network,
  batches: Batches,
  mode: str,
  spread: Spread,
  progress: Callable[[str], None],
  statistics: Callable[[Layer, RunningStats, Population], RunningStats],
) -> Any:
  """The network with statistics made of what its layers are given, in the passes that it takes."""
  if mode not in ("training", "evaluation"):
    raise ValueError(f"mode={mode!r} is neither 'training' nor 'evaluation'.")
  if mode == "evaluation" and not callable(batches) and iter(batches) is batches:
    raise ValueError(
      "batches is an iterator, which can be gone through once, but mode='evaluation' takes several "
      "passes: give a list, or a function that makes an iterator, such as lambda: loader(...)."
    )
  evaluating = mode == "evaluation"
  given: dict[str, RunningStats] = {}
  done, changing = 0, True
  while changing:
    say = functools.partial(_say, progress, f"pass {done + 1}")
    found = network.population(batches, evaluating, spread, say)
    before = network.states()
    given = given or before
    new = {v.path: statistics(v, given[v.path], found) for v in network.layers}
    network.set_states(new, found.batches)
    done += 1
    changing = evaluating and not _are_equal(before, network.states())
    if changing and done >= sum(math.prod(layer.stacked) for layer in network.layers):
      changing = _goes_on(network.layers, done)
  network.refuse_not_finite(found.moments)
  progress(f"done in {done} passes over {found.batches} batches\n")
  return network.result()


def _say(progress: Callable[[str], None], about: str, text: str) -> None:
  progress(f"{about}, {text}")


def _are_equal(before: Any, after: Any) -> bool:
  """To rounding."""
  old, new = jax.tree.leaves(before), jax.tree.leaves(after)
  near = 4 * max(float(jnp.finfo(v.dtype).eps) for v in new)
  return all(jnp.allclose(a, b, rtol=near, atol=near) for a, b in zip(old, new, strict=True))


def _goes_on(layers: Sequence[Layer], done: int) -> bool:
  """Whether there are passes to come: where each layer is called once, none is needed."""
  again = [layer for layer in layers if layer.calls > 1]
  if again and done >= _MOST_PASSES:
    raise ValueError(
      f"the statistics of {again[0]}, which is called {again[0].calls} times, depend on themselves "
      f"and still change after {done} passes: use mode='training'."
    )
  return bool(again)
