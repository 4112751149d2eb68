"""Several processes as one job: JAX's own runtime, started from the config or by the cluster.

Every process runs the same program on its own devices. Process 0 is the one that prints and writes;
what it finds out before the others, it tells them.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.settings import UserError

LONGEST = 4096  # bytes of a message from process 0


def is_first() -> bool:
  """Whether this is the process that prints, draws and writes."""
  return jax.process_index() == 0


def after_first(work: Callable[[], None]) -> None:
  """Does `work` in process 0 while the others wait; its UserError is raised in all of them."""
  message = b""
  if is_first():
    try:
      work()
    except UserError as error:
      message = str(error).encode()[:LONGEST]
  if jax.process_count() > 1:
    padded = np.frombuffer(message.ljust(LONGEST, b"\0"), np.uint8)
    message = multihost_utils.broadcast_one_to_all(padded).tobytes().rstrip(b"\0")
  if message:
    raise UserError(message.decode(errors="replace"))
