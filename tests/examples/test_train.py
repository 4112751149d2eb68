"""The main job as a whole: resuming bit for bit, mistakes in one line, and the real thing."""

import os
import pty
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest

from examples import (
  checkpoints,
  command_line,
  data,
  interrupts,
  parallelism,
  reporting,
  run_directory,
  train,
)
from examples.settings import UserError
from tests.examples import helpers
from tests.examples.test_parallelism import REORDERED

# ml_collections loads config files by a method that Python will drop.
OLD_IMPORT = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def saved_state(config, step):
  """The checkpoint of `step`, as the trainer would restore it."""
  job = helpers.Job(config, 4)
  batches = data.train_batches(data.load("digits"), config.batch_size, seed=config.seed)
  with checkpoints.Checkpoints(Path(config.workdir) / "checkpoints", config.keep) as store:
    restored = store.restore(step, job.state, batches)
  position = batches.get_state()
  batches.close()
  return jax.device_get(restored)._asdict(), position


def interrupt_at(step, monkeypatch):
  """A Ctrl-C while the devices work on that step."""
  stepped = reporting.Reporter.stepped

  def stepped_and_interrupted(self, now, sums):
    stepped(self, now, sums)
    if now == step:
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(reporting.Reporter, "stepped", stepped_and_interrupted)


@pytest.mark.optimized
def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(tmp_path, monkeypatch, capsys):
  # adamw has two moments to forget; an epoch is 2.2 steps, so the order of the input counts.
  changes = {"model": "mlp", "optimizer": "adamw", "batch_size": 640, "save_every": 100}
  whole, parts = (
    helpers.config(workdir=str(tmp_path / name), **changes) for name in ("whole", "parts")
  )
  assert train.run(whole) == 0
  with monkeypatch.context() as patch:
    interrupt_at(5, patch)
    assert train.run(parts, ["make", "train"]) == 128 + signal.SIGINT
  assert "saved after step 5 of 10. To go on: make train" in capsys.readouterr().out
  assert train.run(parts) == 0

  expected, position = saved_state(whole, 10)
  assert expected["step"] == 10
  resumed, resumed_position = saved_state(parts, 10)
  chex.assert_trees_all_equal(resumed, expected)
  assert position == resumed_position == {"next_index": 10}
  results = [
    [
      {key: value for key, value in row.items() if key != "time"}
      for row in reporting.read_rows(Path(config.workdir))
      if "test/loss" in row
    ]
    for config in (whole, parts)
  ]
  assert results[0] == results[1]
  assert [row["step"] for row in results[0]] == [10]


def test_a_run_goes_on_under_another_parallelism(tmp_path, monkeypatch, capsys):
  changes = {"model": "mlp", "steps": 4, "microbatches": 2}
  whole, parts = (
    helpers.config(workdir=str(tmp_path / name), **changes) for name in ("whole", "parts")
  )
  assert train.run(whole) == 0
  with monkeypatch.context() as patch:
    interrupt_at(2, patch)
    parts.parallelism = "jit"
    assert train.run(parts) == 128 + signal.SIGINT
  parts.parallelism = "shard_map"
  assert train.run(parts) == 0
  assert "From step 2 on: parallelism was 'jit' and is now 'shard_map'." in capsys.readouterr().out
  expected, resumed = (saved_state(config, 4)[0] for config in (whole, parts))
  chex.assert_trees_all_close(resumed, expected, **REORDERED)


@pytest.mark.parametrize("size", ["global", "80", "160"])  # of 320, a device's share and two's
def test_goes_on_with_fewer_devices(size, tmp_path):
  """Saved on four devices, resumed on four, two and one: the same losses within rounding."""
  changes = {"model": "mlp", "batch_size": 320, "eval_every": 1, "save_every": 5}
  changes["virtual_batch_size"] = size
  assert train.run(helpers.config(workdir=str(tmp_path / "4"), **changes)) == 0
  shutil.rmtree(tmp_path / "4" / "checkpoints" / "10")
  results = []
  for devices in (4, 2, 1):
    workdir = tmp_path / f"on{devices}"
    shutil.copytree(tmp_path / "4", workdir)
    assert train.run(helpers.config(workdir=str(workdir), devices=devices, **changes)) == 0
    rows = reporting.read_rows(workdir)
    results.append([(row["step"], row.get("train/loss", row.get("test/loss"))) for row in rows])
  assert [step for step, _ in results[0]] == sorted([*range(1, 11)] * 2)
  assert results[0] == [
    (row["step"], row.get("train/loss", row.get("test/loss")))
    for row in reporting.read_rows(tmp_path / "4")
  ]
  for result in results[1:]:
    np.testing.assert_allclose(result, results[0], rtol=1e-5)
    assert result != results[0]  # the devices did differ


