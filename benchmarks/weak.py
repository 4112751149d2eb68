"""Weak scaling on this machine: a step in one process and in two, with and without synchronization.

  python -m benchmarks.weak    a look, written nowhere; `benchmarks.scaling` writes it

Each process has one CPU device on one core and the same batch; two talk over loopback by gloo, as
processes on different hosts would by their network. Steps with synchronized and with local
statistics take turns, so that what else the machine does falls on both. Both sum the gradients.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import os
import socket
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import networks
from benchmarks import results as stored
from benchmarks.networks import Network
from benchmarks.results import Row
from benchmarks.speed import Plan, in_turns

PROCESSES = (1, 2)
ROUNDS = 2  # of runs with one process and with two, in turns
SAMPLES = 12  # of each step in a run
STEPS = 4  # in a sample
BATCH = 16  # of each process
KINDS = ("local", "synchronized")


def main() -> None:
  """Measures and prints the rows, or is one of the processes."""
  if sys.argv[1:]:
    number, processes, port, samples = map(int, sys.argv[1:5])
    print(json.dumps(_worker(number, processes, port, samples, sys.argv[5])))
  else:
    print(*measure(), sep="\n")


def measure(rounds: int = ROUNDS, samples: int = SAMPLES) -> list[Row]:
  """A row for each number of processes."""
  found: dict[int, list[dict[str, list[float]]]] = {processes: [] for processes in PROCESSES}
  load = 0.0
  for _ in range(rounds):
    for processes in PROCESSES:
      load = max(load, os.getloadavg()[0])
      found[processes].append(run(processes, samples))
      print(f"{processes} processes: measured", flush=True)
  rows = [row_of(processes, runs) for processes, runs in found.items()]
  alone = rows[PROCESSES.index(1)]["local_min_ms"]
  efficiencies = [{f"efficiency_{k}": alone / row[f"{k}_min_ms"] for k in KINDS} for row in rows]
  return [{**row, "load": load, **own} for row, own in zip(rows, efficiencies, strict=True)]


def row_of(processes: int, runs: list[dict[str, list[float]]]) -> Row:
  """Minimum and median of the times, and of the ratios of neighbouring samples."""
  local, shared = ([t for one in runs for t in one[kind]] for kind in KINDS)
  row = {"kind": "weak", "name": f"weak/{processes}", "processes": processes, "batch": BATCH}
  row |= {"layers": runs[0]["layers"], "samples": len(local), "steps": STEPS}
  row |= stored.min_and_median(local, "local_") | stored.min_and_median(shared, "synchronized_")
  ratios = [theirs / ours for theirs, ours in zip(shared, local, strict=True)]
  row["ratio_of_min"] = min(shared) / min(local)
  return row | {"ratio_median": statistics.median(ratios)}


def run(processes: int, samples: int, network: str = "resnet") -> Any:
  """What the first of so many processes measured."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

  def process(number: int) -> list[str]:
    arguments = map(str, (number, processes, port, samples, network))
    return stored.in_a_process("weak", *arguments, JAX_PLATFORMS="cpu", XLA_FLAGS="")

  with concurrent.futures.ThreadPoolExecutor(processes) as threads:
    return json.loads(next(threads.map(process, range(processes)))[-1])


# In a process.


def _worker(number: int, processes: int, port: int, samples: int, network: str) -> Row:
  if hasattr(os, "sched_setaffinity"):  # so that two on two cores have each what one had
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
  known = {"resnet": networks.SMALL_RESNET, "tiny": networks.TINY_RESNET}
  steps, layers = _steps(dataclasses.replace(known[network], batch=BATCH))
  times = in_turns(list(steps.values()), Plan((), samples, 0.0))
  taken = {kind: [t / STEPS for t in ms] for kind, ms in zip(steps, times, strict=True)}
  return {**taken, "layers": layers}


def _steps(network: Network) -> tuple[dict[str, Callable[..., None]], int]:
  """STEPS steps with either kind of statistics, and how many layers normalize."""
  axes = ("batch",)
  mesh = Mesh(np.array(jax.devices()), axes)
  whole, split = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), axes))
  rng = np.random.default_rng(jax.process_index())
  images = rng.normal(size=(BATCH, *network.shape)).astype(np.float32)
  labels = rng.integers(0, 1000, BATCH).astype(np.int32)
  data = [jax.make_array_from_process_local_data(split, local) for local in (images, labels)]
  steps: dict[str, Callable[..., None]] = {}
  specs = (*[whole.spec] * 3, *[split.spec] * 2)
  for kind, axis, apart in (("local", None, axes), ("synchronized", axes, ())):
    model = network.model(functools.partial(networks.jaxbn, axis_name=axis), images.dtype)
    step = networks.train_step(model, axes, apart)
    spread = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(whole.spec,) * 4)
    variables = jax.jit(model.init, out_shardings=whole)(jax.random.key(0), images[:2])
    params, stats = variables["params"], variables["batch_stats"]
    state = params, stats, jax.jit(networks.OPTIMIZER.init, out_shardings=whole)(params)
    steps[kind] = functools.partial(_run, jax.jit(spread), state, data)
  return steps, len(jax.tree.leaves(stats)) // 2


def _run(step: Callable[..., Any], state: tuple[Any, ...], data: list[jax.Array]) -> None:
  """Steps, each of which starts from what the last has made."""
  for _ in range(STEPS):
    *state, _ = step(*state, *data)
  jax.block_until_ready(state)


if __name__ == "__main__":
  main()
