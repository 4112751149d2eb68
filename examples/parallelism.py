"""Three ways to spread a step over devices, which give the same numbers.

A body is a function of (state, batch) that knows the devices only as an optional axis name.
`config.parallelism` names how it runs on all of them:

  pmap       one program a device; batches have a leading axis of devices
  shard_map  the same over a mesh, with JAX's checks of what differs between devices
  jit        one program for the whole batch, which the compiler cuts up: no axis name at all

In all three the state is replicated and the examples are dealt out in order, so that only these
classes know which it is. Each also works in one of several processes, which all do the same:
what `shard` takes is then this process's examples, in the order of its devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from examples.settings import lookup

AXIS = "batch"
SHARED, DEALT = jax.P(), jax.P(AXIS)


class Parallelism:
  """What the three have in common.

  Attributes:
    devices: all that take part, in the order in which examples are dealt to them.
    axis_name: what the body knows them as; None if it need not know.
    mesh: the devices among which this process's arrays are placed.
    checks: shard_map's, of what differs between devices.
  """

  axis_name: str | None = AXIS

  def __init__(self, devices: Sequence[jax.Device], checks: bool = True):
    self.devices, self.checks = tuple(devices), checks
    self.mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))

  def step(self, body: Callable[..., Any], *, donate_state: bool = False) -> Callable[..., Any]:
    """`body(state, batch, axis_name=...)` on every device, compiled once.

    Takes what `replicate` and `shard` give, and gives replicated results. A donated state's
    memory becomes the new state's.
    """
    body = functools.partial(body, axis_name=self.axis_name)
    return self._compile(body, (0,) if donate_state else ())

  def _compile(self, body: Callable[..., Any], donated: tuple[int, ...]) -> Callable[..., Any]:
    raise NotImplementedError

  def replicate(self, tree: Any) -> Any:
    """Gives each device a copy of `tree`, which every process has."""
    return self._place(tree, SHARED)

  def shard(self, batch: Any) -> Any:
    """Deals this process's examples out to its devices, in order."""
    return self._place(batch, DEALT)

  def _place(self, tree: Any, spec: jax.P) -> Any:
    # The placement that a step's results have: anything else would be copied, or compiled, anew.
    place = functools.partial(jax.make_array_from_process_local_data, self._sharding(spec))
    return jax.tree.map(lambda x: place(np.asarray(x)), tree)

  def _sharding(self, spec: jax.P) -> jax.sharding.NamedSharding:
    return jax.NamedSharding(self.mesh, spec)


class Pmap(Parallelism):
  """`jax.pmap`: arrays are this process's alone, and batches are (local devices, b, ...)."""

  def __init__(self, devices: Sequence[jax.Device], checks: bool = True):
    super().__init__(devices, checks)
    mine = [d for d in devices if d.process_index == jax.process_index()]
    self.mesh = jax.sharding.Mesh(np.array(mine), (AXIS,))

  def _compile(self, body: Callable[..., Any], donated: tuple[int, ...]) -> Callable[..., Any]:
    return jax.pmap(
      body,
      axis_name=AXIS,
      in_axes=(None, 0),
      out_axes=None,
      devices=self.devices,
      donate_argnums=donated,
    )

  def shard(self, batch: Any) -> Any:
    n = self.mesh.size
    return super().shard(jax.tree.map(lambda x: x.reshape(n, len(x) // n, *x.shape[1:]), batch))


class ShardMap(Parallelism):
  """`jax.shard_map` over a mesh of one axis, checking that what leaves it as shared is shared."""

  def _compile(self, body: Callable[..., Any], donated: tuple[int, ...]) -> Callable[..., Any]:
    mapped = jax.shard_map(
      body, mesh=self.mesh, in_specs=(SHARED, DEALT), out_specs=SHARED, check_vma=self.checks
    )
    return jax.jit(mapped, donate_argnums=donated)


class Jit(Parallelism):
  """`jax.jit` of arrays that are spread over a mesh: the body sees the whole batch."""

  axis_name = None

  def _compile(self, body: Callable[..., Any], donated: tuple[int, ...]) -> Callable[..., Any]:
    return jax.jit(
      body,
      in_shardings=(self._sharding(SHARED), self._sharding(DEALT)),
      out_shardings=self._sharding(SHARED),
      donate_argnums=donated,
    )


MODES: dict[str, type[Parallelism]] = {"pmap": Pmap, "shard_map": ShardMap, "jit": Jit}


def create(config: Any, devices: Sequence[jax.Device]) -> Parallelism:
  """The parallelism that `config.parallelism` names, over these devices."""
  mode = lookup(MODES, config.parallelism, "config.parallelism")
  # With its checks on, shard_map (of JAX 0.10) takes no sum over an axis of a vmap inside it.
  lockstep = config.microbatches > 1 and config.microbatch_statistics == "merged"
  return mode(devices, checks=not lockstep)
