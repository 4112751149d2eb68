"""Every key of a config: its default, what it may be, what it means, whether a run may change it.

The defaults of a config, the checks before any work and `--help` are all made from `SECTIONS`.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

LARGEST_LOSS_SCALE = 2**24  # times the smallest float16 is 1; below 1 there is nothing to save

# Whether a key may change when a run goes on in its directory.
FIXED = "fixed"  # what was saved would mean something else
FREE = "free"  # it may, and the directory notes it
PLACE = "place"  # where the run is and what it reads; of no concern to the run itself


class Allowed(NamedTuple):
  """What a value may be, in words and as a test."""

  words: str  # as in "must be ..."
  test: Callable[[Any], bool]
  names: tuple[str, ...] = ()  # all of them, where they can be listed


def numbers(
  low: float, high: float = math.inf, *, above: bool = False, below: bool = False, or_zero: str = ""
) -> Allowed:
  """Finite numbers from `low` to `high`, which are allowed themselves unless `above` and `below`.

  `or_zero` says what 0 means, where it is allowed besides.
  """
  words = f"{'above' if above else 'at least'} {low}"
  if high < math.inf:
    words += f" and {'below' if below else 'at most'} {high}"

  def test(value: Any) -> bool:  # of NaN, every comparison is false
    return (low < value if above else low <= value) and (
      value < high if below or high == math.inf else value <= high
    )

  if or_zero:
    return Allowed(f"0 for {or_zero}, or {words}", lambda value: value == 0 or test(value))
  return Allowed(words, test)


def names(*allowed: str) -> Allowed:
  return Allowed(f"one of {', '.join(allowed)}", lambda value: value in allowed, allowed)


def text(words: str, pattern: str) -> Allowed:
  return Allowed(words, lambda value: re.fullmatch(pattern, value) is not None)


SWITCH = Allowed("True or False", lambda value: isinstance(value, bool))
STAGES = Allowed(
  "a positive whole number for each stage",
  lambda value: bool(value) and all(isinstance(n, int) and n > 0 for n in value),
)
COUNT = numbers(1)
SHARE = numbers(0, 1, below=True)


class Key(NamedTuple):
  default: Any
  allowed: Allowed
  meaning: str
  change: str = FIXED


SECTIONS: dict[str, dict[str, Key]] = {
  "What is learned": {
    "dataset": Key(
      "digits", names("digits", "mnist", "fashion_mnist", "cifar10"), "see examples/data"
    ),
    "augment": Key("none", names("none", "shift", "flip_shift"), "of the training images"),
    "data_dir": Key(
      "", text("a folder, or empty", ".*"), "where the files are; empty: data/DATASET", PLACE
    ),
    "download": Key(True, SWITCH, "whether missing files may be fetched", PLACE),
  },
  "The network (examples/models.py)": {
    "model": Key("resnet", names("mlp", "vgg", "resnet", "nf_resnet"), "the kind of network"),
    "widths": Key((16, 32), STAGES, "width of each stage, as in 16,32"),
    "blocks": Key((1, 1), STAGES, "blocks in each stage, as in 1,1"),
    "patch": Key(1, COUNT, "side of the squares of pixels that become one position"),
    "skip": Key(True, SWITCH, "whether a ResNet has its skip connections"),
    "norm": Key(
      "batch",
      names(
        *("batch", "renorm", "whitening", "iternorm", "none"),
        *("layer", "group", "instance", "rms"),
      ),
      "see examples/norms.py",
    ),
    "norm_options": Key(
      "",
      text("NAME=VALUE,..., or empty", ".*"),
      "what else the norm takes, as in channels=4,epsilon=1e-3",
    ),
    "norm_momentum": Key(0.9, SHARE, "share of the running statistics that a step keeps"),
    "virtual_batch_size": Key(
      "global",
      text("global, device, or a number of examples", r"global|device|\d+"),
      "examples that are normalized together",
    ),
    "dtype": Key("float32", names("float32", "bfloat16", "float16"), "of the computation"),
  },
  "How it is learned (examples/optimizers.py)": {
    "optimizer": Key("adamw", names("adamw", "sgd"), "what makes a step of a gradient"),
    "learning_rate": Key(3e-3, numbers(0, above=True), "the peak, after the warmup", FREE),
    "warmup_steps": Key(
      50, numbers(0), "steps in which the rate grows to its peak; fewer than steps", FREE
    ),
    "weight_decay": Key(0.05, numbers(0), "of kernels, times the learning rate", FREE),
    "adaptive_clip": Key(
      0.0,
      numbers(0, above=True, or_zero="no limit"),
      "longest gradient as a share of its weights, such as 0.01",
      FREE,
    ),
    "label_smoothing": Key(0.0, SHARE, "share of the target spread evenly over the classes"),
    "batch_size": Key(128, COUNT, "examples in a step, over all devices"),
    "steps": Key(500, numbers(1, 2**31 - 1), "until the end of the run", FREE),
    "seed": Key(0, numbers(0, 2**32 - 1), "of the weights, the order of the data and augmentation"),
  },
  "Devices (examples/parallelism.py, microbatches.py)": {
    "devices": Key(0, numbers(0), "how many to use, over all processes; 0: all", FREE),
    "parallelism": Key("pmap", names("pmap", "shard_map", "jit"), "how they share a step", FREE),
    "microbatches": Key(1, COUNT, "that a device cuts its share of a batch into"),
    "microbatch_statistics": Key(
      "each", names("each", "merged"), "whose statistics normalize: its own, or the batch's"
    ),
  },
  "Processes (examples/hosts.py)": {
    "coordinator": Key(
      "",
      text("HOST:PORT, auto, or empty", r"(auto|.+:\d+)?"),
      "where process 0 listens; auto: the cluster knows; empty: a single process",
      PLACE,
    ),
    "processes": Key(1, COUNT, "how many there are", PLACE),
    "process_id": Key(0, numbers(0), "which of them this is", PLACE),
    "peer_timeout": Key(30, COUNT, "seconds until a silent process counts as dead", PLACE),
  },
  "When numbers run out": {
    "loss_scale": Key(
      0.0,
      numbers(1, LARGEST_LOSS_SCALE, or_zero="none"),
      "at first, such as 32768 for float16; it adapts",
    ),
    "skip_nonfinite": Key(
      0,
      numbers(0, 2**30),
      "steps in a row with NaN or infinity that are skipped; 0: the first ends the run",
      FREE,
    ),
  },
  "What is kept": {
    "workdir": Key(
      "runs/digits", text("a folder", r".*\S.*"), "the run: results, checkpoints", PLACE
    ),
    "eval_batch_size": Key(512, COUNT, "in tests, over all devices; any gives the same", FREE),
    "log_every": Key(20, COUNT, "steps between rows of metrics", FREE),
    "eval_every": Key(100, COUNT, "steps between tests", FREE),
    "diagnose_every": Key(
      0,
      numbers(1, or_zero="none"),
      "steps between diagnoses of the batch norms, besides the last; 0: none",
      FREE,
    ),
    "save_every": Key(100, COUNT, "steps between checkpoints", FREE),
    "keep": Key(3, COUNT, "checkpoints, of which older ones are deleted", FREE),
  },
}
KEYS: dict[str, Key] = {name: key for keys in SECTIONS.values() for name, key in keys.items()}
