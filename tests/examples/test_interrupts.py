"""Ctrl-C: asked once, insisted on the second time, and nobody's business afterwards."""

import os
import signal
import subprocess
import sys
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


def test_while_importing_ctrl_c_ends_in_a_line():
  code = (
    "import os, signal; from examples import interrupts; interrupts.during_imports()\n"
    "try: os.kill(os.getpid(), signal.SIGINT)\n"
    "except BaseException: print('caught by an import')"
  )
  ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", f"{interrupts.STOPPED}\n")


def test_after_imports_it_is_an_exception_again():
  interrupts.during_imports()
  interrupts.after_imports()
  with pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)


def test_who_ignores_ctrl_c_goes_on_ignoring_it():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  interrupts.during_imports()
  interrupts.after_imports()
  assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
