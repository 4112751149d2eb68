"""Adapt: statistics of the data at hand, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxbn._types import RunningStats
from jaxbn.surgery._foreign import Foreign
from jaxbn.surgery._layer import Layer
from jaxbn.surgery._network import Batches, Network, Population
from jaxbn.surgery._recalibrate import settle
from jaxbn.surgery._spread import Spread, to_stderr
from jaxbn.variants.prediction_time import interpolate


def adapt(
  model: Any,
  variables: Any,
  batches: Batches | Mapping[Any, Batches],
  *,
  prior: float = 0.0,
  mode: str = "training",
  inputs: Callable[[Any], tuple[Any, ...]] | None = None,
  foreign: Mapping[type, Foreign] | None = None,
  partial: bool = False,
  devices: Sequence[Any] | None = None,
  progress: Callable[[str], None] = to_stderr,
  **arguments: Any,
) -> Any:
  """The running statistics as a mixture of those that there are and those of the data at hand.

      mean = N / (N + n) mean_source + n / (N + n) mean_target        n examples, prior N
      var  = N / (N + n) var_source  + n / (N + n) var_target

  (Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
  adaptation"), with a prior of 0 those of the target alone (AdaBN: Li et al. 2016, "Revisiting
  batch normalization for practical domain adaptation"). No labels are needed. For a single batch
  at a time, without state, there is `jaxbn.linen.prediction_time`.

  Args:
    model: a module of Flax Linen or NNX.
    variables: of a Linen module all collections; of an NNX module None.
    batches: of the target, as in `recalibrate`; or a dict of such by domain.
    prior: N, how many examples the source's statistics count for; at least 0.
    mode: as in `recalibrate`.
    inputs: makes of a batch the tuple of arguments.
    foreign: batch norms that are not Flax's, by their class, and how to read them.
    partial: True leaves statistics as they are of which no layer was called, or none that is known.
    devices: over which a batch is spread, as far as its size allows; default, all local ones.
    progress: is told how far it is, in words; default, a line to a terminal.
    **arguments: further arguments of `module.apply`, or of the NNX module.

  Returns:
    For Linen the variables with other `batch_stats`; for NNX a copy of the model. Of a dict of
    batches a dict of these.

  Raises:
    TypeError, ValueError: as `recalibrate`; a negative prior; a prior, and statistics of the source
      that were never updated, or are not finite; a dict without domains.

  >>> import flax.linen as nn, jax.numpy as jnp, jaxbn.surgery
  >>> model = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
  >>> source = {"batch_stats": {"mean": jnp.array([5.0]), "var": jnp.array([4.0])}}
  >>> target = [jnp.array([[7.0], [9.0]])]
  >>> new = jaxbn.surgery.adapt(model, source, target, prior=2.0)
  >>> print(new["batch_stats"]["mean"], new["batch_stats"]["var"])
  [6.5] [2.5]
  """
  if isinstance(batches, Mapping):
    if not batches:
      raise ValueError("batches holds no domain: give {name: batches of it}.")
    same: Any = {"prior": prior, "mode": mode, "inputs": inputs, "foreign": foreign}
    same |= {"partial": partial, "devices": devices, "progress": progress, **arguments}
    return {domain: adapt(model, variables, own, **same) for domain, own in batches.items()}
  interpolate(prior)  # refuses what is no prior before any work
  network = Network(
    model, variables, inputs=inputs, foreign=foreign, partial=partial, arguments=arguments
  )

  def mixture(layer: Layer, source: RunningStats, found: Population) -> RunningStats:
    if prior and not all(jnp.isfinite(leaf).all() for leaf in source[:2]):
      raise ValueError(
        f"the statistics of {layer} have a NaN or an infinity, of which prior={prior} makes a part "
        "of the new ones: recalibrate them on data of the source, or give prior=0."
      )
    if prior and not (jnp.any(source.mean) or jnp.any(source.var != 1)):
      raise ValueError(
        f"the statistics of {layer} were never updated, their mean is 0 and their variance 1 "
        f"everywhere, so that prior={prior} has nothing to count: give those of the trained "
        "network, or prior=0."
      )
    target = found.moments[layer.path]
    count: Any = target.count
    if "num_domains" in layer.options:  # the examples are those of all domains
      count = count.sum(len(layer.stacked), keepdims=True)
    chosen = interpolate(prior, count / found.examples)(target, source)
    return RunningStats(chosen.mean, chosen.var)

  return settle(network, batches, mode, Spread(devices), progress, mixture)
