"""Ctrl-C: asked once, insisted on the second time, and nobody's business afterwards."""

import os
import signal
import threading

import pytest

from examples import interrupts


@pytest.fixture(autouse=True)
def as_python_starts():
  """Whatever the process that started this one ignores, as shells do in the background."""
  handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
  before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request(number):
  before = signal.getsignal(number)
  with interrupts.requests() as interrupt:
    assert not interrupt
    os.kill(os.getpid(), number)
    assert interrupt
    assert interrupt.signal == number
    assert signal.getsignal(number) == before
  assert signal.getsignal(number) == before


def test_second_ctrl_c_is_not_held_up():
  with interrupts.requests() as interrupt:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert interrupt


def test_works_outside_the_main_thread():
  seen = []

  def work():
    with interrupts.requests() as interrupt:
      seen.append(bool(interrupt))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [False]
