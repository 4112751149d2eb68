"""What a TPU's program moves through device memory, read off its text.

XLA keeps what it can in the chip's own memory (VMEM: 128 MB on a v5e) and marks it S(1) in the
layout. Its own count, `bytes accessed`, takes that for device memory, and each copy between the two
for two accesses; and whole small networks fit. Here a kernel's operands and results count where
they lie in device memory, on layouts padded to their tiles, and a copy on the side of that memory.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from benchmarks import hlo

_ARRAY = re.compile(r"([a-z]+[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")


class Array(NamedTuple):
  """Of an array as printed: its bytes, padded, and whether it lies on the chip."""

  bytes: int
  on_chip: bool


def moved(text: str) -> int:
  """Bytes that the entry computation reads from and writes to device memory."""
  program = hlo.parse(text)
  body = program.computations[program.entry]
  total = 0.0
  for i in body.values():
    if i.op in hlo.FREE or i.op.endswith("-done"):
      continue
    if i.op.endswith("-start"):
      total += _copied(i.shape)
      continue
    total += _in_memory(i.shape)
    for number, name in enumerate(i.operands):
      if operand := body.get(name):
        read = hlo.reads(program, i, number, operand.bytes) / max(1, operand.bytes)
        total += read * _in_memory(operand.shape)
  return round(total)


def arrays(shape: str) -> list[Array]:
  """The arrays of a shape, or of a tuple of shapes, as printed."""
  return [_array(*found) for found in _ARRAY.findall(shape) if found[0] in hlo.ITEM_BYTES]


def _array(dtype: str, sizes: str, layout: str) -> Array:
  order, _, rest = layout.partition(":")
  lengths = [int(size) for size in sizes.split(",") if size]
  if order and (tile := re.search(r"T\(([0-9,]+)\)", rest)):
    lengths = [lengths[int(axis)] for axis in order.split(",")]  # what lies closest first
    for axis, length in enumerate(reversed(tile[1].split(","))):
      if axis < len(lengths):
        lengths[axis] = math.ceil(lengths[axis] / int(length)) * int(length)
  return Array(hlo.ITEM_BYTES[dtype] * math.prod(lengths), "S(1)" in rest)


def _in_memory(shape: str) -> int:
  return sum(array.bytes for array in arrays(shape) if not array.on_chip)


def _copied(shape: str) -> int:
  """Bytes of an asynchronous copy, of which the shape has both ends first, or a slice of one."""
  ends = arrays(shape)[:2]
  return min(array.bytes for array in ends) * sum(not array.on_chip for array in ends)
