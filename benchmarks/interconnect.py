"""How long a training step takes on many chips: a model, from published figures and counts.

    step = max(FLOPs / peak, bytes / memory bandwidth) + the sum over its all-reduces of
    all-reduce = hops * latency + 2 * bytes * (n - 1) / n / rate

A roofline for what a chip does by itself, and the latency-bandwidth model of communication for what
it does with others: an all-reduce is a reduce-scatter and an all-gather, each of which goes half
way round every ring of the torus (`hops` counts both) and uses all its links (`rate`). An axis
without the link that closes the ring is walked from end to end, in one direction at a time.

Sources: Williams et al. 2009 (the roofline), Thakur et al. 2005 (latency and bandwidth), Austin et
al. 2025, "How to scale your model", parts 2 and 3 (collectives on TPUs); `CHIPS` names the rest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from benchmarks.results import Row
from benchmarks.slices import GROUP

HOP = 1e-6  # s: "typically around 1us" (Austin et al., part 3): an assumption of ours
# The same page times an all-gather over 3 hops, of 32 kB, at 8 us instead of 3.
SLOW_HOP = 8e-6 / 3
POD_HOP = 50e-6  # s from pod to pod by the data centre's network: an assumption, without a source
SCALING_BOOK = "https://jax-ml.github.io/scaling-book"


@dataclasses.dataclass(frozen=True)
class Chip:
  """What is published of a chip; rates in one second, `link` in one direction of one link."""

  title: str
  flops: float
  memory_rate: float
  link: float
  shapes: dict[int, tuple[int, ...]]  # of slices, and of blocks in them, by the number of chips
  ring_of: int  # an axis whose length this divides is closed to a ring
  pod: int
  between_pods: float  # bytes a second for each chip
  sources: tuple[str, ...]

  def rings(self, length: int) -> bool:
    """Whether an axis of a slice with this length is closed."""
    return length % self.ring_of == 0


CHIPS = {
  "v5e": Chip(
    title="TPU v5e",
    flops=197e12,
    memory_rate=819e9,
    link=400e9 / 4 / 2,  # of a chip with four links, both directions
    shapes={
      **{1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4)},
      **{32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    },
    ring_of=16,
    pod=256,
    between_pods=6.4e12 / 8 / 256,  # of a pod, in bits
    sources=("https://cloud.google.com/tpu/docs/v5e", f"{SCALING_BOOK}/tpus"),
  ),
  "v4": Chip(
    title="TPU v4",
    flops=275e12,
    memory_rate=1200e9,
    link=4.5e10,
    shapes={
      **{1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4)},
      **{32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)},
      **{512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16)},
    },
    ring_of=4,
    pod=4096,
    between_pods=math.nan,  # nothing here is larger than a pod
    sources=("https://cloud.google.com/tpu/docs/v4", f"{SCALING_BOOK}/tpus"),
  ),
}


def compute_seconds(chip: Chip, flops: float, moved: float) -> float:
  """The roofline: what a chip needs at the least for its own work."""
  return max(flops / chip.flops, moved / chip.memory_rate)


def all_reduce_seconds(
  chip: Chip, size: float, chips: int, among: int | None = None, hop: float = HOP
) -> float:
  """An all-reduce of `size` bytes in a slice of so many chips, `among` blocks of it or all of it.

  `size` is what each chip puts in, `chips` those of the slice or of several pods, `among` those
  that share among themselves only (None: all), `hop` the seconds from a chip to its neighbour.
  """
  among = among or chips
  if among > chip.pod:
    return _over_pods(chip, size, chips, hop)
  lengths = zip(chip.shapes[among], chip.shapes[min(chips, chip.pod)], strict=True)
  axes = [(part, part == whole and chip.rings(part)) for part, whole in lengths if part > 1]
  if not axes:
    return 0.0
  hops = 2 * sum(length // 2 if ring else length - 1 for length, ring in axes)
  rate = sum(chip.link * (2 if ring else 1) for _, ring in axes)
  return hops * hop + 2 * size * (among - 1) / among / rate


def _over_pods(chip: Chip, size: float, chips: int, hop: float) -> float:
  """Within each pod, and between pods the share of the sum that each chip then has.

  The network between pods is switched: halving and doubling takes log2 of the pods, there and back.
  """
  pods = chips // chip.pod
  within = all_reduce_seconds(chip, size, chip.pod, hop=hop)
  bandwidth = 2 * (size / chip.pod) * (pods - 1) / pods / chip.between_pods
  return within + 2 * math.ceil(math.log2(pods)) * POD_HOP + bandwidth


class Step(NamedTuple):
  """The predicted seconds of a step: a chip's own work, and its all-reduces."""

  compute: float
  communication: float

  @property
  def seconds(self) -> float:
    """All of it: nothing is taken to overlap."""
    return self.compute + self.communication

  @property
  def efficiency(self) -> float:
    """Of weak scaling: what one chip would need over what each of many does."""
    return self.compute / self.seconds


def predict(program: Row, chips: int, group: int | None = None, hop: float = HOP) -> Step:
  """A step of a compiled program on another number of chips, with other groups.

  What is sent among the members of a group in the program is sent among `group` chips here, and all
  else among all.
  """
  chip = CHIPS[program["target"].split(":")[0]]
  grouped = program["statistics"] == "grouped"
  if grouped != (group is not None):
    raise ValueError(
      f"group is {group!r} for a program of {program['statistics']} statistics: groups are for "
      "programs that were compiled with them, and needed there."
    )
  seconds = 0.0
  for _, size, members, _, count in program["collectives"]:
    inside = grouped and members == GROUP
    seconds += count * all_reduce_seconds(chip, size, chips, group if inside else None, hop)
  return Step(compute_seconds(chip, program["flops"], program["bytes"]), seconds)
