"""Several processes as one job: JAX's own runtime, joined as the config or the cluster says.

Every process runs the same program on its own devices and holds its own share of every batch.
Process 0 is the one that prints, draws and writes. When one dies, the others end too, within
config.peer_timeout: what they would compute without it is another training.
"""

import collections
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.settings import UserError

T = TypeVar("T")

CONNECT_TIMEOUT = 300  # seconds until all processes must have started
PATIENCE = 15  # seconds before it is said that some are missing
LONGEST = 4096  # bytes of a message from process 0
LAG = 2  # steps between a request to stop and its being granted, so that no step waits for it
LINGER = 2  # seconds that process 0 outlives its own mistakes, lest the others only miss it


def join(config: Any) -> None:
  """Meets the other processes that the config or the cluster names; alone, does nothing.

  To be called before anything asks for devices.
  """
  if not config.coordinator:
    if (config.processes, config.process_id) != (1, 0):
      raise UserError(
        f"config.processes is {config.processes} and config.process_id is {config.process_id}, "
        "but config.coordinator is not given; try --config.coordinator=HOST:PORT, where process 0 "
        "listens, or auto on a cluster that JAX knows"
      )
    return
  where: dict[str, Any] = {}
  if config.coordinator != "auto":
    _check(config)
    where = {
      "coordinator_address": config.coordinator,
      "num_processes": config.processes,
      "process_id": config.process_id,
      "cluster_detection_method": "deactivate",
    }
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  _hush_gloo()
  patience = threading.Timer(PATIENCE, _say_that_it_waits, [config])
  patience.start()
  try:
    jax.distributed.initialize(
      **where,
      initialization_timeout=CONNECT_TIMEOUT,
      heartbeat_timeout_seconds=config.peer_timeout,
      shutdown_timeout_seconds=config.peer_timeout,
    )
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"config.coordinator is {config.coordinator!r}, but nothing comes of that "
      f"({_first_line(error)}); give HOST:PORT of process 0, with a port that is free there, or "
      "auto on a cluster that JAX knows"
    ) from error
  finally:
    patience.cancel()


def _hush_gloo() -> None:
  """Keeps from the user what Gloo writes to the standard output, past Python: who is connected.

  Its threads write into each other's lines, so that what is theirs cannot be told from others', of
  which there are none: what else is not Python goes to the standard error.
  """
  sys.stdout.flush()
  sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="replace")
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  os.close(nowhere)


def _say_that_it_waits(config: Any) -> None:
  print(
    f"Waiting for the other processes at {config.coordinator}, up to {CONNECT_TIMEOUT} seconds. "
    "All need the same --config.coordinator and each its own --config.process_id.",
    file=sys.stderr,
    flush=True,
  )


def _check(config: Any) -> None:
  host, _, port = config.coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError(
      f"config.coordinator is {config.coordinator!r}, but must be HOST:PORT, such as "
      "10.0.0.1:1234, or auto, or empty for a single process"
    )
  if not 0 <= config.process_id < config.processes:
    raise UserError(
      f"config.process_id is {config.process_id} and config.processes is {config.processes}, but "
      "the processes count from 0 to one less than their number"
    )


def is_first() -> bool:
  """Whether this is the process that prints, draws and writes."""
  return jax.process_index() == 0


def in_turn(work: Callable[[], T]) -> T:
  """What `work` gives, in process 0 and then in the others; its UserError in the first is all's."""
  if jax.process_count() == 1:
    return work()
  result, message = None, b""
  if is_first():
    try:
      result = work()
    except UserError as error:
      message = str(error).encode()[:LONGEST]
  padded = np.frombuffer(message.ljust(LONGEST, b"\0"), np.uint8)
  message = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0")
  if message:
    raise UserError(message.decode(errors="replace"))
  return result if is_first() else work()  # type: ignore[return-value]


class Agreement:
  """Stops all processes after the same step when any of them is asked to."""

  def __init__(self) -> None:
    self._several = jax.process_count() > 1
    self._asked: collections.deque[jax.Array] = collections.deque()
    if self._several:
      first = {d.process_index: d for d in reversed(jax.devices())}
      devices = np.array([first[i] for i in sorted(first)])
      mesh = jax.sharding.Mesh(devices, ("process",))
      self._own = jax.NamedSharding(mesh, jax.P("process"))
      self._any = jax.jit(lambda x: x.any(), out_shardings=jax.NamedSharding(mesh, jax.P()))

  def reached(self, asked: bool) -> bool:
    """Whether to stop now; to be called once per step, with whether this process is asked to."""
    if not self._several:
      return asked
    mine = jax.make_array_from_process_local_data(self._own, np.array([asked]))
    self._asked.append(self._any(mine))
    return len(self._asked) > LAG and bool(self._asked.popleft())


def is_loss(error: Exception) -> bool:
  """Whether this is how JAX says that another process can no longer be reached."""
  status = re.match("UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED", str(error))
  return jax.distributed.is_initialized() and status is not None


def wait_for_verdict(error: Exception, timeout: float) -> int:
  """Says what happened and lets JAX say to whom: its heartbeats find out, and end this process.

  Returns the exit status, should they not.
  """
  print(
    f"error: process {jax.process_index()} of {jax.process_count()} stops, because another one is "
    f"gone ({_first_line(error)}). JAX says below which of them it no longer hears from, within "
    f"{timeout} seconds. Start all of them again, and they go on from the last checkpoint.",
    file=sys.stderr,
    flush=True,
  )
  time.sleep(2 * timeout)
  return 1


def leave(code: int, together: bool) -> int:
  """The last thing to do: returns `code`, once all are done or because this one cannot go on."""
  if not jax.distributed.is_initialized():
    return code
  if together:
    jax.distributed.shutdown()
    return code
  if is_first():
    time.sleep(LINGER)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)  # not to wait for what the others will never do


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else type(error).__name__
