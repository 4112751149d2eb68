"""The config: its keys, the command line that changes them, and the checks before any work.

Whatever a user can get wrong here raises `UserError`, in one sentence that names the
argument, what was given, what is allowed, and the likely mend.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

T = TypeVar("T")

# Where and on what a run runs, not what it computes: these may change when it resumes.
FREE_KEYS = (
  *("workdir", "data_dir", "download", "devices", "parallelism", "keep"),
  *("coordinator", "processes", "process_id", "peer_timeout"),
)

LARGEST_LOSS_SCALE = 2.0**24  # times the smallest float16 is 1; below 1 there is nothing to save


class UserError(Exception):
  """A mistake in what the user gave: shown as one line, without a traceback."""


class Failure(Exception):
  """What stops a run through no mistake in the command: shown as one line too.

  A full disk, a process that died: once that is mended, the same command goes on.
  """


def defaults(name: str) -> ml_collections.ConfigDict:
  """Every key that the trainer knows; the files in configs/ say what differs."""
  config = ml_collections.ConfigDict()
  # What is learned.
  config.dataset = name  # see examples/data
  config.augment = "none"  # of the training images: none, shift, flip_shift
  config.data_dir = ""  # where the files are; empty: where examples/data looks by itself
  config.download = True  # whether files that are missing may be fetched
  # The network; see examples/models.py.
  config.model = "resnet"
  config.widths = (16, 32)  # of each stage
  config.blocks = (1, 1)  # in each stage
  config.patch = 1  # side of the squares of pixels that become one position
  config.skip = True  # whether a ResNet has its skip connections, or is a plain network
  config.norm = "batch"  # see examples/norms.py
  config.norm_options = ""  # what else the norm takes, such as channels=4,epsilon=1e-3
  config.norm_momentum = 0.9  # share of the old running statistics kept at each step
  config.virtual_batch_size = "global"  # examples normalized together: a number, device or global
  config.dtype = "float32"  # of the computation: float32, bfloat16 or float16
  # How it is learned; see examples/optimizers.py.
  config.optimizer = "adamw"
  config.learning_rate = 3e-3  # the peak, after the warmup
  config.warmup_steps = 50
  config.weight_decay = 0.05
  config.adaptive_clip = 0.0  # longest gradient, as a share of its weights, such as 0.01; 0: any
  config.label_smoothing = 0.0
  config.batch_size = 128  # over all devices
  config.steps = 500
  config.seed = 0
  config.devices = 0  # how many to use, over all processes; 0: all
  config.parallelism = "pmap"  # or shard_map, or jit; see examples/parallelism.py
  config.microbatches = 1  # that a device cuts its share into; see examples/microbatches.py
  config.microbatch_statistics = "each"  # or merged
  # Where the other processes are; see examples/hosts.py.
  config.coordinator = ""  # HOST:PORT of process 0; auto: the cluster knows; empty: alone
  config.processes = 1
  config.process_id = 0
  config.peer_timeout = 30  # seconds after which a process that does not answer counts as dead
  # What happens when numbers run out; see examples/optimizers.py.
  config.loss_scale = 0.0  # at first, such as 32768 for float16; 0: no loss scaling
  config.skip_nonfinite = 0  # steps in a row that may be skipped; 0: the first ends the run
  # What is kept of it.
  config.workdir = f"runs/{name}"
  config.eval_batch_size = 512  # over all devices; any size gives the same result
  config.log_every = 20  # steps
  config.eval_every = 100
  config.save_every = 100
  config.keep = 3  # checkpoints
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


def from_command_line(argv: Sequence[str], default: str) -> ml_collections.ConfigDict:
  """The config of `--config=FILE`, changed by each `--config.KEY=VALUE`.

  Args:
    argv: the command line, program name first.
    default: the config file where none is given.
  """
  file = _config_file(argv, default)
  if not Path(file).is_file():
    names = sorted(p.as_posix() for p in Path("configs").glob("[a-z]*.py"))
    raise UserError(
      f"--config is {file!r}, which is not a file; the configs here are "
      f"{', '.join(names) or 'none'}{nearest(file, names)}"
    )
  as_filed = _parse([argv[0], f"--config={file}"], default)
  _check_keys(argv, as_filed)
  try:
    return _parse(argv, default)
  except flags.IllegalFlagValueError as error:
    # "flag --config.KEY=VALUE: what Python's conversion said"
    key, value = str(error).removeprefix("flag --config.").split(":", 1)[0].split("=", 1)
    raise UserError(
      f"config.{key} is {value!r}, but must be of type {type(as_filed[key]).__name__}, "
      f"such as --config.{key}={as_filed[key]}"
    ) from None
  except flags.UnrecognizedFlagError as error:
    raise UserError(
      f"--{error.flagname} is not an option; only --config=FILE and --config.KEY=VALUE are"
      f"{nearest('config.' + error.flagname, ['config', *(f'config.{k}' for k in as_filed)])}"
    ) from None
  except flags.Error as error:
    raise UserError(str(error).replace("\n", " ")) from None


def _config_file(argv: Sequence[str], default: str) -> str:
  """The value of --config in either of its two spellings; the last one counts."""
  for i in range(len(argv) - 1, 0, -1):
    if re.match(r"--?config=", argv[i]):
      return argv[i].split("=", 1)[1]
    if argv[i - 1] in ("--config", "-config"):
      return argv[i]
  return default


def _check_keys(argv: Sequence[str], config: ml_collections.ConfigDict) -> None:
  """Refuses the first `--config.KEY` that `config` lacks, with the nearest one it has."""
  for argument in argv[1:]:
    match = re.match(r"--?config\.([^=]*)", argument)
    if match and match[1] not in config:
      raise UserError(
        f"--config.{match[1]} is not a key of this config, whose keys are "
        f"{', '.join(config)}{nearest(match[1], config)}"
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


def check(config: ml_collections.ConfigDict, device_count: int) -> None:
  """Refuses settings that cannot work, before anything is loaded or compiled."""
  for key in ("batch_size", "eval_batch_size"):
    size = config[key]
    if size < 1 or size % device_count:
      below = max(size - size % device_count, device_count)
      raise UserError(
        f"config.{key} is {size}, but must be a positive multiple of the {device_count} "
        f"devices that share it; try --config.{key}={below} or --config.devices=1"
      )
  _check_microbatches(config, device_count)
  virtual_batch_size(config, device_count)
  for key in ("steps", "log_every", "eval_every", "save_every", "keep", "patch", "peer_timeout"):
    if config[key] < 1:
      raise UserError(f"config.{key} is {config[key]}, but must be at least 1")
  if not 0 <= config.warmup_steps < config.steps:
    raise UserError(
      f"config.warmup_steps is {config.warmup_steps}, but must be at least 0 and below "
      f"config.steps, {config.steps}; try --config.warmup_steps={config.steps // 10}"
    )
  widths, blocks = tuple(config.widths), tuple(config.blocks)
  natural = all(isinstance(number, int) and number > 0 for number in widths + blocks)
  if len(widths) != len(blocks) or not widths or not natural:
    raise UserError(
      f"config.widths is {widths} and config.blocks is {blocks}, but both must have one "
      "positive whole number for each stage of the network, as in --config.widths=16,32 "
      "--config.blocks=1,1"
    )
  lookup(dict.fromkeys(("float32", "bfloat16", "float16")), config.dtype, "config.dtype")
  if config.skip_nonfinite < 0:
    raise UserError(f"config.skip_nonfinite is {config.skip_nonfinite}, but must be at least 0")
  if not 0 <= config.adaptive_clip < math.inf:
    raise UserError(
      f"config.adaptive_clip is {config.adaptive_clip}, but must be 0 for none, or positive; "
      "try --config.adaptive_clip=0.01"
    )
  if config.loss_scale and not 1 <= config.loss_scale <= LARGEST_LOSS_SCALE:
    raise UserError(
      f"config.loss_scale is {config.loss_scale}, but must be 0 for none, or from 1 to "
      f"{LARGEST_LOSS_SCALE:.0f}; try --config.loss_scale=32768"
    )


def _check_microbatches(config: ml_collections.ConfigDict, device_count: int) -> None:
  share, count = config.batch_size // device_count, config.microbatches
  if count < 1 or share % count:
    fitting = ", ".join(map(str, divisors(share)))
    raise UserError(
      f"config.microbatches is {count}, but must divide the {share} examples of each of the "
      f"{device_count} devices: choose one of {fitting}, or another config.batch_size"
    )
  choices = dict.fromkeys(("each", "merged"))
  lookup(choices, config.microbatch_statistics, "config.microbatch_statistics")


def virtual_batch_size(config: ml_collections.ConfigDict, device_count: int) -> int | None:
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
  if not given.isdecimal() or int(given) not in fitting:
    raise UserError(
      f"config.virtual_batch_size is {given!r}, but must be a number that divides the {share} "
      f"examples that each of the {device_count} devices normalizes at a time, or holds those of "
      f"some of them: choose one of {', '.join(map(str, fitting))}, or device, or global"
    )
  return int(given)


def divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def claim(directory: Path, config: ml_collections.ConfigDict) -> None:
  """Makes `directory` this config's, or refuses it where it is another's.

  Writes config.json the first time and compares with it every other time.
  """
  file = directory / "config.json"
  mine = json.loads(config.to_json())
  if file.exists():
    # A key that a run is older than has, in it, the value by default: what was done before.
    theirs = json.loads(defaults(config.dataset).to_json()) | json.loads(file.read_text())
    keys = [k for k in theirs | mine if k not in FREE_KEYS and theirs.get(k) != mine.get(k)]
    if keys:
      changes = ", ".join(f"{k} was {theirs.get(k)!r} and is now {mine.get(k)!r}" for k in keys)
      raise UserError(
        f"config.workdir is {str(directory)!r}, which holds a run of another config ({changes}); "
        "give this one a directory of its own with --config.workdir=..., or delete that one"
      )
    return
  directory.mkdir(parents=True, exist_ok=True)
  write_atomically(file, json.dumps(mine, indent=2) + "\n")


def write_atomically(file: Path, text: str) -> None:
  """Writes all of `text` or nothing: a reader, or a crash, never meets half a file."""
  draft = file.with_name(file.name + ".draft")
  draft.write_text(text)
  os.replace(draft, file)
