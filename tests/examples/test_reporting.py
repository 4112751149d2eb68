"""The reports: rows that add up, survive a resumption, and do not wait for the devices."""

import io
import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from examples import reporting, steps
from examples.clock import Clock
from examples.settings import Failure, UserError
from tests.examples import chaos, helpers


def sums(loss, correct=1, count=4, skipped=0):
  return steps.Sums(*map(jnp.array, (loss, correct, count, skipped)))


def reporter(directory, start=0, terminal=False, **changes):
  console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
  config = helpers.config(**{"log_every": 2, "steps": 6, **changes})
  return reporting.Reporter(directory, config, start, console, Clock("training")), console


def test_rows_are_means_over_the_examples_of_a_window(tmp_path):
  with reporter(tmp_path)[0] as report:
    for step, loss in enumerate([4.0, 8.0, 12.0, 16.0, 20.0], start=1):
      report.stepped(step, sums(loss))
    report.finish_window(5)
    report.finish_window(5)  # nothing is left: no row
    report.tested(5, 0.25, 0.5, 10)
  rows = reporting.read_rows(tmp_path)
  assert rows == report.rows
  assert [(r["step"], r["train/loss"]) for r in rows[:3]] == [(2, 1.5), (4, 3.5), (5, 5.0)]
  assert rows[0]["train/accuracy"] == 0.25
  assert 0 <= time.time() - rows[3].pop("time") < 60
  assert rows[3] == {"step": 5, "test/loss": 0.25, "test/accuracy": 0.5, "test/examples": 10}
  shown = list(chaos.events(tmp_path))
  assert next(e.wall_time for e in shown if e.summary.value) == pytest.approx(rows[0]["time"])
  names = {"loss", "accuracy", "learning_rate", "examples_per_second"}
  assert {value.tag for event in shown for value in event.summary.value} == {
    *(f"train/{name}" for name in names),
    *("test/loss", "test/accuracy", "test/examples"),
  }


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
  before = {"train_loss": 1.0, "learning_rate": 0.5, "skipped_steps": 1}  # as it once was called
  lines = [json.dumps({"step": step, **before}) for step in (2, 4, 6)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "tr')
  with reporter(tmp_path, start=4)[0] as report:
    report.tested(6, 0.5, 0.5, 1)
  rows = reporting.read_rows(tmp_path)
  assert [row["step"] for row in rows] == [2, 4, 6]
  assert "test/loss" in report.rows[-1]
  assert rows[0].keys() == {"step", "train/loss", "train/learning_rate", "train/skipped_steps"}


def test_a_row_that_does_not_fit_stops_the_run(tmp_path):
  with reporter(tmp_path)[0] as report:
    report.tested(1, 0.5, 0.5, 1)
    report._file.close()
    # Where every write meets a full disk; the report closes it.
    report._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(Failure, match="'/dev/full' cannot be written: No space left on device"):
      report.tested(2, 0.5, 0.5, 1)
  assert [row["step"] for row in reporting.read_rows(tmp_path)] == [1]


def test_a_run_that_saved_nothing_leaves_nothing_in_tensorboard(tmp_path):
  for loss in (1.0, 2.0):
    with reporter(tmp_path)[0] as report:
      report.tested(1, loss, 0.5, 1)
    time.sleep(1.1)  # its files are named after the second
  assert [value for _, name, value in chaos.board(tmp_path) if name == "test/loss"] == [2.0]


def test_waiting_counts_only_while_the_devices_are_idle(tmp_path):
  class Busy:
    """A result that the devices are still working on."""

    def is_ready(self):
      return False

  def slow():
    while True:
      time.sleep(0.05)
      yield None

  with reporter(tmp_path)[0] as report:
    report.take(slow())
    assert report.waiting == 0.0  # before the first step is compiled, that is no wait
    report.stepped(1, sums(1.0))
    report.take(slow())
    assert report.waiting >= 0.05
    before = report.waiting
    report._unread.append(steps.Sums(Busy(), None, None))
    report.take(slow())
    assert report.waiting == before
    report._unread.clear()


def test_results_are_fetched_late(tmp_path):
  """At most IN_FLIGHT results are unread between windows; nothing waits for the newest."""

  class Result:
    addressable_shards = property(lambda self: pytest.fail("waited for a step in flight"))

  late = steps.Sums(Result(), Result(), Result())
  with reporter(tmp_path, log_every=100)[0] as report:
    report.stepped(1, sums(1.0))
    for step in range(2, 2 + reporting.IN_FLIGHT):
      report.stepped(step, late)
    report._unread.clear()


def test_progress_shows_loss_accuracy_speed_and_time_left(tmp_path):
  report, console = reporter(tmp_path, terminal=True)
  with report:
    for step in (1, 2, 3, 4):
      report.stepped(step, sums(4.0))
  shown = console.file.getvalue()
  for part in (
    "compiling",
    "Compiled in",
    "digits",
    "4/6",
    "loss 1.000",
    "accuracy 25.0%",
    "examples/s",
    "left",
  ):
    assert part in shown


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  with reporter(tmp_path)[0] as report:
    report.stepped(1, sums(np.nan))
    with pytest.raises(UserError, match=r"loss became nan by step 2.*\n.*learning_rate=0.01 "):
      report.stepped(2, sums(1.0))


def test_skipped_steps_are_counted_and_not_averaged(tmp_path):
  with reporter(tmp_path, steps=8)[0] as report:
    for step in (1, 2):
      report.stepped(step, sums(0.0, 0, 0, skipped=1))
    report.stepped(3, sums(4.0))
    report.stepped(4, sums(0.0, 0, 0, skipped=1))
  assert [row.get("train/skipped_steps") for row in report.rows] == [2, 1, None]
  assert [(row["step"], row["train/loss"]) for row in report.rows[2:]] == [(4, 1.0)]
  # The schedule is at its second step: the optimizer did not see the others.
  assert report.rows[2]["train/learning_rate"] == pytest.approx(float(report._schedule(0)))
  report, console = reporter(tmp_path, start=4, steps=8)
  with report:
    report.tested(5, 0.25, 0.5, 10)
  assert "training loss 1.0000, test loss 0.2500, test accuracy 50.00%, steps skipped 3" in (
    console.file.getvalue()
  )


def test_a_result_before_any_step_counted_has_no_training_loss(tmp_path):
  report, console = reporter(tmp_path)
  with report:
    report.stepped(1, sums(0.0, 0, 0, skipped=1))
    report.finish_window(1)
    report.tested(1, 0.25, 0.5, 10)
  shown = console.file.getvalue()
  assert "step      1 of 6: test loss 0.2500, test accuracy 50.00%, steps skipped 1" in shown
