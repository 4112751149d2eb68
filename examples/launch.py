"""Several processes of the trainer on this machine, as one job: what a cluster does, on loopback.

  python -m examples.launch 2 --config=configs/digits.py

Process 0 has the terminal; what the others say is shown with their number. When one fails, all end.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

LAUNCHED = "EXAMPLES_LAUNCH"  # in the environment of what is started: how many there are
GRACE = 10  # seconds in which the others may say what they have lost before they are ended


def main(argv: Sequence[str]) -> int:
  """Runs them; returns the exit status: that of the first that failed, or 0."""
  if len(argv) < 2 or not argv[1].isdecimal() or int(argv[1]) < 1:
    print("error: the first argument is the number of processes, such as 2", file=sys.stderr)
    return 2
  processes = start(int(argv[1]), argv[2:])

  def pass_on(number: int, frame: FrameType | None) -> None:  # asked to stop, they all save
    for process in processes:
      process.send_signal(number)

  before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    failed = wait(processes)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if failed is None:
    return 0
  code = processes[failed].returncode
  if code < 0:
    print(
      f"error: process {failed} of {len(processes)} was ended by {signal.Signals(-code).name}; "
      "the same command goes on from the last checkpoint",
      file=sys.stderr,
    )
  return 128 - code if code < 0 else code


def start(count: int, arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
  """`count` processes that know of each other; process 0 has this one's output."""
  address = f"127.0.0.1:{free_port()}"
  environment = os.environ | {
    "JAX_COORDINATOR_BIND_ADDRESS": address,  # not for the world
    LAUNCHED: str(count),
  }
  processes = []
  for i in range(count):
    place = [f"--config.coordinator={address}", f"--config.processes={count}"]
    piped = None if i == 0 else subprocess.PIPE
    process = subprocess.Popen(
      [sys.executable, "-m", "examples.train", *arguments, *place, f"--config.process_id={i}"],
      env=environment,
      stdout=piped,
      stderr=subprocess.STDOUT if i else None,
      text=True,
      errors="replace",
      start_new_session=True,  # Ctrl-C comes from here, once
    )
    if i:
      threading.Thread(target=show, args=(i, process), daemon=True).start()
    processes.append(process)
  return processes


def free_port() -> int:
  """A port of the loopback interface that nobody uses at the moment."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return int(probe.getsockname()[1])


def show(number: int, process: subprocess.Popen[str]) -> None:
  """Copies what a process says, with its number before each line."""
  assert process.stdout is not None
  for line in process.stdout:
    print(f"[{number}] {line}", end="", file=sys.stderr, flush=True)


def wait(processes: Sequence[subprocess.Popen[str]]) -> int | None:
  """Waits for all; when one fails, ends the others after a while. Which failed first, if any."""
  failed, deadline = None, None
  while any(p.poll() is None for p in processes):
    if failed is None:
      failed = next((i for i, p in enumerate(processes) if p.poll()), None)
      deadline = time.monotonic() + GRACE
    elif deadline is not None and time.monotonic() > deadline:
      for process in processes:
        process.kill()
    time.sleep(0.1)
  return (
    failed
    if failed is not None
    else next((i for i, p in enumerate(processes) if p.returncode), None)
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv))
