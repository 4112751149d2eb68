"""What the doctor costs: noting in training, as a share of a step, and diagnosing a ResNet-18.

  make doctor-cost    on whatever device JAX finds

A step with a note and one without take turns, so that what else the machine does meets both. The
diagnosis is the first in its process: tracing and compiling included.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from benchmarks import networks
from benchmarks.networks import CIFAR, SMALL_RESNET, Network

RESNET_18 = Network("ResNet-18", networks.resnet, CIFAR, 16, {"block": "Basic", "stages": (2,) * 4})
BATCHES, ROUNDS = 8, 31


def main() -> None:
  device = jax.devices()[0]
  print(f"{device.device_kind}, {len(jax.devices())} of them; jax {jax.__version__}", flush=True)
  print(diagnosis(RESNET_18), flush=True)
  print(noting(dataclasses.replace(SMALL_RESNET, batch=16)))


def diagnosis(network: Network) -> str:
  """Seconds of one diagnosis, with all that it compiles."""
  model, (params, stats, _), batches = start(network)
  jax.block_until_ready(params)
  wall, cpu = time.perf_counter(), time.process_time()
  variables = {"params": params, "batch_stats": stats}
  report = jaxbn.diagnose(model, variables, batches, training={}, progress=quiet)
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return (
    f"One diagnosis of a {network.title} with {len(report.layers)} layers, {BATCHES} batches of "
    f"{network.batch} images of {'x'.join(map(str, network.shape))}: {wall:.1f} s, "
    f"{cpu:.1f} s of CPU."
  )


def noting(network: Network) -> str:
  """What `Doctor` adds to a training, in per cent."""
  model, state, batches = start(network)
  targets = jnp.zeros(network.batch, jnp.int32)
  step = jax.jit(networks.train_step(model), donate_argnums=(0, 1, 2))
  doctor = jaxbn.diagnostics.Doctor(model, progress=quiet)

  def seconds(noted: bool) -> float:
    nonlocal state
    begin = time.perf_counter()
    *state, loss = step(*state, batches[0], targets)
    if noted:
      doctor(0, {"params": state[0], "batch_stats": state[1]}, batches[0])
      doctor.history()
    jax.block_until_ready((state, loss))
    return time.perf_counter() - begin

  for noted in (True, False):  # compiled here
    seconds(noted)
  pairs = [(seconds(True), seconds(False)) for _ in range(ROUNDS)]
  alone = statistics.median(without for _, without in pairs)
  note = statistics.median(with_note - without for with_note, without in pairs)
  return (
    f"A note in the training of a small {network.title}, in steps of {1e3 * alone:.0f} ms: "
    f"{note / alone:.2f} steps, the median of {ROUNDS} pairs; one in {doctor.every} steps: "
    f"{note / alone / doctor.every:.1%} of a step."
  )


def start(network: Network) -> tuple[Any, tuple[Any, Any, Any], list[jax.Array]]:
  """The model, its first state, and batches of noise on the device."""
  model = network.model(networks.flax, jnp.dtype("float32"))
  rng = np.random.default_rng(0)
  shape = (network.batch, *network.shape)
  batches = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(BATCHES)]
  init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
  variables = init(jax.random.key(0), batches[0])
  params = variables["params"]
  return model, (params, variables["batch_stats"], networks.OPTIMIZER.init(params)), batches


def quiet(text: str) -> None:
  """Nobody watches how far it is."""


if __name__ == "__main__":
  main()