# TensorStore calls back when Orbax has given up and closed its loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(tmp_path, monkeypatch, capfd):
  """A file may grow no further than a checkpoint needs: the system's own error, halfway through."""
  config = helpers.config(
    model="mlp", widths=(256,), steps=15, keep=1, workdir=str(tmp_path / "run")
  )
  monkeypatch.setattr(command_line, "parse", lambda argv, default: config)
  stepped, limits = reporting.Reporter.stepped, resource.getrlimit(resource.RLIMIT_FSIZE)

  def stepped_and_filled(self, now, sums):
    stepped(self, now, sums)
    if now == 8:
      saved.wait_until_finished()
      resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))

  def remembered(self, *arguments):
    opened(self, *arguments)
    nonlocal saved
    saved = self._manager

  saved, opened = None, checkpoints.Checkpoints.__init__
  monkeypatch.setattr(checkpoints.Checkpoints, "__init__", remembered)
  monkeypatch.setattr(reporting.Reporter, "stepped", stepped_and_filled)
  try:
    assert train.main(["train.py"]) == 1
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  error = capfd.readouterr().err.splitlines()[-1]
  directory = tmp_path / "run" / "checkpoints"
  assert "error: the checkpoint of step 10 could not be written to " in error
  assert f"{str(directory)!r}: File too large. " in error
  assert "Those written before are whole (steps: 5); make room" in error
  monkeypatch.undo()
  assert train.run(config) == 0
  assert "after step 5 of 15" in capfd.readouterr().out
  assert [path.name for path in directory.iterdir()] == ["15"]


@pytest.mark.parametrize(
  ("count", "message"), [(3, "config.devices is 3, but 2 processes .*they have 4, 4; try .*=2")]
)
def test_processes_bring_the_same_number_of_devices(count, message, monkeypatch):
  """Devices as a job of two processes would have them."""

  class Device(NamedTuple):
    process_index: int
    platform: str = "cpu"

  theirs = [Device(i % 2) for i in range(8)]  # in no order of processes
  monkeypatch.setattr(jax, "devices", lambda: theirs)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert [d.process_index for d in train.choose_devices(4)] == [0, 0, 1, 1]
  assert [d.process_index for d in train.choose_devices(0)] == [0] * 4 + [1] * 4
  with pytest.raises(UserError, match=message):
    train.choose_devices(count)


@OLD_IMPORT
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config.batchsize=1"], "did you mean 'batch_size'"),
    (["--config.batch_size=130"], "config.batch_size is 130, but must be a multiple"),
    (["--config.model=resnt"], "did you mean 'resnet'"),
    (["--config.parallelism=shardmap"], "did you mean 'shard_map'"),
    (["--config.norm=bach"], "did you mean 'batch'"),
    (["--config.dataset=digit"], "did you mean 'digits'"),
    (["--config.augment=shif"], "did you mean 'shift'"),
    (["--config.norm_momentum=2"], "config.norm_momentum is 2.0, but must be at least 0 and below"),
    (["--config.devices=9"], "config.devices is 9, but there are 8 devices"),
    (
      ["--config.dataset=mnist", "--config.data_dir={tmp}/data", "--config.download=False"],
      "train-images-idx3-ubyte.gz should hold images",
    ),
  ],
)
def test_mistakes_take_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
  (tmp_path / "data").mkdir()
  for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
    (tmp_path / "data" / f"{name}-ubyte.gz").write_bytes(b"neither gzip nor anything else")
  workdir = tmp_path / "run"
  given = [argument.format(tmp=tmp_path) for argument in arguments]
  assert train.main(["train.py", f"--config.workdir={workdir}", *given]) == 2
  out, err = capsys.readouterr()
  assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
  assert message in err
  assert not workdir.exists()


def followed(config, advice):
  """A config with what some advice adds to the command."""
  result = config.copy_and_resolve_references()
  for flag in shlex.split(advice.split(" to ")[0]):
    key, value = flag.removeprefix("--config.").split("=")
    result[key] = type(config[key])(value)
  return result


def test_the_advice_after_a_nan_works(tmp_path, monkeypatch, capsys):
  config = helpers.config(model="mlp", workdir=str(tmp_path / "run"), save_every=2)
  place, number = parallelism.Pmap.shard, 0

  def shard(self, batch):  # of which the third has a NaN in it
    nonlocal number
    number += 1
    return place(self, batch | ({"image": batch["image"] * np.nan} if number == 3 else {}))

  monkeypatch.setattr(parallelism.Pmap, "shard", shard)
  with pytest.raises(UserError, match="the training loss became nan by step 4") as stopped:
    train.run(config)
  lower, afresh, skip = str(stopped.value).splitlines()[1:]
  number = 2  # the run goes on after the second
  assert train.run(followed(config, skip)) == 0
  said = capsys.readouterr().out
  assert "Resuming" in said
  assert "From step 2 on: skip_nonfinite was 0 and is now 10." in said
  assert "steps skipped 1" in said

  shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")  # and once more, at the lower rate
  for advice, rate in ((lower, "learning_rate was 0.1 and is now 0.01"), (afresh, "Compiled")):
    assert train.run(followed(config, advice)) == 0
    assert rate in capsys.readouterr().out


