"""What explicit meshes ask for: there, types say how arrays are sharded, and have to agree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def on_mesh_of(arrays: Any) -> contextlib.AbstractContextManager[Any]:
  """Where arrays made anew are on the explicit mesh of these, as they are in a jit."""
  meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(arrays))
  explicit = next((m for m in meshes if m.explicit_axes), None)
  return contextlib.nullcontext() if explicit is None else jax.sharding.use_abstract_mesh(explicit)


def zeros_like(x: jax.Array) -> jax.Array:
  """On x's explicit mesh too, where a jit knows of it from its arguments alone."""
  zeros, sharding = jnp.zeros_like(x), jax.typeof(x).sharding
  return jax.sharding.reshard(zeros, sharding) if sharding.mesh.explicit_axes else zeros


def sharded_alike(*values: Any) -> tuple[Any, ...]:
  """Values per channel, sharded as that which is sharded most: for a select."""
  shardings = [jax.typeof(v).sharding for v in values if np.ndim(v)]
  shardings = [s for s in shardings if s.mesh.explicit_axes]
  if not shardings:
    return values
  most = max(shardings, key=lambda s: sum(axis is not None for axis in s.spec))
  return tuple(jax.sharding.reshard(v, most) if np.ndim(v) else v for v in values)


def by_partitioner(function: Callable[..., Any], x: jax.Array, out: Any) -> Callable[..., Any]:
  """The function; on x's explicit mesh one whose parts XLA places, and its results as specs `out`.

  For what has no type there: a product that sums over a sharded axis, a few elements of many, two
  axes of an array that share one of the mesh.
  """
  mesh = jax.typeof(x).sharding.mesh
  if not mesh.explicit_axes:
    return function
  placed = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), out)
  return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=placed)
