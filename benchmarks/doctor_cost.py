"""What the doctor costs: noting in training, as a share of a step, and diagnosing a ResNet-18.

  make doctor-cost    on whatever device JAX finds

Blocks of as many steps as lie between two notes, with the note and without, take turns, so that
what else the machine does meets both. The diagnosis is the first in its process: tracing and
compiling included.
"""

from __future__ import annotations

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
BATCHES, ROUNDS = 8, 7


def main() -> None:
  device = jax.devices()[0]
  print(f"{device.device_kind}, {len(jax.devices())} of them; jax {jax.__version__}", flush=True)
  print(diagnosis(RESNET_18), flush=True)
  print(noting(SMALL_RESNET._replace(batch=16)))


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

  def block(noted: bool) -> float:
    nonlocal state
    begin = time.perf_counter()
    for i in range(doctor.every):
      *state, loss = step(*state, batches[i % BATCHES], targets)
      if noted and i == 0:
        doctor(0, {"params": state[0], "batch_stats": state[1]}, batches[0])
    jax.block_until_ready((state, loss))
    doctor.history()
    return time.perf_counter() - begin

  for noted in (True, False):  # compiled here
    block(noted)
  pairs = [(block(True), block(False)) for _ in range(ROUNDS)]
  share = statistics.median(with_note / without - 1 for with_note, without in pairs)
  alone = statistics.median(without for _, without in pairs) / doctor.every
  return (
    f"Noting every {doctor.every} steps in the training of a small {network.title}, steps of "
    f"{1e3 * alone:.0f} ms: {share:.1%} of a step, the median of {ROUNDS} pairs; a note costs "
    f"{share * doctor.every:.2f} steps."
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
