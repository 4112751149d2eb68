"""Checkpoints: the state and the input's position, written by Orbax behind the training's back.

A checkpoint appears under its final name only when it is complete and sealed (see
`examples.integrity`), and an older one is deleted only after that, so there is no moment at which a
crash could leave none. One that is damaged later is set aside, never deleted, and the one before it
is used. With several processes, process 0 writes and all read: they share the directory.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from examples import hosts, integrity
from examples.settings import Failure, UserError
from examples.steps import TrainState

# Where the input's position was before checkpoints were sealed; those are used as they are.
EARLIER = Path("input", "process_0-of-1.json")


class Checkpoints:
  """The checkpoints of one run directory; use as a context, so that the last one gets written."""

  def __init__(self, directory: Path, keep: int, say: Callable[[str], Any] = print):
    """Opens `directory`, keeping the latest `keep` checkpoints.

    What is damaged is set aside first, so that it neither counts among those kept nor takes the
    place of a checkpoint of the same step; `say` is told.
    """
    self._directory = directory
    self._saving = 0
    hosts.in_turn(lambda: _set_aside_damaged(directory, say))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=True,
      async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
    )
    handlers = ocp.handlers.create_default_handler_registry(
      state=ocp.StandardCheckpointHandler(), input=ocp.JsonCheckpointHandler()
    )
    with self._writing():
      self._manager = ocp.CheckpointManager(
        directory.absolute(), options=options, handler_registry=handlers
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if isinstance(error, Failure) or (error and jax.process_count() > 1):
      return  # the last save failed, or waits for a process that is gone
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.close()

  def latest(self) -> int | None:
    """The step of the latest checkpoint; None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves, unless `step` is saved already.

    Args:
      step: the number of steps done.
      state: on the host, in memory that nobody overwrites: it is written later.
      batches: the iterator, after the batch of that step.

    Raises:
      Failure: this or the last one could not be written.
    """
    with self._writing():
      self._manager.wait_until_finished()
      self._saving = step
      if step not in self._manager.all_steps():
        self._manager.save(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), input=ocp.args.JsonSave(batches.get_state())
          ),
        )

  def fitting(self, step: int, candidates: Sequence[TrainState]) -> TrainState:
    """The first of `candidates` with the names and shapes that were saved, or the first of all."""
    saved = _shapes(self._manager.item_metadata(step).state.tree)
    fits = next((like for like in candidates if _shapes(like) == saved), candidates[0])
    return _zeros(fits)

  def restore(self, step: int, like: TrainState, batches: grain.DatasetIterator) -> TrainState:
    """The state at `step`, of the shapes of `like`; moves `batches` to where it was."""
    like = jax.tree.map(np.asarray, like)
    self._check_shapes(step, like)
    items = {"state": ocp.args.StandardRestore(like), "input": ocp.args.JsonRestore()}
    earlier = self._directory / str(step) / EARLIER
    if earlier.exists():
      del items["input"]
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    batches.set_state(json.loads(earlier.read_text()) if earlier.exists() else restored.input)
    return restored.state

  def _seal(self) -> None:
    """Runs in process 0 when all is written, before the directory gets its name."""
    (draft,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
    integrity.seal(draft)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Whatever goes wrong while writing stops the run, with what is left and what to do."""
    try:
      yield
    except Exception as error:
      if hosts.is_loss(error) and "os_error_code" not in str(error):
        raise  # not this disk: another process is gone
      steps = ", ".join(map(str, _steps(self._directory))) or "none"
      raise Failure(
        f"the checkpoint of step {self._saving} could not be written to "
        f"{str(self._directory)!r}: {_reason(error)}. Those written before are whole (steps: "
        f"{steps}); make room, or mend what it is, and the same command goes on from there"
      ) from error

  def _check_shapes(self, step: int, like: TrainState) -> None:
    """Orbax cuts or pads an array of another shape without a word; refuse it instead."""
    saved = _shapes(self._manager.item_metadata(step).state.tree)
    wanted = _shapes(like)
    for name in sorted({*saved, *wanted}):
      if saved.get(name) != wanted.get(name):
        raise UserError(
          f"the checkpoint of step {step} in {str(self._directory)!r} does not fit this network: "
          f"{name} is {_show(saved.get(name))} there and {_show(wanted.get(name))} here; "
          "was the code changed since? Start afresh with another --config.workdir"
        )


def _steps(directory: Path) -> list[int]:
  """The steps of which there is a directory, whatever is in it."""
  return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def _set_aside_damaged(directory: Path, say: Callable[[str], Any]) -> None:
  """Renames damaged checkpoints newer than the last good one; process 0 does it for all."""
  if not hosts.is_first():
    return
  found = []
  for step in reversed(_steps(directory)):
    wrong = integrity.damage(directory / str(step))
    if wrong is None or (directory / str(step) / EARLIER).exists():
      break
    aside = _free_name(directory / f"{step}.damaged")
    os.rename(directory / str(step), aside)
    found.append(f"The checkpoint of step {step} is damaged: {wrong}. It is kept as {aside}.")
  if found:
    good = _steps(directory)
    found.append(f"Going on from {f'step {good[-1]}' if good else 'the start'}.")
    say("\n".join(found))


def _free_name(path: Path) -> Path:
  """`path`, or the first of path-2, path-3, ... that is not taken."""
  candidate, number = path, 1
  while candidate.exists():
    number += 1
    candidate = path.with_name(f"{path.name}-{number}")
  return candidate


def _reason(error: BaseException) -> str:
  """What an error says, in one line; only what the system said, where it is the cause."""
  cause: BaseException | None = error
  while cause:
    told = re.search(r"os_error_code='(\d+)'", str(cause))  # TensorStore's way to say it
    if told or (isinstance(cause, OSError) and cause.errno):
      return os.strerror(int(told[1]) if told else cause.errno)  # type: ignore[attr-defined]
    cause = cause.__cause__ or cause.__context__
  return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


def _zeros(tree: Any) -> Any:
  """Arrays of these shapes, where there are only shapes."""
  return jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, tree
  )


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): (tuple(x.shape), str(x.dtype))
    for path, x in leaves
  }


def _show(shape: tuple[tuple[int, ...], str] | None) -> str:
  return "absent" if shape is None else f"{shape[1]}{list(shape[0])}"


def read(directory: Path) -> tuple[int, dict[str, Any]]:
  """The step and the `params` and `batch_stats` of the latest whole checkpoint; changes nothing."""
  for step in reversed(_steps(directory)):
    saved = directory / str(step)
    if integrity.damage(saved) is None:
      state = ocp.StandardCheckpointer().restore(saved.absolute() / "state")
      return step, {"params": state["params"], "batch_stats": state["batch_stats"]}
  raise UserError(f"{str(directory)!r} holds no checkpoint that is whole")
