"""Whole training steps with jaxbn's norm and with Flax's: time, memory, and time to compile.

  python -m benchmarks.step            minutes; adds what is here to benchmarks/results/step.json
  python -m benchmarks.step --quick    a look at one network, written nowhere

Runs on whatever device JAX finds: on an accelerator at the sizes that are trained, in bfloat16; on
a CPU in float32 and little. Both steps are compiled and then take turns, so that what else the
machine does meets both. The rows of other kinds of devices stay as they are.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hlo, networks
from benchmarks import results as stored
from benchmarks.networks import SMALL_RESNET, WHOLE, Network
from benchmarks.results import Row, of, short, tabulate
from benchmarks.speed import Plan, in_turns

COMMAND = "python -m benchmarks.step"
NORMS: dict[str, networks.Norm] = {"flax": networks.flax, "jaxbn": networks.jaxbn}
ALL_NORMS: dict[str, networks.Norm] = {"none": networks.none, **NORMS}
ROUNDS = {"cpu": 11, "gpu": 30, "tpu": 30}
PROCESSES = 3  # in which the small ResNet is compiled
# Kinds of devices that users train on, by a word in JAX's name of them.
KINDS = {"cpu": "CPU", "H100": "NVIDIA H100", "A100": "NVIDIA A100", "TPU": "TPU"}


def main() -> None:
  parser = stored.parser(__doc__, COMMAND)
  parser.add_argument("--compile", choices=ALL_NORMS, help="compile the small ResNet here")
  arguments = parser.parse_args()
  if arguments.compile:
    print(json.dumps(seconds_to_compile(SMALL_RESNET, ALL_NORMS[arguments.compile])[0]))
    return
  rows = [{**row, **origin()} for row in run(arguments.quick)]
  old = [] if arguments.quick else (stored.read("step") or {"rows": []})["rows"]
  rows = [row for row in old if row["device"] != rows[0]["device"]] + rows
  stored.conclude("step", COMMAND, rows, parts, arguments)


def origin() -> Row:
  """The device, and what else a figure depends on."""
  device, machine = jax.devices()[0], stored.machine()
  cpu = f"CPU, {machine['cpu']}, {machine['cores']} cores"
  where = cpu if device.platform == "cpu" else device.device_kind
  made = {"device": device.device_kind, "machine": where, "jax": jax.__version__}
  return made | {"date": datetime.date.today().isoformat()}


def run(quick: bool) -> list[Row]:
  """The rows of every network, and of compiling the small one."""
  platform, rows = jax.default_backend(), []
  seconds_to_compile(SMALL_RESNET, networks.none)  # the first of a process takes longer
  for name in ["mobilenet"] if quick else WHOLE:
    network, dtype = WHOLE[name], "bfloat16"
    if platform == "cpu":
      dtype, batch = "float32", network.batch // 16
      network = dataclasses.replace(network, batch=batch, shape=(64, 64, 3))
    rows += step_rows(name, network, dtype, 2 if quick else ROUNDS[platform])
    print(f"{network.title}: done", flush=True)
  return rows + [compile_row(norm, 1 if quick else PROCESSES) for norm in ALL_NORMS]


def step_rows(name: str, network: Network, dtype: str, rounds: int) -> list[Row]:
  """A step with each norm: compiled one after the other, then run in turns."""
  load, rows, steps = os.getloadavg()[0], [], []
  for norm, factory in NORMS.items():
    seconds, compiled, arguments = seconds_to_compile(network, factory, dtype)
    temp, peak = hlo.memory_bytes(compiled)
    row = {"kind": "step", "network": name, "norm": norm, "dtype": dtype, "batch": network.batch}
    row |= {"shape": list(network.shape), "compile_s": short(seconds), "load": load}
    rows.append(row | {"temp_MB": temp / 1e6, "peak_MB": peak / 1e6, "rounds": rounds})
    steps.append(_running(compiled, arguments))
  times = in_turns(steps, Plan((), rounds, 0.0))
  return [row | stored.min_and_median(taken) for row, taken in zip(rows, times, strict=True)]


def seconds_to_compile(
  network: Network, factory: networks.Norm, dtype: str = "float32"
) -> tuple[float, Any, Any]:
  """Of tracing, lowering and compiling a step, with the step and the shapes that it takes."""
  model = network.model(factory, jnp.dtype(dtype))
  step, arguments = networks.train_step(model), networks.step_arguments(network, model)
  jax.clear_caches()
  start = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
  return time.perf_counter() - start, compiled, arguments


def _running(compiled: Any, shapes: Any) -> Callable[[], None]:
  """A call that takes one step from where the last one came to."""
  rng = np.random.default_rng(0)

  def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
    noise = 0.05 * rng.standard_normal(shape.shape, np.float32)
    return jnp.asarray(np.abs(noise), shape.dtype)  # variances among them, and labels of 0

  *state, inputs, targets = jax.tree.map(fill, tuple(shapes))

  def step() -> None:
    *state[:], loss = compiled(*state, inputs, targets)
    loss.block_until_ready()

  return step


def compile_row(norm: str, processes: int) -> Row:
  """The small ResNet's step in fresh processes: cold, and where JAX's cache on disk has it."""
  taken: dict[str, list[float]] = {"cold_s": [], "cached_s": []}
  for _ in range(processes):
    with tempfile.TemporaryDirectory() as folder:
      cache = {"JAX_COMPILATION_CACHE_DIR": folder}
      cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
      for seconds in taken.values():
        seconds.append(float(stored.in_a_process("step", "--compile", norm, **cache)[-1]))
  medians = {key: short(statistics.median(seconds)) for key, seconds in taken.items()}
  return {"kind": "compile", "norm": norm, "processes": processes, **medians}


# What the rows say.

STEPS = {
  "step": "{median_ms:,.1f} ms",
  "least": "{min_ms:,.1f} ms",
  "temporary memory": "{temp_MB:,.0f} MB",
  "memory in all": "{peak_MB:,.0f} MB",
  "compile time": "{compile_s:.1f} s",
}


def parts(results: Row) -> Row:
  rows = results["rows"]
  devices = dict.fromkeys(row["device"] for row in rows)
  never = [title for word, title in KINDS.items() if not any(word in device for device in devices)]
  return {
    "devices": "\n\n".join(_device(of(rows, device=device)) for device in devices),
    "never": ", ".join(never) or "none of those that were thought of",
  }


def _device(rows: list[Row]) -> str:
  """The tables of one kind of device."""
  steps, compiles = of(rows, kind="step"), of(rows, kind="compile")
  lines = [
    {**row, "title": WHOLE[row["network"]].title, "size": "x".join(map(str, row["shape"]))}
    for row in steps
  ]
  words = {"network": "{title}", "batch": "{batch} of {size}", "norm": "{norm}"}
  seconds = {"cold": "{cold_s:.2f} s", "from the cache": "{cached_s:.2f} s"}
  parts = {key: steps[0][key] for key in ("machine", "date", "jax", "dtype", "rounds")}
  parts["load"] = f"{max(row['load'] for row in steps):.1f}"
  parts["processes"] = compiles[0]["processes"]
  parts["steps"] = tabulate(lines, words, STEPS)
  parts["compiles"] = tabulate(compiles, {"norm": "{norm}"}, seconds)
  return stored.fill("step-device", parts).strip()


if __name__ == "__main__":
  main()
