"""Kills a training run again and again, and compares what is left with an undisturbed run.

  python -m tests.examples.chaos --kills=20

Half of the kills come at a random moment of a run's life, half while a checkpoint is being written.
In the end parameters, optimizer state, statistics and the input's position have to be the same bit
for bit, and so do the rows of metrics.jsonl; TensorBoard has to see each of them once.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table
from tensorboardX.proto.event_pb2 import Event, SessionLog

SAVE_EVERY = 4
STEPS_PER_KILL = 24  # at most, of which most lives do fewer
SAVING = 0.06  # seconds that a save takes
TIMES = ("time", "train/examples_per_second")
DRAFTS = "*.orbax-checkpoint-tmp*"
MOMENTS = ("any", "saving")


class Kill(NamedTuple):
  """One death: when, of how long a life, and what lay there."""

  moment: str
  seconds: float
  checkpoints: list[int]
  drafts: int


def command(workdir: Path, steps: int) -> list[str]:
  """The smallest network, on four devices, saving all the time."""
  given = {
    "workdir": workdir,
    "steps": steps,
    "devices": 4,
    "model": "mlp",
    "widths": "16,",
    "blocks": "1,",
    "warmup_steps": 2,
    "batch_size": 120,
    "log_every": 2,
    "eval_every": 2 * SAVE_EVERY,
    "save_every": SAVE_EVERY,
    "keep": 2,
  }
  flags = [f"--config.{key}={value}" for key, value in given.items()]
  return [sys.executable, "-m", "examples.train", *flags]


def start(arguments: list[str], cache: Path) -> subprocess.Popen[bytes]:
  """A run of its own, which need not compile what one before it has compiled."""
  ours = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
  environment = {key: value for key, value in os.environ.items() if key not in ours}
  environment |= {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
    arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )


def finish(process: subprocess.Popen[bytes]) -> None:
  """Waits for a run that has to end well."""
  said = process.communicate(timeout=600)[0].decode(errors="replace")
  if process.returncode != 0:
    raise AssertionError(f"the run ended with {process.returncode}:\n{said}")


def undisturbed(arguments: list[str], cache: Path, checkpoints: Path) -> float:
  """Runs to the end; the seconds until a life's worth of steps was saved."""
  began = time.perf_counter()
  process = start(arguments, cache)
  while process.poll() is None and max(saved(checkpoints), default=0) < STEPS_PER_KILL:
    time.sleep(0.02)
  seconds = time.perf_counter() - began
  finish(process)
  return seconds


def kill(process: subprocess.Popen[bytes], checkpoints: Path, moment: str, after: float) -> Kill:
  """Kills it `after` so many seconds, from the start of a save if that is the moment.

  Sooner where it has done a life's worth of steps: the machine may be faster now.
  """
  began, before = time.perf_counter(), drafts(checkpoints)
  enough = max(saved(checkpoints), default=0) + STEPS_PER_KILL - SAVE_EVERY
  while moment == "saving" and drafts(checkpoints) <= before and process.poll() is None:
    time.sleep(0.0005)
  deadline = time.perf_counter() + after
  while time.perf_counter() < deadline and max(saved(checkpoints), default=0) < enough:
    time.sleep(0.0005)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  seconds = time.perf_counter() - began
  return Kill(moment, seconds, saved(checkpoints), len(drafts(checkpoints)))


def drafts(checkpoints: Path) -> set[tuple[str, int]]:
  """The checkpoints that are being written, or that a death left so."""
  found = set()
  for path in checkpoints.glob(DRAFTS):
    with contextlib.suppress(FileNotFoundError):  # it has got its name since
      found.add((path.name, path.stat().st_ino))
  return found


def saved(checkpoints: Path) -> list[int]:
  """The steps that have their final name."""
  return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal())


def state(workdir: Path, step: int) -> list[tuple[str, np.ndarray]]:
  """All that a checkpoint holds."""
  directory = workdir.absolute() / "checkpoints" / str(step)
  tree = ocp.StandardCheckpointer().restore(directory / "state")
  position = json.loads((directory / "input" / "metadata").read_text())
  leaves = jax.tree_util.tree_leaves_with_path((tree, position))
  return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]


def rows(workdir: Path) -> list[dict[str, Any]]:
  """metrics.jsonl as it is, without times, which nothing can repeat."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines
  ]


def events(workdir: Path) -> Iterator[Event]:
  """The records of TensorBoard's files, in order, up to one cut short."""
  for file in sorted((workdir / "tensorboard").iterdir()):
    content = file.read_bytes()
    while len(content) >= 16:
      (size,) = struct.unpack("<Q", content[:8])
      if len(content) < 16 + size:
        break
      yield Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]


def board(workdir: Path) -> list[tuple[int, str, float]]:
  """What TensorBoard shows: a restart takes back what was written from its step on."""
  shown: list[tuple[int, str, float]] = []
  for event in events(workdir):
    if event.session_log.status == SessionLog.START:
      shown = [point for point in shown if point[0] < event.step]
    shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
  return [point for point in shown if point[1] not in TIMES]


def differences(one: Path, other: Path, step: int) -> list[str]:
  """What is not the same, bit for bit, in two finished runs."""
  found = []
  expected, actual = state(one, step), state(other, step)
  if [name for name, _ in expected] != [name for name, _ in actual]:
    found.append("the names in the checkpoint")
  for (name, a), (_, b) in zip(expected, actual, strict=False):
    if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
      found.append(name)
  if rows(one) != rows(other):
    found.append("metrics.jsonl")
  if board(one) != board(other):
    found.append("TensorBoard")
  return found


def torment(directory: Path, kills: int, seed: int, console: Console) -> list[str]:
  """Runs undisturbed and disturbed; what differs in the end."""
  chance, steps = random.Random(seed), STEPS_PER_KILL * (kills + 1)
  calm, poor, cache = (directory / name for name in ("calm", "disturbed", "compiled"))
  life = undisturbed(command(calm, steps), cache, calm / "checkpoints")
  deaths: list[Kill] = []
  while len(deaths) < kills:
    moment = MOMENTS[len(deaths) % 2]
    process = start(command(poor, steps), cache)
    after = chance.uniform(0, life if moment == "any" else SAVING)
    death = kill(process, poor / "checkpoints", moment, after)
    if process.returncode != -signal.SIGKILL:
      break  # it was done before
    deaths.append(death)
    console.print(
      f"kill {len(deaths):>2} of {kills}: {death.moment:>6}, {death.seconds:5.2f} s into its life, "
      f"checkpoints {death.checkpoints}, {death.drafts} half written"
    )
  finish(start(command(poor, steps), cache))
  different = differences(calm, poor, steps)
  table = Table("killed", "times", "with a checkpoint half written", "with none complete")
  for moment in MOMENTS:
    some = [death for death in deaths if death.moment == moment]
    halves, none = sum(d.drafts > 0 for d in some), sum(not d.checkpoints for d in some)
    table.add_row(moment, str(len(some)), str(halves), str(none))
  console.print(table)
  if len(deaths) < kills:
    different.append(f"only {len(deaths)} kills, for the run was done")
  return different


def main() -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  console = Console(highlight=False, soft_wrap=True)
  with tempfile.TemporaryDirectory() as directory:
    different = torment(Path(directory), options.kills, options.seed, console)
  if different:
    console.print(f"[red]Not the same as undisturbed:[/] {', '.join(different)}")
    return 1
  console.print(
    f"[green]Killed {options.kills} times[/]: parameters, optimizer state, statistics, input "
    "position and metrics are those of the undisturbed run, bit for bit."
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
