"""Ctrl-C as a request: the first one asks, the second one insists."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
  """Becomes true when the process is asked to stop."""

  signal: int | None = None

  def __bool__(self) -> bool:
    return self.signal is not None


@contextmanager
def requests() -> Iterator[Interrupt]:
  """Turns the first SIGINT or SIGTERM within this context into a true `Interrupt`.

  The next one acts as usual (KeyboardInterrupt, termination), for those who cannot wait.
  Outside the main thread, where Python allows no handlers, it does nothing.
  """
  interrupt = Interrupt()
  if threading.current_thread() is not threading.main_thread():
    yield interrupt
    return
  before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

  def restore() -> None:
    for number, handler in before.items():
      signal.signal(number, handler)

  def request(number: int, frame: FrameType | None) -> None:
    interrupt.signal = number
    restore()

  for number in before:
    signal.signal(number, request)
  try:
    yield interrupt
  finally:
    restore()
