"""What a norm layer costs on an H100, a TPU v5e and the CPU, read off compiled programs.

  python -m benchmarks.compiled            some minutes; writes benchmarks/results/compiled.json
  python -m benchmarks.compiled --quick    a look, written nowhere
  python -m benchmarks.compiled --targets h100 --networks vgg --json vgg.json

No accelerator is needed: XLA compiles for a described target, and the bytes that the optimized
program moves through device memory, its temporary memory, its kernels and its collectives are then
facts about that program, the same on every run and every machine. Only compile times vary. Needs
the extra `compiled`; a target whose compiler is missing is left out, with a word.

The tax of a norm is what a step of training moves with it less what it moves with none;
`benchmarks.floor` has the least that it can be.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import track

from benchmarks import compiled_report, hlo, networks
from benchmarks import results as stored
from benchmarks.compiled_report import TITLES
from benchmarks.floor import floor_bytes
from benchmarks.networks import NETWORKS
from benchmarks.results import Row
from jaxbn.linen import BatchNorm

COMMAND = "python -m benchmarks.compiled"
DTYPES = {"h100": ("bfloat16", "float32"), "v5e": ("bfloat16",)}
# The compiler first.
REQUIRED = {
  "h100": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "ptxas"),
  "v5e": ("libtpu",),
  "cpu": (),
}
PLATFORMS = {"h100": "cuda", "cpu": "cpu"}  # all others are TPUs
TPUS = {"v5e": "v5e:2x2", "v4": "v4:2x2x1", "v6e": "v6e:2x2"}
DEVICES = 4  # that share a layer's statistics
SHARED_SHAPE = (16, 8, 8, 32)  # of all of them
LAYER_SHAPE = (64, 32, 32, 64)
WHOLE, SPLIT = PartitionSpec(), PartitionSpec("batch")  # how an array lies on the devices
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


class Variant(NamedTuple):
  """A norm as a row of the tables: its label, its factory and the activation that goes with it."""

  label: str
  factory: networks.Norm
  activation: str = "relu"

  @property
  def norm(self) -> networks.Norm:
    return functools.partial(self.factory, activation=getattr(nn, self.activation))


NONE, FLAX = Variant("none", networks.none), Variant("flax", networks.flax)
OURS = Variant("jaxbn", networks.jaxbn)
SUMS = Variant("jaxbn, sum inside", functools.partial(networks.jaxbn, sums=True))
LEAKY = [variant._replace(activation="leaky_relu") for variant in (NONE, FLAX, OURS)]
Job = Callable[[], list[Row]]


def main() -> None:
  parser = stored.parser(__doc__, COMMAND)
  parser.add_argument("--targets", type=names_of(TITLES), help=f"of {', '.join(TITLES)}")
  parser.add_argument("--networks", type=names_of(NETWORKS), help=f"of {', '.join(NETWORKS)}")
  arguments = parser.parse_args()
  whole = not (arguments.targets or arguments.networks)
  prepare()
  names = arguments.networks or (["vgg"] if arguments.quick else list(NETWORKS))
  why = {target: missing(target) for target in arguments.targets or TITLES}
  rows: list[Row] = [{"kind": "skipped", "target": t, "why": why[t]} for t in why if why[t]]
  there = [target for target in why if not why[target]]
  work = [job for t in there for job in jobs(t, names, arguments.quick)]
  for title, run in track(work, "Compiling"):
    start = time.perf_counter()
    rows += run()
    print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
  compare(rows)
  stored.conclude("compiled", COMMAND, rows, compiled_report.parts, arguments, whole)


def jobs(target: str, names: list[str], quick: bool) -> Iterator[tuple[str, Job]]:
  """What is compiled for a target, with its title."""
  if target == "cpu":
    yield from (("CPU: layer", layer_rows), ("CPU: all-reduces", collective_rows))
    return
  for dtype, name in itertools.product(DTYPES[target][: 1 if quick else None], names):
    # Float32 is for one large network: the others would say the same in twice the time. And what
    # takes longest to compile is for the H100.
    if name != "resnet" and (dtype == "float32" or (name, target) == ("resnet50", "v5e")):
      continue
    variants = [NONE, FLAX, OURS] + [SUMS] * (name in ("resnet", "basic"))
    variants += LEAKY * ((target, name) == ("h100", "resnet") and not quick)
    for variant in variants:
      title = f"{TITLES[target]} {dtype} {name}: {variant.label}, {variant.activation}"
      yield title, functools.partial(program_rows, target, dtype, name, variant)


# Programs for an accelerator.


def missing(target: str) -> str | None:
  """In a sentence why nothing can be compiled for a target, and what to do; None if it can."""
  if absent := [package for package in REQUIRED[target] if not _installed(package)]:
    return (
      f"{TITLES[target]}: left out, for want of {' and '.join(absent)}; install the extra into an "
      "environment of its own: python -m venv .venv-compiled && "
      ".venv-compiled/bin/pip install -c constraints.txt -e '.[compiled]'."
    )
  try:
    _devices(target)
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    return f"{TITLES[target]}: left out, for {REQUIRED[target][0]} does not start: {reason}"
  return None


def program_rows(target: str, dtype: str, name: str, variant: Variant) -> list[Row]:
  """A step of training, compiled for one device of the target."""
  network, compiler = NETWORKS[name], REQUIRED[target][0]
  model = network.model(variant.norm, jnp.dtype(dtype))
  step, arguments = networks.train_step(model), networks.step_arguments(network, model)
  start = time.perf_counter()
  compiled = compile_for(target, step, *arguments)
  seconds = time.perf_counter() - start
  row: Row = {"kind": "program", "target": target, "dtype": dtype, "network": name}
  row["compiler"] = f"{compiler} {stored.version(compiler)}"
  row |= {"activation": variant.activation, "norm": variant.label}
  row |= {"MB": moved(target, compiled) / 1e6}
  row["floor_MB"] = floor_bytes(network, jnp.dtype(dtype)) / 1e6
  row["temp_MB"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
  kernels = len(hlo.parse(compiled.as_text()).kernels)
  return [{**row, "kernels": kernels, "compile_s": seconds}]


def compile_for(target: str, function: Callable[..., Any], *arguments: Any) -> Any:
  """The function, compiled for one device of the target."""
  sharding = NamedSharding(Mesh(np.array(_devices(target)[:1]), ("batch",)), WHOLE)
  traced = jax.jit(function, in_shardings=sharding).trace(*arguments)
  return traced.lower(lowering_platforms=(PLATFORMS.get(target, "tpu"),)).compile()


def moved(target: str, compiled: Any) -> float:
  """Bytes. On a TPU layouts are padded, which the compiler's own count knows; so does the CPU's."""
  return hlo.traffic(compiled.as_text()) if target == "h100" else counted(compiled)


def counted(compiled: Any) -> float:
  """Bytes, as the compiler counts them."""
  return (compiled.cost_analysis() or {})["bytes accessed"]


@functools.cache
def _devices(target: str) -> list[Any]:
  if target == "cpu":
    return jax.devices("cpu")
  if target == "h100":
    config = pathlib.Path(__file__).with_name("h100.textproto").read_text()
    described = {"platform": "cuda", "topology_name": "", "topology": "1x1x1"}
    described["target_config"] = config
  else:
    described = {"platform": "tpu", "topology_name": TPUS[target]}
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


def layer_rows() -> list[Row]:
  """XLA's count of the bytes of one layer, forward and backward, in passes over its input."""
  rows: list[Row] = []
  cases = {"alone": False, "with ReLU": True}
  for dtype, case, variant in itertools.product(("float32", "bfloat16"), cases, (FLAX, OURS)):
    options = {"rectify": cases[case]}
    network = networks.Network("One layer", networks.one, LAYER_SHAPE[1:], LAYER_SHAPE[0], options)
    x = jax.ShapeDtypeStruct(LAYER_SHAPE, jnp.dtype(dtype))
    model = network.model(variant.norm, x.dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    compiled = jax.jit(functools.partial(backward, model)).lower(variables, x, x).compile()
    row: Row = {"kind": "layer", "target": "cpu", "dtype": dtype, "shape": list(LAYER_SHAPE)}
    row |= {"case": case, "norm": variant.label}
    rows.append({**row, "passes": counted(compiled) / (x.size * x.dtype.itemsize)})
  return rows


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


def collective_rows() -> list[Row]:
  """All-reduces of a layer whose statistics are those of four devices, and their bytes.

  Backward are those that the gradients add, the sums of the parameters' gradients over the devices,
  which every trainer needs, among them.
  """
  rows = []
  layers = {"flax": nn.BatchNorm, "jaxbn": BatchNorm}
  for how, mask, label in itertools.product(("pmap", "shard_map", "jit"), (False, True), layers):
    axis = None if how == "jit" else "batch"
    model = layers[label](use_running_average=False, axis_name=axis)
    forward, both = (all_reduces(how, backward, model, mask) for backward in (False, True))
    row: Row = {"kind": "collectives", "target": "cpu", "devices": DEVICES, "how": how}
    row |= {"shape": list(SHARED_SHAPE), "mask": mask, "norm": label}
    row |= {"forward": len(forward), "forward_bytes": sum(forward)}
    row |= {"backward": len(both) - len(forward), "backward_bytes": sum(both) - sum(forward)}
    rows.append(row)
  return rows


def all_reduces(how: str, both: bool, model: nn.Module, masked: bool) -> list[int]:
  """Bytes of each all-reduce in a call that is spread over the devices, forward or both ways."""
  x = jax.ShapeDtypeStruct(SHARED_SHAPE, jnp.float32)
  mask = jax.ShapeDtypeStruct((x.shape[0], *[1] * (x.ndim - 1)), jnp.bool_)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  data = (x,) * (1 + both) + (mask,) * masked
  call = functools.partial(backward if both else _forward, model)
  results = (SPLIT, WHOLE, WHOLE, SPLIT) if both else (SPLIT, WHOLE)
  specs = (WHOLE, *[SPLIT] * len(data))
  mesh = Mesh(np.array(_devices("cpu")[:DEVICES]), ("batch",))
  if how == "pmap":
    axes = (None, *[0] * len(data))
    summed = functools.partial(_summed, call) if both else call
    spread = jax.pmap(summed, axis_name="batch", in_axes=axes, devices=list(mesh.devices))
    shapes = [(DEVICES, a.shape[0] // DEVICES, *a.shape[1:]) for a in data]
    data = tuple(a.update(shape=shape) for a, shape in zip(data, shapes, strict=True))
  elif how == "shard_map":
    spread = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=results))
  else:
    ins, outs = (tuple(NamedSharding(mesh, s) for s in each) for each in (specs, results))
    spread = jax.jit(call, in_shardings=ins, out_shardings=outs)
  text = spread.lower(variables, *data).compile().as_text() or ""
  return [i.bytes for i in hlo.parse(text).all_reduces]


def _summed(call: Callable[..., Any], *arguments: Any) -> Any:
  """Under pmap: the other two ways sum the parameters' gradients by themselves."""
  y, new, of_parameters, of_x = call(*arguments)
  return y, new, jax.lax.psum(of_parameters, "batch"), of_x


# What follows from the rows.


def compare(rows: list[Row]) -> None:
  """Adds to every program what it has over the one without a norm."""
  baselines = {compiled_report.case(row): row for row in rows if row.get("norm") == "none"}
  for row in rows:
    if none := baselines.get(compiled_report.case(row)):
      row["temp_over_none_MB"] = row["temp_MB"] - none["temp_MB"]
      row["tax_MB"] = row["MB"] - none["MB"]
      row["tax_over_floor"] = row["tax_MB"] / row["floor_MB"]


# Start.


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
  """Reads names that are known, with commas between them."""

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
  folders = (pathlib.Path(path) / "nvidia" / "cuda_nvcc" / "bin" for path in sys.path)
  return next((folder for folder in folders if (folder / "ptxas").exists()), None)


def _installed(package: str) -> bool:
  if package == "ptxas":
    return shutil.which("ptxas") is not None or _nvcc() is not None
  return stored.version(package) is not None


if __name__ == "__main__":
  main()
