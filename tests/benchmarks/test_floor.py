"""The least that a norm adds, place by place, as the table in docs/benchmarks.md counts it."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from benchmarks import floor, networks

CHANNELS = 4


class Place(nn.Module):
  """A norm between two convolutions, and what is done with its result."""

  norm: networks.Norm
  dtype: object
  place: str

  @nn.compact
  def __call__(self, x):
    def conv(x):
      return nn.Conv(CHANNELS, (1, 1), dtype=self.dtype)(x)

    x = conv(x)
    if self.place == "activation":
      return conv(self.norm(True)(x))
    if self.place == "sum":
      return conv(self.norm(True)(conv(x), residual=x))
    if self.place == "projection":
      return conv(self.norm(True)(conv(x), residual=self.norm(False)(x)))
    if self.place == "last":
      return self.norm(True)(x)
    if self.place == "neither":
      return conv(self.norm(False)(x))
    if self.place == "sum alone":
      return conv(self.norm(False)(conv(x), residual=x))
    if self.place == "mean":
      return self.norm(True)(x).mean((1, 2))
    if self.place == "mean alone":
      return self.norm(False)(x).mean((1, 2))
    if self.place == "average of four":
      return conv(nn.avg_pool(self.norm(True)(x), (2, 2), (2, 2)))
    return nn.Conv(CHANNELS, (1, 1), dtype=jnp.float32)(self.norm(True)(x))


@pytest.mark.parametrize(
  ("place", "passes"),
  [
    ("activation", [3]),
    ("last", [3]),
    ("sum", [5]),
    ("projection", [3, 5]),
    ("neither", [8]),
    ("sum alone", [8]),
    ("mean", [2]),
    ("mean alone", [6]),
    ("average of four", [2.25]),
    ("float32 next", [4]),
  ],
)
def test_passes_by_place(place, passes):
  def module(norm, dtype):
    return Place(norm, dtype, place)

  network = networks.Network(place, module, (16, 16, 3), 2)
  found = list(floor.layers(network, jnp.bfloat16))
  size = 2 * 2 * 16 * 16 * CHANNELS
  assert [of for of, _ in found] == [size] * len(passes)
  # A mean is not nothing, but one in 256.
  assert sorted(least / size for _, least in found) == pytest.approx(passes, rel=0.005)
  assert floor.floor_bytes(network, jnp.bfloat16) == sum(least for _, least in found)
