"""Checkpoints: what is saved comes back bit for bit, or is refused."""

import os
import pathlib
import shutil

import chex
import grain
import jax
import numpy as np
import pytest

from examples import checkpoints, integrity, steps
from examples.checkpoints import Checkpoints
from examples.settings import Failure, UserError
from tests.examples import helpers


def batches():
  return iter(grain.MapDataset.range(100).shuffle(seed=1).repeat().batch(4).to_iter_dataset())


def state(value=0.0, **changes):
  params = {"kernel": np.full((2, 3), value, np.float32), "bias": np.zeros(3, jax.numpy.bfloat16)}
  opt_state = ({"trace": params}, ())
  return steps.TrainState(np.int32(value), params | changes, {"mean": np.ones(3)}, opt_state)


def test_state_and_input_position_come_back(tmp_path):
  saved, taken = state(7.0), batches()
  for _ in range(30):  # into the second epoch
    next(taken)
  with Checkpoints(tmp_path, keep=2) as store:
    assert store.latest() is None
    store.save(7, saved, taken)
  following = [next(taken) for _ in range(3)]
  resumed = batches()
  with Checkpoints(tmp_path, keep=2) as store:
    assert store.latest() == 7
    restored = store.restore(7, state(), resumed)
  assert isinstance(restored, steps.TrainState)
  chex.assert_trees_all_equal(restored._asdict(), saved._asdict())
  chex.assert_trees_all_equal_dtypes(restored._asdict(), saved._asdict())
  np.testing.assert_array_equal([next(resumed) for _ in range(3)], following)


def test_the_latest_are_kept_and_the_same_step_is_saved_once(tmp_path):
  with Checkpoints(tmp_path, keep=2) as store:
    for step in (1, 2, 3):
      store.save(step, state(step), batches())
    store.save(3, state(99.0), batches())
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
  with Checkpoints(tmp_path, keep=2) as store:
    assert store.restore(3, state(), batches()).step == 3


