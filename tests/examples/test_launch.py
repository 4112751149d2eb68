"""The launcher: all end when one fails, and it is said which; test_hosts.py has the real thing."""

import subprocess
import sys
import time

import pytest

from examples import launch


def processes(*scripts):
  return [subprocess.Popen([sys.executable, "-c", script]) for script in scripts]


def test_all_are_waited_for():
  assert launch.wait(processes("pass", "import time; time.sleep(0.3)")) is None


@pytest.mark.parametrize(
  ("failure", "status"),
  [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_when_one_fails_the_others_are_ended(failure, status, monkeypatch, capsys):
  monkeypatch.setattr(launch, "GRACE", 0.2)
  started = processes("import time; time.sleep(600)", failure)
  monkeypatch.setattr(launch, "start", lambda count, arguments: started)
  began = time.monotonic()
  assert launch.main(["launch.py", "2"]) == status
  assert time.monotonic() - began < 60
  assert started[0].returncode == -9
  said = capsys.readouterr().err
  assert said == "" if status == 3 else "process 1 of 2 was ended by SIGKILL" in said


def test_what_the_others_say_has_their_number(capsys):
  process = subprocess.Popen(
    [sys.executable, "-c", "print('one'); print('two')"], stdout=subprocess.PIPE, text=True
  )
  launch.show(3, process)
  process.communicate()
  assert capsys.readouterr().err == "[3] one\n[3] two\n"


def test_the_number_of_processes_is_needed(capsys):
  assert launch.main(["launch.py", "--config.steps=3"]) == 2
  assert "the first argument is the number of processes" in capsys.readouterr().err
