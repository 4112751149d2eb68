"""Doctor: watches a network while it is trained, in any loop, and diagnoses it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxbn.diagnostics._collect import Programs, Run, collect
from jaxbn.diagnostics._faults import checked, findings, not_looked_for
from jaxbn.diagnostics._observe import refuse_complex
from jaxbn.diagnostics._report import Report, report_of, up_to
from jaxbn.diagnostics._watch import Moment, watch
from jaxbn.surgery._foreign import Foreign
from jaxbn.surgery._network import Batches, Network
from jaxbn.surgery._spread import Spread, to_stderr
from jaxbn.surgery._trees import tree_of

MOST = 256  # rows of a layer's history, more than a picture has pixels for


class Doctor:
  """A callback for any loop: notes what a report draws over training, and diagnoses.

  Call it after each step with the step's number, what the step gave, and its batch. Of every
  `every`-th the network's forward pass is run once more, in training mode; the 15th, 50th and 85th
  percentiles of one channel of each layer's input, and its running statistics, stay on the device
  until they are asked for, so that no step waits. (Figure 1 of Ioffe & Szegedy 2015.)

  It compiles once what it runs, and diagnoses again with other variables without compiling.

  Args:
    model: a module of Flax Linen or NNX.
    inputs: as of `jaxbn.diagnose`, and so are the others but `every`.
    foreign: batch norms that are not Flax's.
    every: how many steps apart. A note costs about a forward pass; `make doctor-cost` measures what
      that is of a training.
    before: an earlier report, whose history is continued.
    devices: over which a batch is spread; default, those that it is on, or else all local ones.
    progress: is told how far a diagnosis is.
    **arguments: further arguments of the call that evaluates.

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> from jaxbn.diagnostics import Doctor
  >>> model = nn.BatchNorm(momentum=0.5)
  >>> batches = 5 + jax.random.normal(jax.random.key(0), (8, 32, 3))
  >>> variables = model.init(jax.random.key(0), batches[0], use_running_average=True)
  >>> doctor = Doctor(model, every=1, use_running_average=True)
  >>> for step, x in enumerate(batches):
  ...   _, new = model.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
  ...   variables = {**variables, **new}
  ...   doctor(step, variables, x)
  >>> report = doctor.diagnose(variables, list(batches), steps=8)
  >>> [row["step"] for row in report.layers[0]["history"]], report.ok
  ([0, 1, 2, 3, 4, 5, 6, 7, 8], True)
  """

  def __init__(
    self,
    model: Any,
    *,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
    foreign: Mapping[type, Foreign] | None = None,
    every: int = 25,
    before: Report | None = None,
    devices: Sequence[Any] | None = None,
    progress: Callable[[str], None] = to_stderr,
    **arguments: Any,
  ):
    if every < 1:
      raise ValueError(f"every is {every}, but must be at least 1: so many steps are apart.")
    self.model, self.every = model, every
    self._network = functools.partial(
      Network, inputs=inputs, foreign=foreign, partial=True, arguments=arguments
    )
    self._devices, self._progress = devices, progress
    self._programs = Programs()
    self._watched: tuple[Network, Any] | None = None
    self._history = {v["path"]: list(v["history"]) for v in before.layers} if before else {}
    self._channels = {path: rows[0]["channel"] for path, rows in self._history.items() if rows}
    self._noted: list[tuple[int, dict[str, Moment]]] = []

  def __call__(self, step: int, variables: Any, batch: Any) -> None:
    """Notes a step, if it is one of every `every`.

    Args:
      step: its number.
      variables: of a Linen module all collections after that step; of an NNX module the module.
      batch: what the network was called with, as in `jaxbn.diagnose`.

    Raises:
      TypeError: variables that are not a dict, or not a module; a layer whose input is complex.
      ValueError: no batch norm.
    """
    if step % self.every:
      return
    model, variables = self._split(variables)
    if self._watched is None:
      network = self._network(model, variables)
      network.args(batch)
      refuse_complex(network.layers)
      self._channels = {v.path: np.int32(self._channels.get(v.path, -1)) for v in network.layers}
      self._watched = network, jax.jit(watch(network))
      network.variables = network.tree = {}  # not to keep what was trained so far
    network, look = self._watched
    args, tree = network.args(batch), tree_of(model, variables)
    spread = Spread(self._devices or whereabouts(args))
    moments = look(*spread(tree, self._channels, np.int32(step), args))
    self._channels = {path: moment.channel for path, moment in moments.items()}
    self._noted = thinned([*self._noted, (step, moments)])

  def diagnose(
    self,
    variables: Any,
    batches: Batches,
    *,
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
  ) -> Report:
    """`jaxbn.diagnose` with these variables, or this NNX module, and with the history so far.

    Arguments, results and errors are those of `jaxbn.diagnose`.
    """
    limits = checked(thresholds or {})
    network = self._network(*self._split(variables))
    run = Run(
      training, steps, batch_size, loss, valid, earlier, replicas, decay_mask, optimizer, gradients
    )
    facts = collect(network, batches, run, Spread(self._devices), self._progress, self._programs)
    unseen = not_looked_for(facts)
    report = report_of(facts, findings(facts, limits), unseen, self.history())
    self._history = {v["path"]: thinned(list(v["history"])) for v in report.layers}
    self._progress(f"diagnosed {len(facts.layers)} layers with {len(facts.rows)} batches\n")
    return report

  def history(self) -> dict[str, list[dict[str, Any]]]:
    """Of each layer, by its path, what was noted so far: rows in plain numbers."""
    noted, self._noted = jax.device_get(self._noted), []
    for step, moments in noted:
      for path, moment in moments.items():
        rows = self._history.get(path, [])
        self._history[path] = [*up_to(step, rows), moment.row(step)]
    return self._history

  def _split(self, variables: Any) -> tuple[Any, Any]:
    """The module and its variables, as those of Linen; of NNX both are one."""
    if isinstance(self.model, nn.Module):
      return self.model, variables
    if type(variables) is not type(self.model):
      raise TypeError(
        f"an NNX module has its variables in it: give the {type(self.model).__name__} itself (to "
        f"jaxbn.diagnose None for variables), not a {type(variables).__name__}."
      )
    return variables, None


def whereabouts(args: Any) -> list[Any] | None:
  """The devices that a batch is on; None if it is on none yet."""
  there = [a for a in jax.tree.leaves(args) if isinstance(a, jax.Array) and a.committed]
  return sorted(there[0].devices(), key=lambda device: device.id) if there else None


def thinned(rows: list[Any]) -> list[Any]:
  """Every second one, where there are too many."""
  return rows[::2] if len(rows) > MOST else rows