def flip(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def truncate(file):
  os.truncate(file, file.stat().st_size // 2)


def empty(file):
  """The whole directory that the file is in."""
  for path in file.parents:
    if path.name == "3":
      shutil.rmtree(path)
      path.mkdir()


def files(directory):
  return sorted(p.relative_to(directory) for p in directory.rglob("*"))


@pytest.mark.parametrize("harm", [flip, truncate, pathlib.Path.unlink, empty])
@pytest.mark.parametrize("name", ["state/d/*", "state/_METADATA", "input/metadata"])
def test_the_last_good_one_is_used_and_nothing_is_deleted(tmp_path, harm, name):
  with Checkpoints(tmp_path, keep=2) as store:
    for step in (1, 2, 3):
      store.save(step, state(step), batches())
  (file,) = (tmp_path / "3").glob(name)
  harm(file)
  left = files(tmp_path / "3")
  said = []
  with Checkpoints(tmp_path, keep=2, say=said.append) as store:
    assert store.latest() == 2
    assert store.restore(2, state(), batches()).step == 2
    store.save(3, state(3), batches())
  (message,) = said
  assert message.startswith("The checkpoint of step 3 is damaged: ")
  assert message.endswith(f"It is kept as {tmp_path / '3.damaged'}.\nGoing on from step 2.")
  assert (
    sorted(p.relative_to(tmp_path / "3.damaged") for p in (tmp_path / "3.damaged").rglob("*"))
    == left
  )
  with Checkpoints(tmp_path, keep=2, say=pytest.fail) as store:
    assert store.restore(3, state(), batches()).step == 3
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "3.damaged"]


def test_a_damaged_one_is_not_the_one_kept(tmp_path):
  """Twice damaged: even names that are taken lose nothing; and the start is better than damage."""
  for attempt in ("1.damaged", "1.damaged-2"):
    with Checkpoints(tmp_path, keep=1) as store:
      store.save(1, state(1), batches())
    flip(tmp_path / "1" / "input" / "metadata")
    said = []
    with Checkpoints(tmp_path, keep=1, say=said.append) as store:
      assert store.latest() is None
    assert f"kept as {tmp_path / attempt}.\nGoing on from the start." in said[0]
  with Checkpoints(tmp_path, keep=1) as store:
    store.save(2, state(2), batches())
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1.damaged", "1.damaged-2", "2"]


def test_what_orbax_notes_last_does_not_matter(tmp_path):
  """The two files without a sum: whatever is in them, the same state comes back."""
  with Checkpoints(tmp_path, keep=1) as store:
    store.save(1, state(1), batches())
  for name in integrity.NOTES:
    (tmp_path / "1" / name).write_bytes(b"\xff{")
  with Checkpoints(tmp_path, keep=1) as store:
    chex.assert_trees_all_equal(store.restore(1, state(), batches())._asdict(), state(1)._asdict())


def test_those_from_before_sums_are_used_as_they_are(tmp_path):
  taken = batches()
  next(taken)
  with Checkpoints(tmp_path, keep=1) as store:
    store.save(1, state(1), taken)
  (tmp_path / "1" / integrity.SUMS).unlink()
  (tmp_path / "1" / "input" / "metadata").rename(tmp_path / "1" / "input" / "process_0-of-1.json")
  resumed = batches()
  with Checkpoints(tmp_path, keep=1, say=pytest.fail) as store:
    assert store.restore(store.latest(), state(), resumed).step == 1
  assert resumed.get_state() == {"next_index": 1}


def test_older_ones_go_only_when_the_newer_is_sealed(tmp_path, monkeypatch):
  """A save that fails at its very end leaves the one before it to go on from."""
  with Checkpoints(tmp_path, keep=1) as store:
    store.save(1, state(1), batches())
  monkeypatch.setattr(integrity, "seal", lambda directory: (directory / "no" / "such").touch())
  with (
    pytest.raises(Failure, match=r"step 2 could not be .*No such file .*whole \(steps: 1\)"),
    Checkpoints(tmp_path, keep=1) as store,
  ):
    store.save(2, state(2), batches())
  monkeypatch.undo()
  with Checkpoints(tmp_path, keep=1, say=pytest.fail) as store:
    assert store.latest() == 1
    store.save(2, state(2), batches())
  assert [p.name for p in tmp_path.iterdir()] == ["2"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"kernel": np.zeros((2, 4), np.float32)}, r"params.kernel is float32\[2, 3\] there and fl"),
    ({"kernel": np.zeros((2, 3), np.float64)}, "params.kernel is float32.*and float64"),
    ({"extra": np.zeros(3)}, r"params.extra is absent there and float64\[3\] here"),
  ],
)
def test_another_shape_is_refused(tmp_path, changes, message):
  with Checkpoints(tmp_path, keep=1) as store:
    store.save(1, state(), batches())
  with Checkpoints(tmp_path, keep=1) as store, pytest.raises(UserError, match=message):
    store.restore(1, state(**changes), batches())


def test_the_form_that_fits_is_found(tmp_path):
  with Checkpoints(tmp_path, keep=1) as store:
    store.save(1, state(5.0), batches())
  other = state()._replace(opt_state=({"other": np.zeros(1)},))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state())
  with Checkpoints(tmp_path, keep=1) as store:
    like = store.fitting(1, [other, like])
    chex.assert_trees_all_equal(store.restore(1, like, batches())._asdict(), state(5.0)._asdict())


def test_reading_the_latest_whole_one_changes_nothing(tmp_path):
  with pytest.raises(UserError, match="holds no checkpoint that is whole"):
    checkpoints.read(tmp_path)
  with Checkpoints(tmp_path, keep=2) as store:
    for step in (1, 2):
      store.save(step, state(step), batches())
  flip(tmp_path / "2" / "input" / "metadata")
  (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # which another process is writing
  before = files(tmp_path)
  step, variables = checkpoints.read(tmp_path)
  assert step == 1
  expected = {"params": state(1).params, "batch_stats": state(1).batch_stats}
  chex.assert_trees_all_equal(variables, expected)
  assert files(tmp_path) == before


def test_training_on_does_not_change_what_is_being_saved(tmp_path):
  """The state is written while the next steps reuse its memory."""
  job = helpers.Job(helpers.config(model="mlp"), 4)
  step = job.parallel.step(job.train_body, donate_state=True)
  live = job.parallel.replicate(job.state)
  with Checkpoints(tmp_path, keep=1) as store:
    store.save(0, steps.unreplicate(live), batches())
    for i in range(5):
      live, _ = step(live, job.parallel.shard(helpers.batch(32, seed=i)))
  with Checkpoints(tmp_path, keep=1) as store:
    restored = store.restore(0, job.state, batches())
  chex.assert_trees_all_equal(restored._asdict(), jax.device_get(job.state._asdict()))
