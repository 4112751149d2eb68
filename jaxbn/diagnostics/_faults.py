"""The faults that are looked for, in which order, and what each has to be told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxbn.diagnostics import _faults_of_layers as of_layers
from jaxbn.diagnostics import _faults_of_runs as of_runs
from jaxbn.diagnostics import _faults_of_statistics as of_statistics
from jaxbn.diagnostics._facts import Facts
from jaxbn.diagnostics._finding import Finding

# By its name each fault's function, in the order in which the equally bad are told.
FAULTS: dict[str, Callable[..., Any]] = {
  "nan": of_statistics.not_finite,
  "inverted-flag": of_layers.inverted_flag,
  "not-mutable": of_statistics.not_mutable,
  "frozen": of_layers.frozen,
  "half-precision": of_layers.half_precision,
  "never-updated": of_statistics.never_updated,
  "padding": of_layers.padding,
  "called-twice": of_layers.called_twice,
  "last-batch-of-one": of_layers.last_batch_of_one,
  "momentum-too-slow": of_statistics.momentum_too_slow,
  "replicas-differ": of_statistics.replicas_differ,
  "pytorch-momentum": of_statistics.pytorch_momentum,
  "noisy-statistics": of_layers.noisy_statistics,
  "exploding-scale": of_layers.exploding_scale,
  "epsilon-dominates": of_layers.epsilon_dominates,
  "weight-decay": of_runs.weight_decay,
  "gradient-growth": of_runs.gradient_growth,
  "dead-channels": of_layers.dead_channels,
  "other-domain": of_statistics.other_domain,
  "cancelled-bias": of_runs.cancelled_bias,
}


def faults() -> dict[str, Callable[..., Any]]:
  """What `diagnose` looks for: by its name each fault's function, whose arguments are thresholds.

  >>> import jaxbn.diagnostics
  >>> print(jaxbn.diagnostics.faults()["exploding-scale"].__doc__.split("\\n")[0])
  A scale so large that one channel, or one layer, is all that the rest of the network hears.
  """
  return dict(FAULTS)


def not_looked_for(facts: Facts) -> dict[str, str]:
  """The faults that could not be seen, each with the argument of `diagnose` that would show it."""
  gradients = facts.flow is not None
  told = {
    "not-mutable": (facts.moved is not None, "earlier="),
    "padding": (any(v.other_padding is not None for v in facts.layers), "valid="),
    "replicas-differ": (any(v.replicas is not None for v in facts.layers), "replicas="),
    "weight-decay": (facts.decayed is not None, "decay_mask= or optimizer="),
    "frozen": (any(v.trains is not None for v in facts.layers), "training="),
    "gradient-growth": (gradients, "gradients=True"),
    "cancelled-bias": (gradients, "gradients=True"),
  }
  return {fault: needed for fault, (is_told, needed) in told.items() if not is_told}


def findings(facts: Facts, thresholds: Mapping[str, Mapping[str, float]]) -> list[Finding]:
  """All faults, the worst first; of the equally bad in the order of FAULTS, and of the layers."""
  found = [f for name, find in FAULTS.items() for f in find(facts, **thresholds.get(name, {}))]
  return sorted(found, key=lambda f: f.rank)


def checked(thresholds: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
  for fault, given in thresholds.items():
    if fault not in FAULTS:
      raise ValueError(f"thresholds has {fault!r}, but the faults are {', '.join(FAULTS)}.")
    known = set(inspect.signature(FAULTS[fault]).parameters) - {"facts"}
    for name in given.keys() - known:
      raise ValueError(
        f"thresholds[{fault!r}] has {name!r}, but that fault has "
        f"{', '.join(sorted(known)) or 'none'}."
      )
  return thresholds
