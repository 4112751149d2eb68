"""diagnose: what is wrong with the batch norms of a network, where, and what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxbn.diagnostics import _faults_of_layers as of_layers
from jaxbn.diagnostics import _faults_of_runs as of_runs
from jaxbn.diagnostics import _faults_of_statistics as of_statistics
from jaxbn.diagnostics._collect import Run, collect
from jaxbn.diagnostics._facts import Facts
from jaxbn.diagnostics._finding import Finding
from jaxbn.diagnostics._report import Report, report_of
from jaxbn.surgery._foreign import Foreign
from jaxbn.surgery._network import Batches, Network
from jaxbn.surgery._spread import Spread, to_stderr

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


def diagnose(
  model: Any,
  variables: Any,
  batches: Batches,
  *,
  inputs: Callable[[Any], tuple[Any, ...]] | None = None,
  foreign: Mapping[type, Foreign] | None = None,
  training: Mapping[str, Any] | None = None,
  steps: int | None = None,
  batch_size: int | None = None,
  loss: Callable[[Any, Any], Any] | None = None,
  valid: Callable[[Any], Any] | None = None,
  earlier: Any = None,
  replicas: Any = None,
  decay_mask: Any = None,
  optimizer: Any = None,
  gradients: bool = True,
  thresholds: Mapping[str, Mapping[str, float]] | None = None,
  before: Report | None = None,
  devices: Sequence[Any] | None = None,
  progress: Callable[[str], None] = to_stderr,
  **arguments: Any,
) -> Report:
  """Why evaluation is bad: what is wrong with the batch norms, where, how sure, and what to do.

  The network is run on the batches with its batch norms in training and in evaluation mode, and
  once differentiated. It is not changed. Eight batches or more, of training data of the size that
  it was trained with, let it tell noise from faults. What it is not told it does not look for.

  Args:
    model: a module of Flax Linen or NNX; of NNX in the mode in which it is evaluated.
    variables: of a Linen module all collections; of an NNX module None.
    batches: what the network is called with: an array, or a tuple of arguments, per batch.
    inputs: makes of a batch the tuple of arguments, such as `lambda batch: (batch["image"],)`.
    foreign: batch norms that are not Flax's, by their class, and how to read them.
    training: arguments that are others in training, such as {"train": True}; default, the reverse
      of those flags among the arguments that are called train, training, is_training,
      deterministic or use_running_average. Of an NNX module `train()` is called, too.
    steps: how many the network was trained for: how much of initial statistics must be left.
    batch_size: examples that are normalized together in training; default, those of the batches.
    loss: of the output and the batch, for the gradients; default, a random sum of the outputs.
    valid: gives of a batch which elements exist, along the first axes of the arguments: what is
      padding is changed, to see whether the statistics change.
    earlier: the variables, or the NNX module, of an earlier step.
    replicas: the variables with an axis of replicas in front; at least their statistics.
    decay_mask: which parameters are decayed, as for `optax.add_decayed_weights`.
    optimizer: or an optimizer of optax: what it does to parameters whose gradient is 0.
    gradients: False leaves out what needs a derivative, the longest part to compile.
    thresholds: by fault the arguments of its function that are not to be the defaults, such as
      {"noisy-statistics": {"elements": 16}}; `jaxbn.diagnostics.faults()` has the functions, whose
      docstrings say why a threshold is what it is.
    before: the report of an earlier step, whose history is continued.
    devices: over which a batch is spread, as far as its size allows; default, all local ones.
    progress: is told how far it is, in words; default, a line to a terminal.
    **arguments: further arguments of `module.apply` in evaluation (`train=False`), or of the NNX
      module.

  Returns:
    A `Report`: print it.

  Raises:
    TypeError: variables that are not a dict.
    ValueError: no batches; no batch norm; a threshold that is none.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
  >>> model = nn.BatchNorm(use_running_average=True)
  >>> x = 5 + jax.random.normal(jax.random.key(0), (4, 32, 3))
  >>> report = jaxbn.diagnose(model, model.init(jax.random.key(0), x[0]), list(x))
  >>> report.findings[0].fault, report.ok
  ('never-updated', False)
  """
  limits = _checked(thresholds or {})
  network = Network(
    model, variables, inputs=inputs, foreign=foreign, partial=True, arguments=arguments
  )
  run = Run(
    training, steps, batch_size, loss, valid, earlier, replicas, decay_mask, optimizer, gradients
  )
  facts = collect(network, batches, run, Spread(devices), progress)
  report = report_of(facts, findings(facts, limits), before)
  progress(f"diagnosed {len(facts.layers)} layers with {len(facts.rows)} batches\n")
  return report


def faults() -> dict[str, Callable[..., Any]]:
  """What `diagnose` looks for: by its name each fault's function, whose arguments are thresholds.

  >>> import jaxbn.diagnostics
  >>> print(jaxbn.diagnostics.faults()["exploding-scale"].__doc__.split("\\n")[0])
  A scale so large that one channel, or one layer, is all that the rest of the network hears.
  """
  return dict(FAULTS)


def findings(facts: Facts, thresholds: Mapping[str, Mapping[str, float]]) -> list[Finding]:
  """All faults, the worst first; of the equally bad in the order of FAULTS, and of the layers."""
  found = [f for name, find in FAULTS.items() for f in find(facts, **thresholds.get(name, {}))]
  return sorted(found, key=lambda f: f.rank)


def _checked(thresholds: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
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
