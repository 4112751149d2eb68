"""A run's directory: whose it is, and what may change in it."""

import json

import pytest

from examples import run_directory
from examples.settings import UserError
from tests.examples import helpers

COMMAND = ["python", "-m", "examples.train", "--config.seed=1"]


def claim(directory, **changes):
  return run_directory.claim(directory, helpers.config(**changes), COMMAND)


def test_a_run_that_is_older_than_a_key_goes_on(tmp_path):
  claim(tmp_path)
  file = tmp_path / "config.json"
  keys = json.loads(file.read_text())
  del keys["microbatches"], keys["loss_scale"]
  file.write_text(json.dumps(keys))
  assert claim(tmp_path) == {}
  with pytest.raises(UserError, match=r"microbatches was 1 and is now 2\)"):
    claim(tmp_path, microbatches=2)


def test_a_run_directory_belongs_to_its_config(tmp_path):
  run = tmp_path / "the run"
  claim(run)
  before = (run / "config.json").read_text()
  assert json.loads(before)["widths"] == [4]
  (tmp_path / "the run-2").touch()  # taken
  with pytest.raises(
    UserError, match=r"batch_size was 32 and is now 64, seed was 0 and is now 1\); .* of its own: "
  ) as refused:
    claim(run, batch_size=64, seed=1, steps=20)
  assert str(refused.value).endswith(
    f": python -m examples.train --config.seed=1 '--config.workdir={run}-3'"
  )
  assert (run / "config.json").read_text() == before
  assert [p.name for p in run.iterdir()] == ["config.json"]


def test_what_may_change_is_noted(tmp_path):
  claim(tmp_path)
  assert claim(tmp_path, data_dir="elsewhere", peer_timeout=3) == {}  # where it is, not what
  changes = claim(tmp_path, steps=20, devices=2)
  assert changes == {"steps": (10, 20), "devices": (4, 2)}
  assert run_directory.words(changes) == "steps was 10 and is now 20, devices was 4 and is now 2"
  assert claim(tmp_path, steps=20, devices=2) == changes  # not before it is noted
  run_directory.note(tmp_path, helpers.config(steps=20, devices=2), changes, 5)
  assert claim(tmp_path, steps=20, devices=2) == {}
  rows = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
  assert [(r["step"], r["key"], r["was"], r["now"]) for r in rows] == [
    (5, "steps", 10, 20),
    (5, "devices", 4, 2),
  ]
  config = run_directory.read_config(tmp_path)
  assert (config.steps, config.widths, config.workdir) == (20, (4,), str(tmp_path))


def test_what_is_no_run(tmp_path):
  with pytest.raises(UserError, match="holds no run: there is no config"):
    run_directory.read_config(tmp_path)
  (tmp_path / "file").touch()
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(UserError, match=f"{workdir.name}', which cannot be made .*workdir=runs/"):
      claim(workdir)
