"""The least that a norm adds, place by place, as the table in docs/benchmarks.md counts it."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import pytest

from benchmarks import floor, networks
from benchmarks import results as stored
from benchmarks.results import of

CHANNELS = 4


def at(net, x, place):
  """A norm between two convolutions, and what is done with its result."""
  conv = functools.partial(net.conv, features=CHANNELS, size=1)
  x = conv(x)
  if place == "activation":
    return conv(net.norm(x))
  if place == "sum":
    return conv(net.norm(conv(x), residual=x))
  if place == "projection":
    return conv(net.norm(conv(x), residual=net.norm(x, False)))
  if place == "last":
    return net.norm(x)
  if place == "neither":
    return conv(net.norm(x, False))
  if place == "sum alone":
    return conv(net.norm(conv(x), False, x))
  if place == "mean":
    return net.norm(x).mean((1, 2))
  if place == "mean alone":
    return net.norm(x, False).mean((1, 2))
  if place == "average of four":
    return conv(nn.avg_pool(net.norm(x), (2, 2), (2, 2)))
  return nn.Conv(CHANNELS, (1, 1), dtype=jnp.float32)(net.norm(x))


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
  network = networks.Network(place, at, (16, 16, 3), 2, {"place": place})
  found = list(floor.layers(network, jnp.bfloat16))
  size = 2 * 2 * 16 * 16 * CHANNELS
  assert [of for of, _ in found] == [size] * len(passes)
  # A mean is not nothing, but one in 256.
  assert sorted(least / size for _, least in found) == pytest.approx(passes, rel=0.005)
  assert floor.floor_bytes(network, jnp.bfloat16) == sum(least for _, least in found)


@pytest.mark.parametrize(
  ("place", "passes"),
  [("activation", [2]), ("sum", [5]), ("projection", [2, 5]), ("neither", [2]), ("mean", [2])],
)
def test_passes_by_place_where_convolutions_fuse(place, passes):
  # What the first convolution makes has no gradient to hand on: a pass less.
  network = networks.Network(place, at, (16, 16, 3), 2, {"place": place})
  found = list(floor.fused_layers(network, jnp.bfloat16))
  size = 2 * 16 * 16 * 8 * 128  # of four channels and two examples, in tiles
  assert sorted(found) == [(size, number * size) for number in passes]


def test_the_stored_floors_are_those_of_the_networks():
  rows = of(stored.read("compiled")["rows"], kind="program")
  for name, dtype, floor_mb in {(r["network"], r["dtype"], r["floor_MB"]) for r in rows}:
    found = floor.floor_bytes(networks.NETWORKS[name], jnp.dtype(dtype))
    assert found == pytest.approx(1e6 * floor_mb), name
