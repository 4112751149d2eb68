"""Ctrl-C as a request: the first one asks, the second one insists."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = "Stopped without saving; what was saved before is kept."


def during_imports() -> None:
  """Until `after_imports`, Ctrl-C says in a line that it stops: not where in whose code it did."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)


def after_imports() -> None:
  """Makes Ctrl-C a KeyboardInterrupt again."""
  if signal.getsignal(signal.SIGINT) is _stop:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: FrameType | None) -> None:
  print(STOPPED, file=sys.stderr, flush=True)
  os._exit(128 + number)  # an exception might be caught by whoever is imported


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
