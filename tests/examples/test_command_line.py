"""The command line: what it changes, what it refuses, its help, and the commands it gives back."""

import re
import shlex
import sys

import pytest

from examples import command_line, settings
from examples.keys import KEYS
from examples.launch import LAUNCHED
from examples.settings import UserError

# ml_collections loads config files by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DIGITS = "configs/digits.py"


def parse(*arguments):
  return command_line.parse(["train.py", *arguments], DIGITS)


def test_command_line_changes_the_config():
  config = parse(
    "--config=configs/fashion_mnist.py", "--config.batch_size=64", "--config.widths=3,4"
  )
  assert (config.dataset, config.batch_size, config.widths) == ("fashion_mnist", 64, (3, 4))
  assert parse("--config", DIGITS, "--config.seed", "3").seed == 3
  assert parse().dataset == "digits"


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.batchsize=1", r"--config.batchsize is not a key .*; did you mean 'batch_size'\?"),
    ("--config.batch_size=x", "config.batch_size is 'x', but must be of type int, such as"),
    ("--config=configs/digit.py", "'configs/digit.py', which is not a file.*'configs/digits.py'"),
    ("--batch_size=3", "--batch_size is not an option.*did you mean 'config.batch_size'"),
    ("batch_size=3", "the argument 'batch_size=3' is not understood"),
    ("--config.learning_rate=nan", "config.learning_rate is nan, but must be above 0"),
    ("--config.workdir=", "config.workdir is '', but must be a folder"),
  ],
)
def test_wrong_command_lines_are_refused(argument, message):
  with pytest.raises(UserError, match=message):
    parse(argument)


def test_the_file_comes_before_the_keys_and_the_mend_works():
  for file in ([f"--config={DIGITS}"], ["--config", DIGITS]):
    with pytest.raises(UserError, match="the file has to come before the keys") as refused:
      parse("--config.steps=70", *file, "--config.seed=3")
    mend = shlex.split(str(refused.value).split("; try ")[1])
    config = parse(*mend)
    assert (config.steps, config.seed) == (70, 3)


def test_help_lists_every_key_and_its_commands_work():
  said = command_line.show_help(["train.py", "--help"], DIGITS)
  for name, key in KEYS.items():
    assert re.search(rf"^ [ *]{name} ", said, re.MULTILINE)
    assert key.allowed.words.split()[0] in said
  assert re.search(r"^ \*learning_rate +the peak, .* \| above 0 \| 0.003$", said, re.MULTILINE)
  assert max(map(len, said.splitlines())) <= command_line.WIDTH
  commands = re.findall(r"^  (\S+ -m examples.train (?:.*\\\n)?.*)$", said, re.MULTILINE)
  configs = []
  for command in commands:
    start, *arguments = command.replace("\\\n", " ").split("examples.train")
    assert start.split()[0] == command_line.python()
    configs.append(parse(*shlex.split(arguments[0])))
    settings.check(configs[-1], 4)
  assert len({config.workdir for config in configs}) == len(configs) == 2


def test_help_is_of_the_file_that_is_given():
  said = command_line.show_help(["train.py", "--config", "configs/mnist.py", "-h"], DIGITS)
  assert "what it is in configs/mnist.py:" in said
  assert "| vgg" in said


def test_commands_run_when_pasted(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
  command = command_line.command(["train.py", "--config.workdir=a b", "--config.seed=1"], True)
  again = command_line.changed(command, seed=2, widths=(3, 4))
  assert again == (
    ".venv/bin/python -m examples.train '--config.workdir=a b' --config.seed=2 --config.widths=3,4"
  )
  assert command_line.command(["/x/train.py"], False) == [".venv/bin/python", "/x/train.py"]


def test_the_launcher_is_what_starts_its_processes_again(monkeypatch):
  monkeypatch.setenv(LAUNCHED, "2")
  told = ["--config.coordinator=127.0.0.1:1", "--config.processes=2", "--config.process_id=0"]
  command = command_line.command(["train.py", "--config.seed=1", *told], True)
  assert command[1:] == ["-m", "examples.launch", "2", "--config.seed=1"]
