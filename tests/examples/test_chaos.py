"""`make chaos`, shortened: what a killed run leaves is that of an undisturbed one."""

import io

import pytest
from rich.console import Console

from tests.examples import chaos


@pytest.mark.optimized
def test_killed_runs_end_as_undisturbed_ones(tmp_path):
  said = io.StringIO()
  assert chaos.torment(tmp_path, kills=2, seed=1, console=Console(file=said)) == []
  assert "kill  2 of 2: saving" in said.getvalue()
  # And it would see a difference: of one bit, or of one row.
  steps = 3 * chaos.STEPS_PER_KILL
  calm, poor = tmp_path / "calm", tmp_path / "disturbed"
  rows = (poor / "metrics.jsonl").read_text()
  (poor / "metrics.jsonl").write_text(rows + rows.splitlines()[-1] + "\n")
  assert chaos.differences(calm, poor, steps) == ["metrics.jsonl"]
  (poor / "checkpoints" / str(steps) / "input" / "metadata").write_text('{"next_index": 0}')
  assert chaos.differences(calm, poor, steps) == ["[1]['next_index']", "metrics.jsonl"]


def test_what_tensorboard_takes_back(tmp_path):
  """The harness reads its files as TensorBoard does."""
  board = tmp_path / "tensorboard"
  board.mkdir()

  def record(event):
    content = event.SerializeToString()
    return len(content).to_bytes(8, "little") + bytes(4) + content + bytes(4)

  def point(step, value):
    event = chaos.Event(step=step)
    event.summary.value.add(tag="loss", simple_value=value)
    return record(event)

  restart = chaos.Event(step=2, session_log=chaos.SessionLog(status=chaos.SessionLog.START))
  (board / "1").write_bytes(point(1, 1.0) + point(2, 2.0) + point(3, 3.0)[:-5])
  (board / "2").write_bytes(record(restart) + point(2, 4.0))
  assert chaos.board(tmp_path) == [(1, "loss", 1.0), (2, "loss", 4.0)]