def test_a_network_that_is_not_finite_is_not_saved(tmp_path):
  state = helpers.Job(helpers.config(model="mlp"), 1).state
  config = helpers.config(workdir=str(tmp_path))
  assert train.finite(1, jax.device_put(state), config).step == 0
  bad = state._replace(batch_stats=jax.tree.map(lambda x: x * np.inf, state.batch_stats))
  with pytest.raises(UserError, match="the network was no longer finite after step 1, where"):
    train.finite(1, bad, config)


@OLD_IMPORT
def test_commands_that_a_run_suggests_work(tmp_path, capsys):
  """For a key that may not change, and for one that makes a finished run longer."""
  given = {"model": "mlp", "widths": "4,", "blocks": "1,", "batch_size": 32, "steps": 2}
  given |= {"warmup_steps": 1, "workdir": tmp_path / "a run", "eval_batch_size": 120}
  command = ["train.py", *(f"--config.{key}={value}" for key, value in given.items())]

  def suggested(said):
    python, dash, module, *arguments = shlex.split(said.splitlines()[0].rsplit(": ", 1)[1])
    assert (python, dash, module) == (command_line.python(), "-m", "examples.train")
    return ["train.py", *arguments]

  assert train.main(command) == 0
  capsys.readouterr()
  assert train.main([*command, "--config.batch_size=64"]) == 2
  assert train.main(suggested(capsys.readouterr().err)) == 0
  assert "a run-2" in capsys.readouterr().out
  curves = tmp_path / "a run" / "curves.png"
  curves.unlink()  # as if it had died before it could draw
  assert train.main(command) == 0
  assert curves.read_bytes().startswith(b"\x89PNG")
  assert train.main(suggested(capsys.readouterr().out)) == 0
  said = capsys.readouterr().out
  assert "From step 2 on: steps was 2 and is now 4." in said
  assert run_directory.read_config(tmp_path / "a run").steps == 4
  assert "after 4 steps of 32" in said
  # And a header, and times that add up.
  assert said.startswith("mlp with 314 parameters and norm batch, in float32; 8 x cpu by pmap; dig")
  total, *parts = map(float, re.findall(r"([\d.]+) s\b", said[said.index("It took") :]))
  assert sum(parts) == pytest.approx(total)


def start(command, **options):
  environment = {
    k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
  }
  # Who started the tests in the background has had them ignore Ctrl-C, and so would this process.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    return subprocess.Popen(command, env=environment, **options)
  finally:
    signal.signal(signal.SIGINT, before)


def watch(process, terminal, until):
  """What the process shows on its terminal; sends Ctrl-C once `until()` is true."""
  shown, asked = b"", False
  while True:
    try:
      part = os.read(terminal, 65536)
    except OSError:  # how Linux says that the other side is closed
      break
    if not part:
      break
    shown += part
    if not asked and until():
      asked = True
      process.send_signal(signal.SIGINT)
  os.close(terminal)
  return shown.decode()


def test_ctrl_c_during_imports_is_one_line():
  process = start([sys.executable, "-m", "examples.train"], stderr=subprocess.PIPE, text=True)
  while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=60)[1] == f"{interrupts.STOPPED}\n"
  assert process.returncode == 130


@OLD_IMPORT
@pytest.mark.optimized
def test_the_main_job(tmp_path, capsys):
  """The real thing, shortened: shows progress, stops when asked, goes on, ends well."""
  command = [f"--config.workdir={tmp_path}", "--config.steps=240", "--config.eval_every=120"]

  terminal, other_side = pty.openpty()
  program = [sys.executable, "-m", "examples.train"]
  process = start([*program, *command], stdout=other_side, stderr=other_side)
  os.close(other_side)
  shown = watch(process, terminal, lambda: bool(reporting.read_rows(tmp_path)))
  assert process.wait(300) == 130, shown
  assert "Interrupted: saved after step" in shown
  assert f"--config.workdir={tmp_path}" in shown  # how to go on
  for part in ("digits", "loss", "accuracy", "examples/s", "left"):
    assert part in shown
  (stopped,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert 20 <= stopped < 240

  # Pasted into a shell.
  again = shown.split("To go on: ")[1].splitlines()[0]
  process = start(again, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  shown = process.communicate(timeout=300)[0]
  assert process.returncode == 0, shown
  assert f"after step {stopped} of 240" in shown
  assert "waiting for input" in shown
  rows = reporting.read_rows(tmp_path)
  assert reporting.latest(rows, "test/accuracy") >= 0.98
  assert reporting.latest(rows, "test/examples") == 360
  trained = [row["step"] for row in rows if "train/loss" in row]
  assert trained == sorted({*range(20, 241, 20), stopped})  # nothing twice, nothing lost
  assert {path.name for path in tmp_path.iterdir()} == {
    *("checkpoints", "config.json", "curves.png", "metrics.jsonl", "tensorboard")
  }

  again = command_line.parse(["train.py", *command], train.DEFAULT_CONFIG)
  assert train.run(again) == 0
  shown = capsys.readouterr().out
  assert "is finished already" in shown
  assert "Test accuracy" in shown
