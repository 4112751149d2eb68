"""What a run shows and leaves behind: a progress bar, metrics.jsonl and TensorBoard.

Every number is first a row of metrics.jsonl: a step, the time (seconds since 1970), and what was
measured, by the names that TensorBoard shows: train/loss, train/accuracy, train/learning_rate,
train/examples_per_second, train/skipped_steps, test/loss, test/accuracy, test/examples. The others,
and the curves of `examples.curves`, are views of those rows.
"""

import collections
import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
import tensorboardX
from rich import progress
from rich.console import Console

from examples import hosts, optimizers, steps
from examples.clock import Clock
from examples.data import Dataset
from examples.settings import Failure, write_atomically
from jaxbn.diagnostics import Report

# Steps given to the devices before the oldest is waited for: enough that they never run
# dry, few enough that Ctrl-C is answered at once and the progress bar tells the truth.
IN_FLIGHT = 2


def read_rows(directory: Path) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl, up to a line that a crash cut short."""
  file = directory / "metrics.jsonl"
  rows = []
  for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
    try:
      rows.append({_name(key): value for key, value in json.loads(line).items()})
    except ValueError:
      break
  return rows


def _name(key: str) -> str:
  """What is called so now; runs of before have train_loss, test_loss, learning_rate and others."""
  if "/" in key or key in ("step", "time"):
    return key
  kind, _, rest = key.partition("_")
  return f"{kind}/{rest}" if kind in ("train", "test") else f"train/{key}"


def header(config: Any, params: Any, devices: Sequence[Any], dataset: Dataset) -> str:
  """What is trained on what, in a line."""
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  height, width, channels = dataset.train_images.shape[1:]
  return (
    f"{config.model} with {count:,} parameters and norm {config.norm}, in {config.dtype}; "
    f"{len(devices)} x {devices[0].device_kind} by {config.parallelism}; {dataset.name}: "
    f"{len(dataset.train_images):,} training and {len(dataset.test_images):,} test images of "
    f"{height}x{width}x{channels}, {len(dataset.class_names)} classes"
  )


def latest(rows: list[dict[str, Any]], key: str) -> Any:
  """The last value measured under `key`; None where there is none."""
  return next((row[key] for row in reversed(rows) if key in row), None)


class Reporter:
  """Reports on one run; use as a context.

  Results of training steps stay on the devices and are fetched once per window of
  `config.log_every` steps, so that reporting does not hold the devices up.

  Attributes:
    rows: everything measured so far.
    waiting: seconds of the training in which the devices could have waited for input: it was
      late, and when it came they had nothing left to do.
  """

  def __init__(self, directory: Path, config: Any, start: int, console: Console, clock: Clock):
    """Continues after `start` steps: rows of later ones will be measured again."""
    self.rows = [row for row in read_rows(directory) if row["step"] <= start]
    self.waiting = 0.0
    self._config, self._console, self._clock = config, console, clock
    self._directory = directory
    self._schedule = optimizers.schedule(config)
    file = directory / "metrics.jsonl"
    self._file: TextIO | None = None
    if hosts.is_first():  # the others measure the same
      write_atomically(file, "".join(json.dumps(row) + "\n" for row in self.rows))
      self._file = file.open("a")
      # TensorBoard forgets what an earlier run wrote, of which a kill loses the last two minutes.
      self._board = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=0)
      for row in self.rows:
        self._show(row)
    self._bar = _bar(console)
    self._task = self._bar.add_task(
      "compiling", total=config.steps, completed=start, loss="", accuracy="", rate=""
    )
    self._compiled = False
    self._unread: collections.deque[steps.Sums] = collections.deque()
    self._window = steps.Sums(0.0, 0, 0)
    self._untimed = 0  # examples of the window's first step, if that had to be compiled
    self._timed = 0.0  # seconds of training when the window began

  def __enter__(self) -> "Reporter":
    self._bar.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._bar.stop()
    if self._file:
      with contextlib.suppress(OSError):  # a row that did not fit is not whole, and dropped
        self._file.close()
      self._board.close()

  def take(self, batches: Iterator[Any]) -> Any:
    """The next batch; counts the time it takes, if the devices were idle at the end of it."""
    start = time.perf_counter()
    batch = next(batches)
    idle = not self._unread or self._unread[-1].loss.is_ready()
    if self._compiled and idle:
      self.waiting += time.perf_counter() - start
    return batch

  def stepped(self, step: int, sums: steps.Sums) -> None:
    """Notes the results of a training step, which the devices may still be working on."""
    self._unread.append(sums)
    if not self._compiled:
      self._read(0)
      self._untimed, self._timed = self._window.count, self._clock["training"]
      self._compiled = True
      self._console.print(f"Compiled in {self._clock['compiling']:.1f} s.")
      self._bar.update(self._task, description=self._config.dataset)
    self._read(IN_FLIGHT)
    self._bar.update(self._task, completed=step)
    if step % self._config.log_every == 0:
      self.finish_window(step)

  def finish_window(self, step: int) -> None:
    """Writes what was measured since the last window, if anything; waits for the devices."""
    self._read(0)
    count, skipped = self._window.count, self._window.skipped
    if skipped:
      self._write(step, **{"train/skipped_steps": skipped})
    if not count:
      self._window = steps.Sums(0.0, 0, 0)
      return
    seconds = self._clock["training"] - self._timed
    loss, accuracy = self._window.loss / count, self._window.correct / count
    if not math.isfinite(loss):
      raise optimizers.not_finite(f"the training loss became {loss} by step {step}", self._config)
    rate = (count - self._untimed) / seconds
    self._write(
      step,
      **{
        "train/loss": loss,
        "train/accuracy": accuracy,
        "train/learning_rate": float(self._schedule(step - 1 - self._skipped())),
        "train/examples_per_second": rate,
      },
    )
    self._bar.update(
      self._task,
      loss=f"loss {loss:.3f}",
      accuracy=f"accuracy {accuracy:.1%}",
      rate=f"{rate:,.0f} examples/s",
    )
    self._window, self._untimed = steps.Sums(0.0, 0, 0), 0
    self._timed = self._clock["training"]

  def _skipped(self) -> int:
    """The steps that were skipped so far."""
    return sum(row.get("train/skipped_steps", 0) for row in self.rows)

  def tested(self, step: int, loss: float, accuracy: float, count: int) -> None:
    """Writes a result on the test set, and a line for those who have no progress bar to watch."""
    self._write(step, **{"test/loss": loss, "test/accuracy": accuracy, "test/examples": count})
    training, skipped = latest(self.rows, "train/loss"), self._skipped()
    self._console.print(
      f"step {step:>6} of {self._config.steps}: "
      + ("" if training is None else f"training loss {training:.4f}, ")
      + f"test loss {loss:.4f}, test accuracy {accuracy:.2%}"
      + (f", steps skipped {skipped}" if skipped else ""),
      highlight=False,
    )

  def diagnosed(self, step: int, found: Report) -> None:
    """Says what a diagnosis found, in a line for each fault, and where the rest is."""
    lines = found.brief().splitlines()
    self._console.print(f"step {step:>6} of {self._config.steps}: {lines[0]}", markup=False)
    for line in lines[1:]:
      self._console.print(f"  {line}", markup=False)
    if not found.ok:
      self._console.print(
        f"  What to do: python -m jaxbn.diagnostics {self._directory}", markup=False
      )

  @contextlib.contextmanager
  def pause(self, step: int, activity: str) -> Iterator[None]:
    """Does something other than training: ends the window, whose time it is not."""
    self.finish_window(step)
    with self._clock.spent(activity):
      yield

  def _read(self, leave: int) -> None:
    """Adds up all but the `leave` newest results; waits for them."""
    while len(self._unread) > leave:
      self._window = steps.add(self._window, self._unread.popleft())

  def _write(self, step: int, **measured: float) -> None:
    row = {"step": step, "time": time.time(), **measured}
    self.rows.append(row)
    if not self._file:
      return
    try:
      self._file.write(json.dumps(row) + "\n")
      self._file.flush()
    except OSError as error:
      raise Failure(
        f"{self._file.name!r} cannot be written: {error.strerror}; make room, and the same command "
        "goes on from the last checkpoint"
      ) from error
    self._show(row)

  def _show(self, row: dict[str, Any]) -> None:
    for name, value in row.items():
      if name not in ("step", "time"):
        self._board.add_scalar(name, value, row["step"], row.get("time"))


def _bar(console: Console) -> progress.Progress:
  return progress.Progress(
    progress.TextColumn("{task.description}"),
    progress.BarColumn(bar_width=None),
    progress.MofNCompleteColumn(),
    *(progress.TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "accuracy", "rate")),
    progress.TimeRemainingColumn(),
    progress.TextColumn("left"),
    console=console,
    disable=not console.is_terminal,
    expand=True,
    refresh_per_second=4,  # drawing takes a core from the devices when they are the same cores
  )
