"""Checkpoints: the state and the input's position, written by Orbax behind the training's back.

A checkpoint appears under its final name only when it is complete, and an older one is
deleted only after that, so there is no moment at which a crash could leave none.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from examples.settings import UserError
from examples.steps import TrainState


class Checkpoints:
  """The checkpoints of one run directory; use as a context, so that the last one gets written."""

  def __init__(self, directory: Path, keep: int):
    """Opens `directory`, keeping the latest `keep` checkpoints."""
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
    )
    handlers = ocp.handlers.create_default_handler_registry(
      state=ocp.StandardCheckpointHandler(), input=grain.checkpoint.CheckpointHandler()
    )
    self._directory = directory
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
    """
    if step not in self._manager.all_steps():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), input=grain.checkpoint.CheckpointSave(batches)
        ),
      )

  def restore(self, step: int, like: TrainState, batches: grain.DatasetIterator) -> TrainState:
    """The state at `step`, of the shapes of `like`; moves `batches` to where it was."""
    like = jax.tree.map(np.asarray, like)
    self._check_shapes(step, like)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(like), input=grain.checkpoint.CheckpointRestore(batches)
      ),
    )
    return restored.state

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


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): (tuple(x.shape), str(x.dtype))
    for path, x in leaves
  }


def _show(shape: tuple[tuple[int, ...], str] | None) -> str:
  return "absent" if shape is None else f"{shape[1]}{list(shape[0])}"
