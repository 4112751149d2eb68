"""Training steps for slices of TPU chips that are not there: what `benchmarks.scaling` compiles.

A program is a network on a slice, with each chip's batch the same however many there are, by
shard_map (its checks on) or by jit over sharded arrays, its norm layers sharing their statistics
among all chips, among neighbours, or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
SQUARE = (2, 2, 1)
TARGETS = ("v5e:2x2", "v5e:8x8", "v5e:16x16", "v4:8x8x16")


def devices_of(target: str) -> list[Any]:
  """The chips of a slice, those of a square next to each other."""
  # A v4's chip is one device of two cores ("megacore"), as JAX sees it on a real one.
  options = {"chip_config_name": "megacore"} if target.startswith("v4") else {}
  with compiled.quiet():
    return sorted(topologies.get_topology_desc(target, "tpu", **options).devices, key=place)


def place(device: Any) -> tuple[list[int], list[int]]:
  """The square that a chip is in, and where in it."""
  pairs = [divmod(at, size) for at, size in zip(device.coords, SQUARE, strict=True)]
  return [square for square, _ in pairs], [inside for _, inside in pairs]


# The batch is each chip's.
NETWORKS = {
  "layer": Network("One layer and its ReLU", networks.one, (56, 56, 64), 32),
  "resnet50": dataclasses.replace(networks.NETWORKS["resnet50"], batch=32),
}


class Program(NamedTuple):
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


# The axes of the mesh along which the layers' statistics differ.
APART = {"local": ("batch",), "grouped": ("group",), "grouped by index": ("batch",)}


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
  apart = () if program.mode == "jit" else APART.get(program.statistics, ())
  whole, split = PartitionSpec(), PartitionSpec(names)
  specs: dict[str, Any]
  donated: tuple[int, ...] = ()
  if program.network == "layer":
    sums = names if program.mode == "shard_map unchecked" else ()
    step, arguments = layer_step(network, model, sums, apart)
    specs = {"in_specs": (whole, split, split), "out_specs": (split, whole, whole, split)}
  else:
    step = networks.train_step(model, () if program.mode == "jit" else names, apart)
    arguments = networks.step_arguments(network, model)
    specs = {"in_specs": (*[whole] * 3, split, split), "out_specs": (whole,) * 4}
    donated = (0, 1, 2)
  if program.mode != "jit":
    step = jax.shard_map(step, mesh=mesh, check_vma=program.mode == "shard_map", **specs)
  shardings = tuple(NamedSharding(mesh, spec) for spec in specs["in_specs"])
  jitted = jax.jit(step, in_shardings=shardings, donate_argnums=donated)
  return jitted.trace(*arguments).lower(lowering_platforms=(devices[0].platform,))


def norm(program: Program, chips: int) -> networks.Norm:
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


def layer_step(
  network: Network, model: nn.Module, sums: tuple[str, ...], apart: tuple[str, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """One layer forward and backward, and what it takes.

  Its parameters' gradients are summed along `sums`: with its checks on, shard_map does it.
  """
  x = jax.ShapeDtypeStruct(network.inputs().shape, jnp.dtype(DTYPE))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)

  def step(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
    y, new, of_parameters, of_x = compiled.backward(model, variables, x, cotangent)
    of_parameters = jax.lax.psum(of_parameters, sums) if sums else of_parameters
    return y, networks.mean(new, apart), of_parameters, of_x

  return step, (variables, x, x)
