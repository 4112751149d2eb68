"""The settings of a run: their defaults, and the checks before any work.

Whatever a user can get wrong here raises `UserError`, in one sentence that names the
argument, what was given, what is allowed, and the likely mend.
"""

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

from examples.keys import KEYS

T = TypeVar("T")


class UserError(Exception):
  """A mistake in what the user gave: shown as one line, without a traceback."""


class Failure(Exception):
  """What stops a run through no mistake in the command: shown as one line too.

  A full disk, a process that died: once that is mended, the same command goes on.
  """


def defaults(name: str) -> ml_collections.ConfigDict:
  """Every key that the trainer knows; the files in configs/ say what differs."""
  config = ml_collections.ConfigDict({key: spec.default for key, spec in KEYS.items()})
  config.dataset = name
  config.workdir = f"runs/{name}"
  return config


def nearest(given: str, allowed: Iterable[str]) -> str:
  """A hint for a name that is not allowed: `; did you mean 'x'?`, or nothing."""
  close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
  return f"; did you mean {close[0]!r}?" if close else ""


def lookup(table: Mapping[str, T], name: str, argument: str) -> T:
  """`table[name]`, or an error that says what `argument` may be."""
  if name not in table:
    raise UserError(
      f"{argument} is {name!r}, but must be one of {', '.join(table)}{nearest(name, table)}"
    )
  return table[name]


def check_each(config: Any) -> None:
  """Refuses the first value that its key does not allow."""
  for name, key in KEYS.items():
    value = config[name]
    if not key.allowed.test(value):
      names = key.allowed.names
      mend = nearest(value, names) if names else f"; try --config.{name}={shown(key.default)}"
      finite = ", and finite" if value in (math.inf, -math.inf) or value != value else ""
      raise UserError(f"config.{name} is {value!r}, but must be {key.allowed.words}{finite}{mend}")


def shown(value: Any) -> str:
  """A value as it is given on the command line."""
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check(config: Any, device_count: int) -> None:
  """Refuses settings that cannot work, alone or together, before anything is loaded or compiled."""
  check_each(config)
  for key in ("batch_size", "eval_batch_size"):
    size = config[key]
    if size % device_count:
      below = max(size - size % device_count, device_count)
      raise UserError(
        f"config.{key} is {size}, but must be a multiple of the {device_count} "
        f"devices that share it; try --config.{key}={below} or --config.devices=1"
      )
  _check_microbatches(config, device_count)
  virtual_batch_size(config, device_count)
  if config.warmup_steps >= config.steps:
    raise UserError(
      f"config.warmup_steps is {config.warmup_steps}, but must be below config.steps, "
      f"{config.steps}; try --config.warmup_steps={config.steps // 10}"
    )
  widths, blocks = tuple(config.widths), tuple(config.blocks)
  if len(widths) != len(blocks):
    raise UserError(
      f"config.widths is {widths} and config.blocks is {blocks}, but both must have one number for "
      "each stage of the network, as in --config.widths=16,32 --config.blocks=1,1"
    )


def _check_microbatches(config: Any, device_count: int) -> None:
  share, count = config.batch_size // device_count, config.microbatches
  if share % count:
    fitting = ", ".join(map(str, divisors(share)))
    raise UserError(
      f"config.microbatches is {count}, but must divide the {share} examples of each of the "
      f"{device_count} devices: choose one of {fitting}, or another config.batch_size"
    )


def virtual_batch_size(config: Any, device_count: int) -> int | None:
  """How many examples share statistics: a number, or None for those of all devices."""
  given = config.virtual_batch_size
  if given == "global":
    return None
  if config.microbatches > 1 and config.microbatch_statistics == "merged":
    raise UserError(
      f"config.virtual_batch_size is {given!r} and config.microbatch_statistics is 'merged', which "
      "are two sizes for one batch: try --config.microbatch_statistics=each"
    )
  share = config.batch_size // device_count // config.microbatches
  if given == "device":
    return share
  fitting = sorted({*divisors(share), *(share * n for n in divisors(device_count))})
  if int(given) not in fitting:
    raise UserError(
      f"config.virtual_batch_size is {given!r}, but must be a number that divides the {share} "
      f"examples that each of the {device_count} devices normalizes at a time, or holds those of "
      f"some of them: choose one of {', '.join(map(str, fitting))}, or device, or global"
    )
  return int(given)


def divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def write_atomically(file: Path, text: str) -> None:
  """Writes all of `text` or nothing: a reader, or a crash, never meets half a file."""
  draft = file.with_name(file.name + ".draft")
  draft.write_text(text)
  os.replace(draft, file)
