"""Training steps for slices of TPU chips that are not there: what `benchmarks.scaling` compiles.

A program is a network on a slice, with each chip's batch the same however many there are, by
shard_map (its checks on) or by jit over sharded arrays, its norm layers sharing their statistics
among all chips, among neighbours, or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import compiled, floor, networks
from benchmarks.networks import Network

DTYPE = "bfloat16"
GROUP = 4  # chips that share statistics in the grouped programs: a square of a slice


@dataclasses.dataclass(frozen=True)
class Target:
  """A slice of TPU chips as the compiler names it, and the block of it that is one group."""

  topology: str
  block: tuple[int, ...]
  options: tuple[tuple[str, str], ...] = ()

  def devices(self) -> list[Any]:
    """Its chips, those of a block next to each other."""
    with compiled.quiet():
      described = topologies.get_topology_desc(self.topology, "tpu", **dict(self.options))
    return sorted(described.devices, key=self._place)

  def _place(self, device: Any) -> tuple[list[int], list[int]]:
    pairs = [divmod(at, size) for at, size in zip(device.coords, self.block, strict=True)]
    return [block for block, _ in pairs], [inside for _, inside in pairs]


# A v4's chip is one device of two cores ("megacore"), as JAX sees it on a real one.
_SQUARE, _MEGACORE = (2, 2, 1), (("chip_config_name", "megacore"),)
TARGETS = {name: Target(name, _SQUARE) for name in ("v5e:2x2", "v5e:8x8", "v5e:16x16")}
TARGETS["v4:8x8x16"] = Target("v4:8x8x16", _SQUARE, _MEGACORE)


# The batch is each chip's.
NETWORKS = {
  "layer": Network("One layer and its ReLU", networks.one, (56, 56, 64), 32),
  "resnet50": dataclasses.replace(networks.NETWORKS["resnet50"], batch=32),
}


@dataclasses.dataclass(frozen=True)
class Program:
  """One thing to compile: a network on a slice, and which chips share statistics, and how."""

  network: str
  target: str
  mode: str
  statistics: str

  def __str__(self) -> str:
    return f"{self.network}/{self.target}/{self.mode}/{self.statistics}"


# Which chips share. "by index" gives the groups as axis_index_groups, "grouped" as an axis of the
# mesh.
SHARED = ("synchronized", "local", "grouped", "none")
WAYS = {
  "resnet50": [*(("shard_map", s) for s in SHARED), ("jit", "synchronized")],
  "layer": [
    *(("shard_map", s) for s in SHARED[:-1]),
    ("shard_map", "grouped by index"),
    ("shard_map unchecked", "grouped by index"),
    ("jit", "synchronized"),
    ("shard_map", "virtual batch"),  # as many examples as a group of chips has
    ("jit", "virtual batch"),
  ],
}


def programs() -> list[Program]:
  """All of them, the quick ones first."""
  return [
    Program(network, target, mode, statistics)
    for network in NETWORKS
    for mode, statistics in WAYS[network]
    for target in TARGETS
  ]


def layers(name: str) -> int:
  """How many norm layers a network has."""
  network = dataclasses.replace(NETWORKS[name], batch=1)
  return len(list(floor.layers(network, jnp.float32)))


def lower(program: Program, devices: list[Any]) -> Any:
  """The step of a program, traced for these devices, with each chip's batch the same."""
  grouped = program.statistics == "grouped"
  names = ("group", "member") if grouped else ("batch",)
  mesh = Mesh(np.array(devices).reshape((-1, GROUP) if grouped else -1), names)
  network = NETWORKS[program.network]
  network = dataclasses.replace(network, batch=network.batch * len(devices))
  model = network.model(norm(program, len(devices)), jnp.dtype(DTYPE))
  build = _layer if program.network == "layer" else _training
  step, arguments, split, results = build(program, network, model, mesh)
  specs = tuple(PartitionSpec(names) if s else PartitionSpec() for s in split)
  if program.mode != "jit":
    out = tuple(PartitionSpec(names) if s else PartitionSpec() for s in results)
    checked = program.mode == "shard_map"
    step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out, check_vma=checked)
  shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
  donated = tuple(range(3)) if program.network != "layer" else ()
  jitted = jax.jit(step, in_shardings=shardings, donate_argnums=donated)
  platform = devices[0].platform
  return jitted.trace(*arguments).lower(lowering_platforms=(platform,))


def norm(program: Program, chips: int) -> Callable[..., networks.Layer]:
  """The norm of a program's layers."""
  if program.statistics == "none":
    return networks.none
  options: dict[str, Any] = {}
  if program.mode != "jit" and program.statistics != "local":
    options["axis_name"] = "member" if program.statistics == "grouped" else "batch"
  if program.statistics == "grouped by index":
    options["axis_index_groups"] = np.arange(chips).reshape(-1, GROUP).tolist()
  if program.statistics == "virtual batch":
    options["virtual_batch_size"] = GROUP * NETWORKS[program.network].batch
  return functools.partial(networks.jaxbn, **options)


# A step, what it takes, and which of its arguments and of its results are split.
Built = tuple[Callable[..., Any], tuple[Any, ...], tuple[bool, ...], tuple[bool, ...]]


def _training(program: Program, network: Network, model: nn.Module, mesh: Mesh) -> Built:
  """A step of training."""
  axes = mesh.axis_names if program.mode != "jit" else ()
  step, tx = networks.train_step(model, axes, _apart(program))
  arguments = networks.step_arguments(network, model, tx)
  return step, arguments, (False, False, False, True, True), (False,) * 4


def _layer(program: Program, network: Network, model: nn.Module, mesh: Mesh) -> Built:
  """One layer forward and backward: y, running statistics, gradients of parameters and of x."""
  x = jax.ShapeDtypeStruct(network.inputs().shape, jnp.dtype(DTYPE))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)

  def step(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
    y, new, of_parameters, of_x = compiled.backward(model, variables, x, cotangent)
    if program.mode == "shard_map unchecked":  # the checks sum these by themselves
      of_parameters = jax.lax.psum(of_parameters, mesh.axis_names)
    return y, networks.mean(new, _apart(program)), of_parameters, of_x

  return step, (variables, x, x), (False, True, True), (True, False, False, True)


def _apart(program: Program) -> tuple[str, ...]:
  """The axes of the mesh along which the layers' statistics differ."""
  apart = {"local": ("batch",), "grouped": ("group",), "grouped by index": ("batch",)}
  return apart.get(program.statistics, ()) if program.mode != "jit" else ()
