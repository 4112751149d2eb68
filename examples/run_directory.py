"""A run's directory: whose it is, what may change in it, and the notes of what did."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from examples import command_line
from examples.keys import FIXED, KEYS, PLACE
from examples.settings import UserError, defaults, write_atomically

CONFIG, CHANGES = "config.json", "changes.jsonl"

Changes = dict[str, tuple[Any, Any]]  # what each key was and is


def read_config(directory: Path) -> ml_collections.ConfigDict:
  """The config of the run in `directory`, as it was last."""
  file = directory / CONFIG
  if not file.exists():
    raise UserError(f"{str(directory)!r} holds no run: there is no {CONFIG} in it")
  config = defaults("digits")
  for key, value in json.loads(file.read_text()).items():
    if key in config:
      config[key] = tuple(value) if isinstance(value, list) else value
  config.workdir = str(directory)
  return config


def claim(directory: Path, config: Any, command: Sequence[str]) -> Changes:
  """Makes `directory` this config's, or refuses it where it is another's.

  Writes config.json the first time and compares with it every other time.

  Returns:
    The keys that may change and did; `note` is for when they come into force.
  """
  changes = _differences(directory, config)
  fixed = {key: change for key, change in changes.items() if KEYS[key].change == FIXED}
  if fixed:
    other = command_line.changed(command, workdir=free(directory))
    raise UserError(
      f"config.workdir is {str(directory)!r}, which holds a run of another config "
      f"({words(fixed)}); give this one a directory of its own: {other}"
    )
  if not (directory / CONFIG).exists():
    try:
      directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file is there, or is above it, or nobody may write there
      raise UserError(
        f"config.workdir is {str(directory)!r}, which cannot be made ({error.strerror}); try "
        f"--config.workdir=runs/{directory.name}"
      ) from error
    _write(directory, config)
  return changes


def note(directory: Path, config: Any, changes: Changes, step: int) -> None:
  """Notes what has changed after `step` steps: first in changes.jsonl, then in config.json."""
  with (directory / CHANGES).open("a") as file:
    for key, (was, now) in changes.items():
      row = {"step": step, "time": time.time(), "key": key, "was": was, "now": now}
      file.write(json.dumps(row) + "\n")
  _write(directory, config)


def words(changes: Changes) -> str:
  return ", ".join(f"{key} was {was!r} and is now {now!r}" for key, (was, now) in changes.items())


def _differences(directory: Path, config: Any) -> Changes:
  """What the run in `directory` was and `config` is, but for where it is."""
  if not (directory / CONFIG).exists():
    return {}
  was, now = (json.loads(c.to_json()) for c in (read_config(directory), config))
  return {
    key: (was[key], now[key])
    for key, spec in KEYS.items()
    if spec.change != PLACE and was[key] != now[key]
  }


def _write(directory: Path, config: Any) -> None:
  text = json.dumps(json.loads(config.to_json()), indent=2) + "\n"
  write_atomically(directory / CONFIG, text)


def free(directory: Path) -> Path:
  """The first of NAME-2, NAME-3, ... that is not taken."""
  number = 2
  while (free := directory.with_name(f"{directory.name}-{number}")).exists():
    number += 1
  return free
