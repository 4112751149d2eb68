"""The command line: what it changes in a config, its help, and the commands that a run suggests."""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from examples import settings
from examples.keys import FREE, SECTIONS
from examples.launch import LAUNCHED
from examples.settings import UserError, nearest

PLACED = ("coordinator", "processes", "process_id")  # what it tells each of them
WIDTH = 100
HELP = """\
Trains an image classifier with synchronized batch normalization.

  {python} -m examples.train --config=configs/digits.py
  {python} -m examples.train --config=configs/digits.py \\
    --config.batch_size=256 --config.workdir=runs/digits-256

--config=FILE comes first; --config.KEY=VALUE changes a key of it. The files here are
{files}.
Results go to config.workdir, and the same command run again goes on there. Keys with a * may have
another value when it does; for another value of the rest, give another workdir.
Ctrl-C saves and stops; twice, it just stops.

Each key, with its meaning | what it may be | what it is in {file}:
"""


def parse(argv: Sequence[str], default: str) -> ml_collections.ConfigDict:
  """The config of `--config=FILE`, changed by each `--config.KEY=VALUE`.

  Args:
    argv: the command line, program name first.
    default: the config file where none is given.

  Raises:
    UserError: it cannot be understood, or a value is none that its key allows.
  """
  as_filed = _parse([argv[0], f"--config={_config_file(argv, default)}"], default)
  _check_order(argv)
  _check_keys(argv, as_filed)
  try:
    config = _parse(argv, default)
  except flags.IllegalFlagValueError as error:
    # "flag --config.KEY=VALUE: what Python's conversion said"
    key, value = str(error).removeprefix("flag --config.").split(":", 1)[0].split("=", 1)
    raise UserError(
      f"config.{key} is {value!r}, but must be of type {type(as_filed[key]).__name__}, "
      f"such as --config.{key}={settings.shown(as_filed[key])}"
    ) from None
  except flags.UnrecognizedFlagError as error:
    raise UserError(
      f"--{error.flagname} is not an option; only --config=FILE and --config.KEY=VALUE are"
      f"{nearest('config.' + error.flagname, ['config', *(f'config.{k}' for k in as_filed)])}"
    ) from None
  except flags.Error as error:
    raise UserError(str(error).replace("\n", " ")) from None
  settings.check_each(config)
  return config


def _config_file(argv: Sequence[str], default: str) -> str:
  """The value of --config in either of its two spellings; the last one counts."""
  file = default
  for i, argument in enumerate(argv):
    if re.match(r"--?config=", argument):
      file = argument.split("=", 1)[1]
    elif argument in ("--config", "-config") and i + 1 < len(argv):
      file = argv[i + 1]
  if not Path(file).is_file():
    files = _config_files()
    raise UserError(
      f"--config is {file!r}, which is not a file; the configs here are "
      f"{', '.join(files) or 'none'}{nearest(file, files)}"
    )
  return file


def _config_files() -> list[str]:
  return sorted(path.as_posix() for path in Path("configs").glob("[a-z]*.py"))


def _check_order(argv: Sequence[str]) -> None:
  """Refuses a file that comes after a key: it would undo what the key has changed."""
  files = [i for i, argument in enumerate(argv) if re.match(r"--?config(=|$)", argument)]
  keys = [i for i, argument in enumerate(argv) if re.match(r"--?config\.", argument)]
  if files and keys and keys[0] < files[-1]:
    i = files[-1]
    end = i + (1 if "=" in argv[i] else 2)
    right = [*argv[i:end], *argv[1:i], *argv[end:]]
    raise UserError(
      f"{argv[i]} comes after {argv[keys[0]]}, but the file has to come before the keys that "
      f"change it; try {shlex.join(right)}"
    )


def _check_keys(argv: Sequence[str], config: ml_collections.ConfigDict) -> None:
  """Refuses the first `--config.KEY` that `config` lacks, with the nearest one it has."""
  for argument in argv[1:]:
    match = re.match(r"--?config\.([^=]*)", argument)
    if match and match[1] not in config:
      raise UserError(
        f"--config.{match[1]} is not a key of this config, whose keys are "
        f"{', '.join(config)}{nearest(match[1], config)}; --help says what they mean"
      )


def _parse(argv: Sequence[str], default: str) -> ml_collections.ConfigDict:
  # A set of flags of its own: the global one can be parsed once per process only.
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", default, flag_values=values, sys_argv=list(argv), lock_config=True
  )
  rest = values(list(argv))
  if len(rest) > 1:
    raise UserError(
      f"the argument {rest[1]!r} is not understood; only --config=FILE and "
      f"--config.KEY=VALUE are: did you mean --config.{rest[1].lstrip('-')}?"
    )
  return values.config


def show_help(argv: Sequence[str], default: str) -> str:
  """What `--help` says: every key with its meaning, its range and its value in the config file."""
  file = _config_file(argv, default)
  config = _parse([argv[0], f"--config={file}"], default)
  lines = [HELP.format(python=python(), files=", ".join(_config_files()), file=file)]
  for section, keys in SECTIONS.items():
    lines.append(f"{section}:")
    for name, key in keys.items():
      star = "*" if key.change == FREE else " "
      value = settings.shown(config[name]) or "empty"
      lines.append(
        textwrap.fill(
          f"{key.meaning} | {key.allowed.words} | {value}",
          WIDTH,
          initial_indent=f" {star}{name:<23}",
          subsequent_indent=" " * 25,
        )
      )
    lines.append("")
  return "\n".join(lines)


def python() -> str:
  """This interpreter, as it is called from here."""
  here, path = Path.cwd(), Path(sys.executable)
  return str(path.relative_to(here) if path.is_relative_to(here) else path)


def command(argv: Sequence[str], as_module: bool) -> list[str]:
  """What started this program, and starts it again from here."""
  count = os.environ.get(LAUNCHED)
  if count:  # each process was told its place, on a port that will be another's
    given = [a for a in argv[1:] if not a.startswith(tuple(f"--config.{key}=" for key in PLACED))]
    return [python(), "-m", "examples.launch", count, *given]
  return [python(), *(["-m", "examples.train"] if as_module else [argv[0]]), *argv[1:]]


def changed(command: Sequence[str], **changes: Any) -> str:
  """`command` with these keys set to these values, as a line for the shell."""
  kept = [a for a in command if not a.startswith(tuple(f"--config.{key}=" for key in changes))]
  given = [f"--config.{key}={settings.shown(value)}" for key, value in changes.items()]
  return shlex.join([*kept, *given])
