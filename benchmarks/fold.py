"""What folding the batch norms of a ResNet saves in evaluation, on this machine's CPU.

python -m benchmarks.fold
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hlo
from benchmarks.results import table
from jaxbn.surgery import fold

WIDTHS, BATCH, ROUNDS = (16, 32, 64), 32, 21


class ResNet(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(self.norm(nn.Conv(WIDTHS[0], (3, 3), use_bias=False)(x)))
    for stage, width in enumerate(WIDTHS):
      stride = 2 if stage else 1
      y = nn.relu(self.norm(nn.Conv(width, (3, 3), stride, use_bias=False)(x)))
      y = self.norm(nn.Conv(width, (3, 3), use_bias=False)(y))
      x = nn.relu(y + self.norm(nn.Conv(width, (1, 1), stride, use_bias=False)(x)))
    return nn.Dense(10)(x.mean((1, 2)))

  def norm(self, x: jax.Array) -> jax.Array:
    return nn.BatchNorm(use_running_average=True)(x)


def main() -> None:
  x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 32, 32, 3)), jnp.float32)
  model = ResNet()
  variables = jax.jit(model.init)(jax.random.key(0), x)
  folded = fold(model.apply, variables, x)
  print(folded.report)
  calls: dict[str, Any] = {"original": (jax.jit(model.apply), variables), "folded": folded[:2]}
  programs = {name: (f.lower(v, x).compile(), v) for name, (f, v) in calls.items()}
  times: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(ROUNDS):  # in turns, so that what else the machine does meets both
    for name, (program, v) in programs.items():
      start = time.perf_counter()
      program(v, x).block_until_ready()
      times[name].append(1e3 * (time.perf_counter() - start))
  lines = [["program", "kernels", "MB accessed", "median ms", "least ms"]]
  lines += [
    [name, *_counts(program), f"{statistics.median(times[name]):.2f}", f"{min(times[name]):.2f}"]
    for name, (program, _) in programs.items()
  ]
  print(table(lines))


def _counts(program: Any) -> tuple[str, str]:
  kernels = len(hlo.parse(program.as_text()).kernels)
  return str(kernels), f"{program.cost_analysis()['bytes accessed'] / 1e6:.1f}"


if __name__ == "__main__":
  main()
