"""Several processes: the numbers of one, whoever is asked to stop or dies; in real processes."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from examples import hosts, launch, reporting, train
from examples.settings import UserError
from tests.examples import chaos, helpers

# ml_collections loads config files by a method that Python will drop.
OLD_IMPORT = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

STEPS = 30
TIMEOUT = 10  # config.peer_timeout: after which the others give up
# A sum over other devices in another order differs by some 2**-24; thirty steps enlarge it.
REORDERED = 1e-5


def arguments(workdir, **changes):
  """The smallest job: a checkpoint at every step gives time to interfere."""
  given = {
    "devices": 4,
    "model": "mlp",
    "widths": "8,",
    "blocks": "1,",
    "batch_size": 120,
    # Not adamw: where the gradient is zero but for rounding, as of the weights of a pixel that
    # never changes, it makes steps of full length out of rounding.
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "warmup_steps": 2,
    "steps": STEPS,
    "log_every": 10,
    "eval_every": 10,
    "eval_batch_size": 240,  # the last one: half of the second process's rows do not exist
    "save_every": 1,
    "keep": STEPS,
    "peer_timeout": TIMEOUT,
    "workdir": workdir,
    **changes,
  }
  return [f"--config.{key}={value}" for key, value in given.items()]


def run(workdir, **changes):
  """A run of one process: this one."""
  assert train.main(["train.py", *arguments(workdir, **changes)]) == 0


def environment(cache):
  """That of a process with its own devices, which need not compile what others have compiled."""
  return {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"} | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


class Pair:
  """A run of two processes with two devices each, which have to end by themselves."""

  def __init__(self, workdir, cache, slurm=False):
    self.workdir = workdir
    port = launch.free_port()
    self.processes = [self.start(workdir, cache, i, slurm, port) for i in range(2)]

  def start(self, workdir, cache, i, slurm, port):
    """One of them, told its place by the config, or by what Slurm puts into the environment."""
    if slurm:
      place = {"coordinator": "auto"}
      told = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": i, "LOCALID": i}
      told = {f"SLURM_{key}": str(value) for key, value in told.items()}
      told["JAX_COORDINATOR_PORT"] = str(port)
    else:
      place = {"coordinator": f"127.0.0.1:{port}", "processes": 2, "process_id": i}
      told = {}
    return subprocess.Popen(
      [sys.executable, "-m", "examples.train", *arguments(workdir, **place)],
      env=environment(cache) | told,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def signal(self, process, number, after_step):
    """Sends a signal to one of them once that step is saved."""
    deadline = time.monotonic() + 120
    while max(chaos.saved(self.workdir / "checkpoints"), default=0) < after_step:
      assert time.monotonic() < deadline, self.end()
      time.sleep(0.005)
    self.processes[process].send_signal(number)

  def end(self):
    """The exit statuses, and what each said."""
    said = [process.communicate(timeout=120)[0] for process in self.processes]
    return [process.returncode for process in self.processes], said


def launched(workdir, cache):
  """The same by the launcher: its exit status and what it shows."""
  finished = subprocess.run(
    [sys.executable, "-m", "examples.launch", "2", *arguments(workdir)],
    env=environment(cache),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
  )
  return finished.returncode, finished.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The run as one process with four devices does it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "stdout", io.StringIO())
    directory = tmp_path_factory.mktemp("alone") / "run"
    run(directory)
  return directory


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, alone):
  """The same run, begun by one process and gone on with by three pairs, of which two are disturbed.

  Gives its directory, and the statuses and words of the pairs.
  """
  directory = tmp_path_factory.mktemp("disturbed")
  workdir, cache = directory / "run", directory / "compiled"
  shutil.copytree(alone, workdir)
  forget(workdir, after=3)
  results = []
  pair = Pair(workdir, cache, slurm=True)
  pair.signal(1, signal.SIGTERM, after_step=5)
  results.append(pair.end())
  pair = Pair(workdir, cache)
  pair.signal(1, signal.SIGKILL, after_step=max(chaos.saved(workdir / "checkpoints")) + 3)
  began = time.monotonic()
  results.append(pair.end())
  seconds = time.monotonic() - began
  results.append(launched(workdir, cache))
  return workdir, results, seconds


def forget(workdir, after):
  """Makes a run one that died after that step was saved."""
  for step in chaos.saved(workdir / "checkpoints"):
    if step > after:
      shutil.rmtree(workdir / "checkpoints" / str(step))


def assert_same_result(one, other, step=STEPS):
  """The same state within rounding, at the same position of the input, and the same metrics."""
  for (name, a), (other_name, b) in zip(
    chaos.state(one, step), chaos.state(other, step), strict=True
  ):
    assert name == other_name
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    tolerance = {"rtol": REORDERED, "atol": REORDERED * np.abs(b).max()}
    np.testing.assert_allclose(a, b, **tolerance, err_msg=name)
  # Where a run stops, a window of the training's metrics ends: those of the tests can be compared.
  tests = [[r for r in reporting.read_rows(run) if "test/loss" in r] for run in (one, other)]
  assert [row["step"] for row in tests[0]] == [row["step"] for row in tests[1]] == [10, 20, 30]
  for a, b in zip(*tests, strict=True):
    assert a["test/examples"] == b["test/examples"] == 360
    np.testing.assert_allclose(a["test/loss"], b["test/loss"], rtol=REORDERED)


@OLD_IMPORT
def test_two_processes_do_what_one_does(alone, disturbed):
  """Also: two go on with what one has saved."""
  workdir, results, _ = disturbed
  status, said = results[-1]
  assert status == 0, said
  assert said.count("Test accuracy") == said.count("Resuming") == 1  # the second says nothing
  assert "Gloo" not in said
  assert_same_result(workdir, alone)


@OLD_IMPORT
def test_one_process_goes_on_with_what_two_have_saved(alone, disturbed, tmp_path):
  shutil.copytree(disturbed[0], tmp_path / "run")
  forget(tmp_path / "run", after=20)
  run(tmp_path / "run")
  assert_same_result(tmp_path / "run", alone)


@OLD_IMPORT
def test_all_stop_at_the_same_step_when_one_is_asked_to(disturbed):
  statuses, said = disturbed[1][0]
  assert statuses == [128 + signal.SIGTERM] * 2, said
  assert "Interrupted: saved after step" in said[0]


@OLD_IMPORT
def test_when_one_dies_the_other_ends_soon_and_says_why(disturbed):
  _, results, seconds = disturbed
  statuses, said = results[1]
  assert statuses[1] == -signal.SIGKILL
  assert statuses[0] not in (0, None)
  assert seconds < 2 * TIMEOUT + 20  # the twenty are for a busy machine
  # JAX's words; ours come before, where a step finds out that the connection is closed.
  assert "The following tasks are unhealthy (stopped sending heartbeats):\n1\n" in said[0]


@OLD_IMPORT
def test_metrics_are_written_once(disturbed):
  lines = (disturbed[0] / "metrics.jsonl").read_text().splitlines()
  kinds = [(row["step"], "test/loss" in row) for row in map(json.loads, lines)]
  assert len(set(kinds)) == len(kinds)
  assert kinds == sorted(kinds)
  shown = chaos.board(disturbed[0])
  assert len({point[:2] for point in shown}) == len(shown)
  assert {"test/loss", "train/loss"} <= {name for _, name, _ in shown}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"processes": 2}, r"config.processes is 2 and .*config.coordinator is not given"),
    ({"coordinator": "here"}, "config.coordinator is 'here', but must be HOST:PORT"),
    ({"coordinator": "here:99999"}, "must be HOST:PORT"),
    ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "config.process_id is 2"),
    ({"coordinator": "auto"}, "config.coordinator is 'auto', but nothing comes of that"),
  ],
)
def test_mistakes_are_refused_before_anything_waits(changes, message):
  code = (
    "import sys; from examples import hosts, settings; from tests.examples import helpers\n"
    f"try: hosts.join(helpers.config(**{changes!r}))\n"
    "except settings.UserError as error: print(error)"
  )
  if changes.get("coordinator") == "auto":  # this process has used its devices already
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(message, said.stdout), said
    return
  with pytest.raises(UserError, match=message):
    hosts.join(helpers.config(**changes))


def test_alone_nothing_is_joined():
  hosts.join(helpers.config())
  assert hosts.is_first()
  assert hosts.in_turn(lambda: 3) == 3
  stop = hosts.Agreement()
  assert [stop.reached(asked) for asked in (False, True)] == [False, True]
  assert hosts.leave(3, together=False) == 3
  assert not hosts.is_loss(ValueError("UNKNOWN: something"))
