"""Reads compiled programs: what the text of an XLA executable moves, runs and sends.

A program's text is a list of computations; the one marked ENTRY runs, and on an accelerator each of
its instructions that does anything is one kernel, which reads its operands from device memory and
writes its result there. What happens inside a fused computation stays in registers. So the traffic
is the sum over the entry's instructions of operands and results, with two refinements without
which the sum is wrong:

- the text marks every fifth operand by a comment, `/*index=5*/%name`, which is not its name;
- a kernel that only slices an operand reads the slice and not the operand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

ITEM_BYTES = {
  **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
  **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
  **dict.fromkeys(("f32", "s32", "u32"), 4),
  **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
  "c128": 16,
}
FREE = frozenset({"parameter", "get-tuple-element", "tuple", "bitcast", "constant"})
SLICES = frozenset({"slice", "dynamic-slice", "gather"})
TRANSPARENT = frozenset({"bitcast", "convert", "copy", "reshape"})  # they read what is read of them
COLLECTIVES = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
  *("collective-permute", "collective-broadcast"),
)
_NAMED = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")


class Instruction(NamedTuple):
  """One line of a computation. A parameter's only operand is its number."""

  name: str
  bytes: int
  op: str
  operands: tuple[str, ...]
  called: tuple[str, ...] = ()  # computations
  shape: str = ""  # as printed


class Collective(NamedTuple):
  """One operation between devices: what each puts in, and how many devices take part together.

  Of the algorithm the TPU's compiler gives the name; others choose it when the program runs.
  """

  op: str
  bytes: int
  members: int
  algorithm: str = ""


class Program(NamedTuple):
  """The computations by name, and the name of the one that runs."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  @property
  def kernels(self) -> list[Instruction]:
    """The instructions of the entry that do anything, but for transfers beside the work."""
    body = self.computations[self.entry].values()
    return [i for i in body if i.op not in FREE and not i.op.endswith(("-start", "-done"))]

  @property
  def all_reduces(self) -> list[Instruction]:
    """The all-reduces, wherever they stand but in a branch."""
    return [i for i in self.unconditional if i.op in ("all-reduce", "all-reduce-start")]

  @property
  def unconditional(self) -> list[Instruction]:
    """The instructions of the computations that run whatever the data is."""
    reached: dict[str, dict[str, Instruction]] = {}
    names = [self.entry]
    while names:
      name = names.pop()
      if name in self.computations and name not in reached:
        reached[name] = self.computations[name]
        names += [c for i in reached[name].values() if i.op != "conditional" for c in i.called]
    return [i for body in reached.values() for i in body.values()]


def parse(text: str) -> Program:
  computations: dict[str, dict[str, Instruction]] = {}
  entry = ""
  body: dict[str, Instruction] = {}
  for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
      body = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif instruction := _instruction(line):
      body[instruction.name] = instruction
  if not entry:
    raise ValueError("This text has no ENTRY computation: it is not a compiled program's.")
  return Program(computations, entry)


def traffic(text: str) -> int:
  """Bytes that the kernels of the entry computation read and write."""
  program = parse(text)
  body, kernels = program.computations[program.entry], program.kernels
  operands = [(i, n, body[o].bytes) for i in kernels for n, o in enumerate(i.operands) if o in body]
  return sum(i.bytes for i in kernels) + sum(reads(program, *operand) for operand in operands)


def memory_bytes(executable: Any) -> tuple[int, int]:
  """Of a compiled program: its temporary memory, and that with arguments and results."""
  memory = executable.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.temp_size_in_bytes, held + memory.temp_size_in_bytes


def collectives(text: str, devices: int) -> list[Collective]:
  """The operations between devices in a program for that many, wherever they stand but in a branch.

  A variadic operation is one, and so are the two halves, start and done, of an asynchronous one. In
  the body of a loop an operation counts once.
  """
  lines = {name[1]: line for line in text.splitlines() if (name := _NAMED.match(line))}
  always = parse(text).unconditional
  bytes_of = {i.name: i.bytes for i in always}
  found = []
  for i in always:
    op = i.op.removesuffix("-start")
    if op in COLLECTIVES:
      size = sum(bytes_of.get(o, 0) for o in i.operands)
      emitter = re.search(r'"emitter":"(\w+)"', lines[i.name])
      members = _members(lines[i.name]) or devices
      found.append(Collective(op, size, members, emitter[1] if emitter else ""))
  return found


def _members(line: str) -> int:
  """How many devices the groups of a collective have, in any of the ways to write it; 0: all."""
  if "replica_groups=" not in line or "replica_groups={}" in line:
    return 0
  if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", line):
    return len(listed[1].split(","))
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
    return int(iota[1])
  if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
    sizes = {axis: int(size) for axis, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
    # A part of an axis has its own size behind the name, after that of what is outside it.
    named = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[axis] for axis, part in named)
  raise ValueError(f"These replica_groups are written in a way that is not known: {line.strip()}")


def _instruction(line: str) -> Instruction | None:
  found = _NAMED.match(line)
  if not found:
    return None
  start = found.end()
  end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
  op = re.compile(r"\s*([\w\-]+)(?=\()").match(line, end)
  if not op:
    return None
  close = _closing(line, op.end())
  arguments = () if op[1] == "constant" else tuple(_names(line[op.end() + 1 : close - 1]))
  shape = line[start:end]
  called = tuple(_called(line[close:]))
  return Instruction(found[1], shape_bytes(shape), op[1], arguments, called, shape)


def _called(attributes: str) -> Iterator[str]:
  """The computations that an instruction's attributes name."""
  for names in re.findall(
    r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?((?:%?[\w.\-]+(?:, %)?)+)", attributes
  ):
    yield from (name.strip(" %") for name in names.split(","))


def _closing(text: str, start: int) -> int:
  """The place after the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.end()
  return len(text)


def _names(arguments: str) -> Iterator[str]:
  """The operands' names; some printers put the shape, with commas of its own, before a name."""
  for argument in re.sub(r"\[[^\]]*\]|\{[^}]*\}", "", arguments).split(","):
    if words := argument.split():
      yield words[-1].lstrip("%")


def shape_bytes(shape: str) -> int:
  """Bytes of a shape, or of a tuple of shapes, as printed."""
  return sum(
    ITEM_BYTES.get(dtype, 0) * int(np.prod([int(d) for d in dims.split(",") if d]))
    for dtype, dims in re.findall(r"([a-z]+[a-z0-9]*)\[([0-9,]*)\]", shape)
  )


def reads(program: Program, kernel: Instruction, number: int, size: int) -> int:
  """Bytes that a kernel reads of its operand of that number, whose size is given."""
  if kernel.op in SLICES and number == 0:
    return min(size, kernel.bytes)
  called = program.computations.get(kernel.called[0], {}) if kernel.op == "fusion" else {}
  for i in called.values():
    if i.op == "parameter" and i.operands == (str(number),):
      return round(size * _share_read(called, i))
  return size


def _share_read(body: dict[str, Instruction], value: Instruction) -> float:
  """The share of a value that its users in a fused computation read: 1 unless all of them slice."""
  users = [i for i in body.values() if value.name in i.operands and i.op != "parameter"]
  share = 0.0 if users else 1.0  # it is the result, or its reader is not understood
  for user in users:
    if user.op in SLICES and user.operands[0] == value.name:
      share += user.bytes / max(1, value.bytes)
    else:
      share += _share_read(body, user) if user.op in TRANSPARENT else 1.0
  return min(1.0, share)
