"""One of two processes with two devices each: a few steps in every mode, as JSON.

python -m tests.examples.one_of_two PORT PROCESS_ID
"""

import json
import sys

import jax

from examples import parallelism
from tests.examples import helpers

STEPS, SIZE = 3, 32


def config(mode):
  return helpers.config(model="mlp", parallelism=mode, microbatches=2, skip_nonfinite=1)


def main(port, process):
  jax.config.update("jax_num_cpu_devices", 2)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", 2, process)
  half = slice(process * SIZE // 2, (process + 1) * SIZE // 2)
  mine = [jax.tree.map(lambda x: x[half], helpers.batch(SIZE, seed)) for seed in range(STEPS)]
  results = {}
  for mode in parallelism.MODES:
    state, sums = helpers.Job(config(mode), 4).train(mine)
    kernel = state.params["head"]["kernel"]
    results[mode] = [helpers.mean_losses(sums), kernel.tolist()]
  print(json.dumps(results))
  jax.distributed.shutdown()


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]))
