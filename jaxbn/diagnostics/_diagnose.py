"""diagnose: what is wrong with the batch norms of a network, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxbn.diagnostics._doctor import Doctor
from jaxbn.diagnostics._report import Report
from jaxbn.surgery._foreign import Foreign
from jaxbn.surgery._network import Batches
from jaxbn.surgery._spread import to_stderr


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
  it was trained with, let it tell noise from faults. What it is not told it does not look for, and
  the report says so: without `earlier` not for lost updates (not-mutable) of statistics that were
  good once, without `valid` not for padding, without `replicas` not for devices that differ.

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
      padding is changed, to see whether the statistics change. Needed to find padding.
    earlier: the variables, or the NNX module, of an earlier step: statistics that are the same now,
      while parameters are others, are not updated. Needed to find that.
    replicas: the variables with an axis of replicas in front; at least their statistics. Needed to
      find differences, except where arrays on several devices are said to be the same.
    decay_mask: which parameters are decayed, as for `optax.add_decayed_weights`. This or
      `optimizer` is needed to find weight decay on scale or bias.
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
    TypeError: variables that are not a dict; a layer whose input is complex.
    ValueError: no batches; no batch norm; a threshold that is none.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
  >>> model = nn.BatchNorm(use_running_average=True)
  >>> x = 5 + jax.random.normal(jax.random.key(0), (4, 32, 3))
  >>> report = jaxbn.diagnose(model, model.init(jax.random.key(0), x[0]), list(x))
  >>> report.findings[0].fault, report.ok
  ('never-updated', False)
  """
  doctor = Doctor(
    model,
    inputs=inputs,
    foreign=foreign,
    before=before,
    devices=devices,
    progress=progress,
    **arguments,
  )
  return doctor.diagnose(
    model if variables is None else variables,
    batches,
    training=training,
    steps=steps,
    batch_size=batch_size,
    loss=loss,
    valid=valid,
    earlier=earlier,
    replicas=replicas,
    decay_mask=decay_mask,
    optimizer=optimizer,
    gradients=gradients,
    thresholds=thresholds,
  )
