"""What a norm layer costs on an H100, a TPU v5e and the CPU, read off compiled programs.

  python -m benchmarks.compiled            some minutes; writes benchmarks/results/compiled.json
  python -m benchmarks.compiled --quick    a look, written nowhere
  python -m benchmarks.compiled --targets h100 --networks vgg --json vgg.json

No accelerator is needed: XLA compiles for a described target, and the bytes that the optimized
program moves through device memory, its temporary memory, its kernels and its collectives are then
facts about that program, the same on every run and every machine. Only compile times vary. Needs
the extra `compiled`; a target whose compiler is missing is left out, with a word.

The tax of a norm is what a step of training moves with it less what it moves with none. Its floor
is three passes over every normalized tensor: one to measure the statistics, two (the tensor and the
cotangent) to reduce the gradient. Everything else can ride on passes that the network makes anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import hlo, networks
from benchmarks import results as stored
from benchmarks.networks import NETWORKS, Network
from jaxbn.linen import BatchNorm

COMMAND = "python -m benchmarks.compiled"
HERE = pathlib.Path(__file__).resolve().parent
DTYPES = {"h100": ("bfloat16", "float32"), "v5e": ("bfloat16",)}
PACKAGES = {"h100": "jax-cuda12-plugin", "v5e": "libtpu", "cpu": "jaxlib"}
REQUIRED = {
  "h100": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "ptxas"),
  "v5e": ("libtpu",),
  "cpu": (),
}
TITLES = {"h100": "H100", "v5e": "TPU v5e", "cpu": "CPU"}
DEVICES = 4  # that share a layer's statistics
SHARED_SHAPE = (16, 8, 8, 32)  # of all of them
LAYER_SHAPE = (64, 32, 32, 64)
CPU_NETWORK = Network(
  "ResNet",
  functools.partial(networks.ResNet, networks.Basic, (1, 1, 1)),
  (32, 32, 3),
  64,
)
COMPILES = 3  # of a step on the CPU, in turns
ENVIRONMENT = {
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  "TF_CPP_MIN_LOG_LEVEL": "2",
  # libtpu looks for a TPU's host and locks it: there is none, and nothing to lock.
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# No device to time kernels on; and command buffers would hide the kernels from the program's text.
XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
  """A norm as a row of the tables: its label, its factory and the activation that goes with it."""

  label: str
  factory: Callable[..., networks.Layer]
  activation: str = "relu"

  @property
  def norm(self) -> Callable[..., networks.Layer]:
    """The factory with its activation."""
    return functools.partial(self.factory, activation=getattr(nn, self.activation))


BASELINES = (Variant("none", networks.none), Variant("flax", networks.flax))
OURS = Variant("jaxbn", networks.jaxbn)
SUMS = Variant("jaxbn, sum inside", functools.partial(networks.jaxbn, sums=True))
LEAKY = tuple(dataclasses.replace(v, activation="leaky_relu") for v in (*BASELINES, OURS))


@dataclasses.dataclass(frozen=True)
class Job:
  """One thing to compile, and the rows that come of it."""

  title: str
  run: Callable[[], list[Row]]


def main() -> None:
  """Compiles everything that can be, prints the tables and writes the rows."""
  arguments = _arguments()
  prepare()
  console = Console()
  rows = measure(console, arguments.targets, arguments.networks, arguments.quick)
  for table in tables(rows):
    console.print(table)
  for sentence in losses(rows):
    console.print(sentence, markup=False, soft_wrap=True)
  if arguments.json:
    stored.write("compiled", COMMAND, rows, arguments.json)
    console.print(f"Wrote {os.path.relpath(arguments.json)}.")


def measure(console: Console, targets: list[str], names: list[str], quick: bool) -> list[Row]:
  """The rows of every job, with what follows from comparing them."""
  rows: list[Row] = []
  work: list[Job] = []
  for target in targets:
    if why := missing(target):
      console.print(why, markup=False, soft_wrap=True)
      rows.append({"kind": "skipped", "target": target, "why": why})
    else:
      work += jobs(target, names, quick)
  columns = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:3])
  with Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console) as progress:
    task = progress.add_task("", total=len(work))
    for job in work:
      progress.update(task, description=job.title)
      rows += job.run()
      progress.advance(task)
      if not console.is_terminal:  # a log gets a line a job, not a moving bar
        console.print(f"{job.title}: done after {progress.tasks[task].elapsed or 0:.0f} s")
  _compare(rows)
  return rows


def jobs(target: str, names: list[str], quick: bool) -> list[Job]:
  """What is compiled for a target."""
  if target == "cpu":
    return cpu_jobs(1 if quick else COMPILES)
  every: list[Job] = []
  for dtype in DTYPES[target][: 1 if quick else None]:
    for name in names or NETWORKS:
      # Float32 is for the large network alone: the others would say the same in twice the time.
      if dtype == DTYPES[target][0] or name == "resnet":
        every += [
          Job(
            f"{TITLES[target]} {dtype} {name}: {variant.label}, {variant.activation}",
            functools.partial(program_rows, target, dtype, name, variant),
          )
          for variant in variants(target, name, quick)
        ]
  return every


def variants(target: str, name: str, quick: bool) -> list[Variant]:
  """The norms that a network is compiled with."""
  chosen = [*BASELINES, OURS]
  if networks.TAKES_RESIDUAL and name in ("resnet", "basic"):
    chosen.append(SUMS)
  if (target, name) == ("h100", "resnet") and not quick:
    chosen += LEAKY
  return chosen


# Programs for an accelerator.


def missing(target: str) -> str | None:
  """In a sentence why nothing can be compiled for a target, and what to do; None if it can."""
  absent = [package for package in REQUIRED[target] if not _installed(package)]
  if absent:
    return (
      f"{TITLES[target]}: left out, for want of {' and '.join(absent)}; install the extra into an "
      "environment of its own: python -m venv .venv-compiled && "
      ".venv-compiled/bin/pip install -c constraints.txt -e '.[compiled]'."
    )
  try:
    _devices(target)
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    return f"{TITLES[target]}: left out, for {PACKAGES[target]} does not start: {reason}"
  return None


def program_rows(target: str, dtype: str, name: str, variant: Variant) -> list[Row]:
  """A step of training, compiled for one device of the target."""
  network = NETWORKS[name]
  step, arguments = _step(network, variant, dtype)
  sharding = NamedSharding(Mesh(np.array(_devices(target)[:1]), ("batch",)), WHOLE)
  start = time.perf_counter()
  traced = jax.jit(step, in_shardings=sharding).trace(*arguments)
  compiled = traced.lower(lowering_platforms=("cuda" if target == "h100" else "tpu",)).compile()
  seconds = time.perf_counter() - start
  text = compiled.as_text() or ""
  if target == "h100":
    moved, as_printed = hlo.traffic(text), hlo.traffic_as_printed(text)
  else:  # layouts are padded there, which the compiler's own count knows
    moved = as_printed = (compiled.cost_analysis() or {})["bytes accessed"]
  return [
    {
      "kind": "program",
      "target": target,
      "compiler": f"{PACKAGES[target]} {importlib.metadata.version(PACKAGES[target])}",
      "dtype": dtype,
      "network": name,
      "activation": variant.activation,
      "norm": variant.label,
      "MB": moved / 1e6,
      "MB_operands_as_printed": as_printed / 1e6,
      "floor_MB": 3 * network.normalized_bytes(dtype) / 1e6,
      "temp_MB": _temp_mb(compiled),
      "kernels": len(hlo.parse(text).kernels),
      "compile_s": seconds,
    }
  ]


def _step(network: Network, variant: Variant, dtype: str) -> tuple[Callable[..., Any], Any]:
  model = network.model(variant.norm, jnp.dtype(dtype))
  step, tx = networks.train_step(model)
  return step, networks.step_arguments(network, model, tx)


def _temp_mb(compiled: Any) -> float:
  return compiled.memory_analysis().temp_size_in_bytes / 1e6


@functools.cache
def _devices(target: str) -> list[Any]:
  if target == "cpu":
    return jax.devices("cpu")
  described: dict[str, str] = {"platform": "tpu", "topology_name": "v5e:2x2"}
  if target == "h100":
    config = (HERE / "h100.textproto").read_text()
    described = {"platform": "cuda", "topology_name": "", "topology": "1x1x1"}
    described["target_config"] = config
  with quiet():
    return topologies.get_topology_desc(**described).devices


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without the plugins' complaints, from below Python, that they find no device."""
  kept = os.dup(2)
  with open(os.devnull, "wb") as nothing:
    os.dup2(nothing.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


# The CPU.


def cpu_jobs(compiles: int) -> list[Job]:
  """A step of training, one layer, and a layer that shares its statistics."""
  return [
    Job("CPU: step of training", functools.partial(cpu_step_rows, compiles)),
    Job("CPU: one layer", layer_rows),
    Job("CPU: all-reduces", collective_rows),
  ]


def cpu_step_rows(compiles: int, network: Network = CPU_NETWORK) -> list[Row]:
  """A step for this machine's CPU: its memory, and the median seconds of compiles in turns."""
  chosen = [*BASELINES, OURS, *([SUMS] if networks.TAKES_RESIDUAL else [])]
  seconds: dict[str, list[float]] = {variant.label: [] for variant in chosen}
  memory: dict[str, float] = {}
  for _ in range(compiles):
    for variant in chosen:
      step, arguments = _step(network, variant, "float32")
      jax.clear_caches()
      start = time.perf_counter()
      compiled = jax.jit(step).lower(*arguments).compile()
      seconds[variant.label].append(time.perf_counter() - start)
      memory[variant.label] = _temp_mb(compiled)
  return [
    {
      "kind": "step",
      "target": "cpu",
      "dtype": "float32",
      "norm": label,
      "compile_s": statistics.median(taken),
      "compile_min_s": min(taken),
      "compiles": compiles,
      "temp_MB": memory[label],
    }
    for label, taken in seconds.items()
  ]


def layer_rows(shape: tuple[int, ...] = LAYER_SHAPE) -> list[Row]:
  """XLA's count of the bytes of one layer, forward and backward, in passes over its input."""
  rows = []
  for dtype in ("float32", "bfloat16"):
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for case, rectify in (("alone", False), ("with ReLU", True)):
      for variant in (BASELINES[1], OURS):
        model = _Alone(functools.partial(variant.norm, dtype=x.dtype), rectify)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        compiled = jax.jit(functools.partial(backward, model)).lower(variables, x, x).compile()
        moved = (compiled.cost_analysis() or {})["bytes accessed"]
        rows.append(
          {
            "kind": "layer",
            "target": "cpu",
            "dtype": dtype,
            "shape": list(shape),
            "case": case,
            "norm": variant.label,
            "passes": moved / (x.size * x.dtype.itemsize),
          }
        )
  return rows


class _Alone(nn.Module):
  """A network that is one layer; norms are made inside a network."""

  norm: networks.Norm
  rectify: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(self.rectify)(x)


def _forward(model: nn.Module, variables: Any, x: jax.Array, mask: Any = None) -> Any:
  masked = {} if mask is None else {"mask": mask}  # the layers of `networks` take none
  return model.apply(variables, x, **masked, mutable=["batch_stats"])


def backward(
  model: nn.Module, variables: Any, x: jax.Array, cotangent: jax.Array, mask: Any = None
) -> Any:
  """The forward pass, and the gradients of parameters and x."""

  def of(params: Any, x: jax.Array) -> Any:
    return _forward(model, {**variables, "params": params}, x, mask)

  y, pull, new = jax.vjp(of, variables["params"], x, has_aux=True)
  params, of_x = pull(cotangent)
  return y, new, params, of_x


# Collectives.

WHOLE, SPLIT = PartitionSpec(), PartitionSpec("batch")  # how an array lies on the devices


def collective_rows() -> list[Row]:
  """All-reduces of a layer whose statistics are those of four devices, and their bytes.

  Backward are those that the gradients add, the sums of the parameters' gradients over the devices,
  which every trainer needs, among them.
  """
  rows = []
  for how in ("pmap", "shard_map", "jit"):
    for masked in (False, True):
      for label, layer in (("flax", nn.BatchNorm), ("jaxbn", BatchNorm)):
        model = layer(use_running_average=False, axis_name=None if how == "jit" else "batch")
        forward = _shared(how, False, model, masked)
        both = _shared(how, True, model, masked)
        rows.append(
          {
            "kind": "collectives",
            "target": "cpu",
            "devices": DEVICES,
            "shape": list(SHARED_SHAPE),
            "how": how,
            "mask": masked,
            "norm": label,
            "forward": len(forward),
            "forward_bytes": sum(forward),
            "backward": len(both) - len(forward),
            "backward_bytes": sum(both) - sum(forward),
          }
        )
  return rows


def _shared(how: str, both: bool, model: nn.Module, masked: bool) -> list[int]:
  """Bytes of each all-reduce in a call that is spread over the devices."""
  x = jax.ShapeDtypeStruct(SHARED_SHAPE, jnp.float32)
  mask = jax.ShapeDtypeStruct((x.shape[0], *[1] * (x.ndim - 1)), jnp.bool_)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  data = (x,) * (1 + both) + (mask,) * masked
  call = functools.partial(backward if both else _forward, model)
  results = (SPLIT, WHOLE, WHOLE, SPLIT) if both else (SPLIT, WHOLE)
  build = {"pmap": _by_pmap, "shard_map": _by_shard_map, "jit": _by_jit}[how]
  text = build(call, results, variables, data).compile().as_text() or ""
  return [i.bytes for i in hlo.parse(text).all_reduces]


def _by_pmap(call: Callable[..., Any], results: Any, variables: Any, data: Any) -> Any:
  def summed(*arguments: Any) -> Any:
    found = list(call(*arguments))
    if len(results) == 4:  # the other two ways sum the parameters' gradients by themselves
      found[2] = jax.lax.psum(found[2], "batch")
    return found

  in_axes = (None, *[0] * len(data))
  shards = [
    jax.ShapeDtypeStruct((DEVICES, a.shape[0] // DEVICES, *a.shape[1:]), a.dtype) for a in data
  ]
  mapped = jax.pmap(summed, axis_name="batch", in_axes=in_axes, devices=_cpus())
  return mapped.lower(variables, *shards)


def _by_shard_map(call: Callable[..., Any], results: Any, variables: Any, data: Any) -> Any:
  in_specs = (WHOLE, *[SPLIT] * len(data))
  mapped = jax.shard_map(call, mesh=_mesh(), in_specs=in_specs, out_specs=results)
  return jax.jit(mapped).lower(variables, *data)


def _by_jit(call: Callable[..., Any], results: Any, variables: Any, data: Any) -> Any:
  place = functools.partial(NamedSharding, _mesh())
  shardings = (place(WHOLE), *[place(SPLIT)] * len(data))
  outputs = tuple(map(place, results))
  return jax.jit(call, in_shardings=shardings, out_shardings=outputs).lower(variables, *data)


def _cpus() -> list[jax.Device]:
  return _devices("cpu")[:DEVICES]


def _mesh() -> Mesh:
  return Mesh(np.array(_cpus()), ("batch",))


# What follows from the rows.


def _compare(rows: list[Row]) -> None:
  """Adds to every program and step what it has over the one without a norm."""
  baselines = {_case(row): row for row in rows if row.get("norm") == "none"}
  for row in rows:
    none = baselines.get(_case(row))
    if none is None:
      continue
    row["temp_over_none_MB"] = row["temp_MB"] - none["temp_MB"]
    if row["kind"] == "program":
      row["tax_MB"] = row["MB"] - none["MB"]
      row["tax_over_floor"] = row["tax_MB"] / row["floor_MB"]
      row["tax_MB_operands_as_printed"] = (
        row["MB_operands_as_printed"] - none["MB_operands_as_printed"]
      )


CASE = ("kind", "target", "dtype", "network", "activation", "case", "how", "mask")


def _case(row: Row) -> tuple[Any, ...]:
  """What two rows that differ in the norm alone have in common."""
  return tuple(row.get(key) for key in CASE)


# The smaller the better; with the difference, relative and absolute, below which two are level.
QUANTITIES = {
  "tax_MB": ("bytes moved", 0.01, 1.0),
  "temp_over_none_MB": ("temporary memory", 0.01, 1.0),
  "kernels": ("kernels", 0.0, 0.5),
  "compile_s": ("compile time", 0.15, 0.2),
  "passes": ("bytes moved, in passes", 0.01, 0.05),
  "forward": ("all-reduces forward", 0.0, 0.5),
  "backward": ("all-reduces backward", 0.0, 0.5),
  "forward_bytes": ("bytes of all-reduces forward", 0.0, 64.0),
  "backward_bytes": ("bytes of all-reduces backward", 0.0, 64.0),
}


def losses(rows: list[Row]) -> list[str]:
  """Where Flax's layer is better than ours, a sentence a case; those who compare want it said."""
  flax = {_case(row): row for row in rows if row.get("norm") == "flax"}
  found = []
  for row in rows:
    theirs = flax.get(_case(row))
    if theirs is None or not row["norm"].startswith("jaxbn"):
      continue
    worse = [
      f"{title} {_figure(key, row[key])} against {_figure(key, theirs[key])}"
      for key, (title, relative, absolute) in QUANTITIES.items()
      if key in row and row[key] - theirs[key] > max(absolute, relative * abs(theirs[key]))
    ]
    if worse:
      found.append(f"{_name(row)}, {row['norm']}: {', '.join(worse)}.")
  return found


def _name(row: Row) -> str:
  words = [TITLES[row["target"]], row.get("dtype")]
  if "network" in row:
    words.append(NETWORKS[row["network"]].title)
  if row["kind"] == "step":
    words.append("step of training")
  if row["kind"] == "layer":
    words.append(f"layer {row['case']}")
  if row["kind"] == "collectives":
    words.append(f"{row['devices']} devices under {row['how']}{' with a mask' * row['mask']}")
  if row.get("activation", "relu") != "relu":
    words.append(row["activation"])
  return " ".join(str(word) for word in words if word)


def _figure(key: str, value: float) -> str:
  if key.endswith("_MB") or key == "MB":
    return f"{value:,.0f} MB"
  if key.endswith("_s"):
    return f"{value:.1f} s"
  if key in ("passes", "tax_over_floor"):
    return f"{value:.2f}"
  return f"{value:,.0f}"


# Tables.


@dataclasses.dataclass(frozen=True)
class Sheet:
  """A table: its title, the columns by heading, and a line of text for each row."""

  title: str
  lines: list[list[str]]
  right: range


def sheets(rows: list[Row]) -> Iterator[Sheet]:
  """Every table, for the terminal and for Markdown."""
  yield from _program_sheets(rows)
  yield from _sheet(
    f"CPU: a step of training of a ResNet in float32, compiled; median of {_compiles(rows)}",
    _of(rows, "step"),
    {"norm": "norm"},
    {
      "compile_s": "compile time",
      "temp_MB": "temporary memory",
      "temp_over_none_MB": "over no norm",
    },
  )
  yield from _sheet(
    "CPU: one layer forward and backward, bytes that XLA counts in passes over the input",
    _of(rows, "layer"),
    {"dtype": "dtype", "case": "layer", "norm": "norm"},
    {"passes": "passes"},
  )
  yield from _sheet(
    "All-reduces of one layer on four devices",
    [{**row, "mask": "yes" if row["mask"] else "no"} for row in _of(rows, "collectives")],
    {"how": "under", "mask": "mask", "norm": "norm"},
    {
      "forward": "forward",
      "forward_bytes": "bytes",
      "backward": "backward adds",
      "backward_bytes": "bytes",
    },
  )


def _program_sheets(rows: list[Row]) -> Iterator[Sheet]:
  programs = _of(rows, "program")
  for target, dtype in dict.fromkeys((row["target"], row["dtype"]) for row in programs):
    chosen = [
      {**row, "title": _network_and_activation(row)}
      for row in programs
      if (row["target"], row["dtype"]) == (target, dtype)
    ]
    yield from _sheet(
      f"{TITLES[target]}, {dtype}: a step of training",
      chosen,
      {"title": "network", "norm": "norm"},
      {
        "MB": "moves",
        "tax_MB": "tax",
        "tax_over_floor": "tax / floor",
        "temp_over_none_MB": "memory over no norm",
        "kernels": "kernels",
        "compile_s": "compile time",
      },
    )


def _network_and_activation(row: Row) -> str:
  title = NETWORKS[row["network"]].title
  return title if row["activation"] == "relu" else f"{title}, {row['activation']}"


def _sheet(
  title: str, rows: Iterable[Row], words: dict[str, str], figures: dict[str, str]
) -> Iterator[Sheet]:
  lines = [
    [str(row[key]) for key in words]
    + [_figure(key, row[key]) if key in row else "" for key in figures]
    for row in rows
  ]
  if lines:
    heading = [*words.values(), *figures.values()]
    yield Sheet(title, [heading, *lines], range(len(words), len(heading)))


def tables(rows: list[Row]) -> Iterator[Table]:
  """The sheets for the terminal."""
  for sheet in sheets(rows):
    table = Table(title=sheet.title, box=box.SIMPLE)
    for column, heading in enumerate(sheet.lines[0]):
      table.add_column(heading, justify="right" if column in sheet.right else "left")
    for line in sheet.lines[1:]:
      table.add_row(*line)
    yield table


def section(results: Row) -> str:
  """The part of the documentation about compiled programs, from the results as stored."""
  rows = results["rows"]
  worse = losses(rows)
  parts = [
    "## What a layer costs, read off compiled programs",
    INTRODUCTION,
    f"`{results['command']}`, {results['date']}: {_versions(results)}.",
    "![Tax over its floor, by target and network](benchmarks-compiled.png)",
    *(row["why"] for row in _of(rows, "skipped")),
    *(f"### {s.title}\n\n{stored.table(s.lines, s.right)}" for s in sheets(rows)),
    "### Where Flax's layer is better",
    "\n".join(f"- {sentence}" for sentence in worse) or "Nowhere in these tables.",
  ]
  return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
XLA compiles for hardware that is described to it, so that no accelerator is needed to see what a
training step moves through device memory: it stands in the compiled program. These are counts, not
times. The **tax** of a norm is what a step moves with it less what it moves with none. Its
**floor** is three passes over every normalized tensor: one to measure the statistics, two (the
tensor and the cotangent) to reduce the gradient; all else can ride on passes that the network makes
anyway. Whatever else the compiler does differently beside a norm is in the tax too. Memory is the
step's temporary memory. A compile time on an accelerator is of one compile, which varies with what
else the machine does.

On the H100 the bytes are those of every kernel's operands and results; of an operand that a kernel
only slices, the slice. On the TPU they are the compiler's own count, on padded layouts, which the
floor is not: compare Flax with jaxbn there. *Sum inside* hands the layer the residual.

XLA's count for the CPU takes a branch for its longer side: in jaxbn's passes, and in its
all-reduces under jit, is the second reading of a channel whose mean is far from 0, which others do
not run."""


def _of(rows: list[Row], kind: str) -> list[Row]:
  return [row for row in rows if row["kind"] == kind]


def _compiles(rows: list[Row]) -> int:
  return next((row["compiles"] for row in _of(rows, "step")), 0)


def _versions(results: Row) -> str:
  compilers = dict.fromkeys(r["compiler"] for r in results["rows"] if "compiler" in r)
  libraries = [f"{name} {results['versions'][name]}" for name in ("jax", "flax")]
  return ", ".join([*libraries, *compilers, results["machine"]["cpu"]])


COLORS = {
  "flax": "#9bb8d3",
  "jaxbn": "#c8452c",
  "jaxbn, sum inside": "#e39a6c",
}


def draw(results: Row, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes the picture of every tax over its floor into a folder; the files that it wrote."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = [row for row in _of(results["rows"], "program") if row["norm"] != "none"]
  panels = list(dict.fromkeys((row["target"], row["dtype"]) for row in rows))
  if not panels:
    return []
  groups = [[r for r in rows if (r["target"], r["dtype"]) == panel] for panel in panels]
  widths = [len({_network_and_activation(row) for row in group}) + 0.8 for group in groups]
  figure = Figure(figsize=(12, 4.6), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)  # no window system, no global state
  figure.suptitle(
    "What a norm layer adds to the bytes of a training step, over the least it can add"
  )
  grid = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False, sharey=True)[0]
  for axes, (target, dtype), group in zip(grid, panels, groups, strict=True):
    _bars(axes, group)
    padded = "\n(padded layouts)" if target == "v5e" else ""
    axes.set_title(f"{TITLES[target]}, {dtype}{padded}", fontsize=10)
  grid[0].set_ylabel("tax / floor")
  handles = {label: handle for axes in grid for handle, label in _legend(axes)}
  figure.legend(
    handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
  )
  file = folder / "benchmarks-compiled.png"
  folder.mkdir(parents=True, exist_ok=True)
  figure.savefig(file)
  return [file]


def _bars(axes: Any, rows: list[Row]) -> None:
  """One panel: a group of bars for each network, and the floor."""
  places = {title: at for at, title in enumerate(dict.fromkeys(map(_network_and_activation, rows)))}
  for title, at in places.items():
    group = [row for row in rows if _network_and_activation(row) == title]
    width = 0.8 / max(3, len(group))
    for number, row in enumerate(group):
      x = at + (number - (len(group) - 1) / 2) * width
      axes.bar(x, row["tax_over_floor"], 0.92 * width, color=COLORS[row["norm"]], label=row["norm"])
      axes.annotate(
        f"{row['tax_over_floor']:.2f}",
        (x, max(0, row["tax_over_floor"])),
        ha="center",
        va="bottom",
        fontsize=6.5,
      )
  axes.axhline(1, color="black", linewidth=1, linestyle="--", label="floor")
  axes.set_xticks(
    list(places.values()), [_wrapped(title) for title in places], fontsize=8, linespacing=0.95
  )
  axes.set_xlim(-0.6, len(places) - 0.4)
  axes.spines[["top", "right"]].set_visible(False)


def _wrapped(title: str) -> str:
  return title.replace(", ", ",\n").replace(" ", "\n")


def _legend(axes: Any) -> Iterator[tuple[Any, str]]:
  handles, labels = axes.get_legend_handles_labels()
  return zip(handles, labels, strict=True)


# Start.


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--targets", type=_names_of(TITLES), help=f"of {', '.join(TITLES)}")
  parser.add_argument("--networks", type=_names_of(NETWORKS), help=f"of {', '.join(NETWORKS)}")
  parser.add_argument("--quick", action="store_true", help="one network, one dtype, one compile")
  parser.add_argument("--json", type=pathlib.Path, help="default: where the documentation reads it")
  arguments = parser.parse_args()
  whole = not (arguments.quick or arguments.targets or arguments.networks)
  if whole and arguments.json is None:  # a part of the figures does not replace all of them
    arguments.json = stored.FOLDER / "compiled.json"
  arguments.targets = arguments.targets or list(TITLES)
  arguments.networks = arguments.networks or (["vgg"] if arguments.quick else [])
  return arguments


def _names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
  def read(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(known)):
      raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return names

  return read


def prepare() -> None:
  """Settings that count only before the first compile."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
  if folder := _nvcc():
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
  jax.config.update("jax_platforms", "cpu")  # nothing runs but the tracing
  jax.config.update("jax_num_cpu_devices", DEVICES)
  jax.config.update("jax_enable_compilation_cache", False)
  with quiet():
    jax.devices()  # the plugins register here


def _nvcc() -> pathlib.Path | None:
  """The folder of the `ptxas` that pip installs, which is not on the PATH."""
  if not importlib.util.find_spec("nvidia"):
    return None
  spec = importlib.util.find_spec("nvidia.cuda_nvcc")
  folders = [pathlib.Path(p) / "bin" for p in (spec and spec.submodule_search_locations) or ()]
  return next((folder for folder in folders if (folder / "ptxas").exists()), None)


def _installed(package: str) -> bool:
  if package == "ptxas":
    return shutil.which("ptxas") is not None or _nvcc() is not None
  try:
    importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


if __name__ == "__main__":
  main()
