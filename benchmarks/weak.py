"""Weak scaling on this machine: a step in one process and in two, with and without synchronization.

  python -m benchmarks.weak    a look, written nowhere; `benchmarks.scaling` writes it

Each process has one CPU device on one core and the same batch; two talk over loopback by gloo, as
processes on different hosts would by their network. Steps with synchronized and with local
statistics take turns, so that what else the machine does falls on both. Both sum the gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.results import ROOT, Row

PROCESSES = (1, 2)
ROUNDS = 2  # of runs with one process and with two, in turns
SAMPLES = 12  # of each step in a run
STEPS = 4  # in a sample
BATCH = 16  # of each process
LIMIT = 600  # seconds that a run may take
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
  times = {kind: [t for one in runs for t in one[kind]] for kind in KINDS}
  local, shared = times.values()
  row = {"kind": "weak", "name": f"weak/{processes}", "processes": processes, "batch": BATCH}
  row |= {"layers": runs[0]["layers"], "samples": len(local), "steps": STEPS}
  for kind, taken in times.items():
    row |= {f"{kind}_min_ms": min(taken), f"{kind}_median_ms": statistics.median(taken)}
  ratios = [theirs / ours for theirs, ours in zip(shared, local, strict=True)]
  return row | {
    "ratio_of_min": min(shared) / min(local),
    "ratio_median": statistics.median(ratios),
  }


def run(processes: int, samples: int, network: str = "resnet") -> Any:
  """What the first of so many processes measured."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "benchmarks.weak"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  options: Any = {"env": environment, "cwd": ROOT, "text": True}
  options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  workers = [
    subprocess.Popen([*command, *map(str, (number, processes, port, samples, network))], **options)
    for number in range(processes)
  ]
  try:
    outputs = [worker.communicate(timeout=LIMIT) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  for worker, (_, errors) in zip(workers, outputs, strict=True):
    if worker.returncode:
      raise SystemExit(f"A process of {processes} failed:\n{errors[-3000:]}")
  return json.loads(outputs[0][0].splitlines()[-1])


# In a process.


def _worker(number: int, processes: int, port: int, samples: int, network: str) -> Row:
  if hasattr(os, "sched_setaffinity"):  # so that two on two cores have each what one had
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
  import jax

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
  steps, layers = _steps(network)
  times: dict[str, list[float]] = {kind: [] for kind in KINDS}
  for kind in KINDS:
    _time(steps[kind])  # compiles
  for sample in range(samples):
    # Whichever comes first in a pair has the other's sweepings in its cache: change about.
    for kind in KINDS if sample % 2 == 0 else KINDS[::-1]:
      times[kind].append(1e3 * _time(steps[kind]))
  return {**times, "layers": layers}


def _time(step: Any) -> float:
  """Seconds of one of several steps, each of which starts from what the last has made."""
  import jax

  start = time.perf_counter()
  state = step()
  for _ in range(STEPS - 1):
    state = step(*state[:3])
  jax.block_until_ready(state)
  return (time.perf_counter() - start) / STEPS


def _steps(name: str) -> tuple[dict[str, Any], int]:
  """The step with either kind of statistics, its arguments bound, and how many layers normalize."""
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from benchmarks import networks

  axes = ("batch",)
  mesh = Mesh(np.array(jax.devices()), axes)
  whole, split = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), axes))
  known = {"resnet": networks.SMALL_RESNET, "tiny": networks.TINY_RESNET}
  network = dataclasses.replace(known[name], batch=BATCH)
  rng = np.random.default_rng(jax.process_index())
  images = rng.normal(size=(BATCH, *network.shape)).astype(np.float32)
  labels = rng.integers(0, 1000, BATCH).astype(np.int32)
  data = [jax.make_array_from_process_local_data(split, local) for local in (images, labels)]
  steps, layers = {}, 0
  for kind, axis, apart in (("local", None, axes), ("synchronized", axes, ())):
    norm = functools.partial(networks.jaxbn, axis_name=axis)
    model = network.model(norm, images.dtype)
    step, tx = networks.train_step(model, axes, apart)
    specs = (*[whole.spec] * 3, *[split.spec] * 2)
    spread = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(whole.spec,) * 4)
    variables = jax.jit(model.init, out_shardings=whole)(jax.random.key(0), images[:2])
    params, stats = variables["params"], variables["batch_stats"]
    state = jax.jit(tx.init, out_shardings=whole)(params)
    steps[kind] = _from(jax.jit(spread), (params, stats, state), data)
    layers = len(jax.tree.leaves(stats)) // 2
  return steps, layers


def _from(step: Any, first: tuple[Any, ...], data: list[Any]) -> Any:
  """The step on this data, from its first state or from the one that it is given."""
  return lambda *state: step(*(state or first), *data)


if __name__ == "__main__":
  main()
