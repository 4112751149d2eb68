"""Batches over devices, and how far it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_BAR = 24  # characters
_CLEAR_THE_REST = "\033[K"  # of the line, for a terminal


def rows(args: Any) -> int:
  """How many examples there are: of the first array that has any."""
  return next((np.shape(a)[0] for a in jax.tree.leaves(args) if np.ndim(a)), 1)


class Spread:
  """Puts a batch's rows onto as many devices as divide their number, and all else onto the same."""

  def __init__(self, devices: Sequence[Any] | None):
    self.devices = list(jax.local_devices() if devices is None else devices)
    self.there: dict[int, tuple[Any, Any]] = {}  # variables, by the number of devices

  def __call__(self, tree: Any, so_far: Any, index: Any, args: Any) -> tuple[Any, ...]:
    examples = rows(args)
    n = max(d for d in range(1, len(self.devices) + 1) if examples % d == 0)
    mesh = Mesh(np.array(self.devices[:n]), ("rows",))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("rows"))

    def place(a: Any) -> Any:
      return jax.device_put(a, split if np.shape(a)[:1] == (examples,) else whole)

    if n not in self.there or self.there[n][0] is not tree:
      self.there[n] = tree, jax.device_put(tree, whole)
    rest = jax.device_put((so_far, index), whole)
    return self.there[n][1], *rest, jax.tree.map(place, args)


def placed_like(was: Any, value: jax.Array) -> jax.Array:
  """On the devices of what it takes the place of, not on those that batches were spread over."""
  here = np.asarray(value)
  return (
    jax.device_put(here, was.sharding) if getattr(was, "committed", False) else jnp.asarray(here)
  )


def how_far(number: int, batches: Any) -> str:
  """The batch that is done, and where there is an end to be seen, a bar."""
  try:
    total = len(batches)
  except TypeError:  # a function, a generator, a loader without an end
    total = 0
  if number > total:  # or one that counts whole batches only
    return f"batch {number}"
  return f"batch {number} of {total} [{'#' * (_BAR * number // total):{_BAR}}]"


def to_stderr(text: str) -> None:
  """Where it is said how far long work is: one line, if somebody can see it."""
  if sys.stderr.isatty():
    print(f"\r{text}{_CLEAR_THE_REST}", end="", file=sys.stderr, flush=True)
