"""What differs between examples: a table with a row for each class or domain, and whose is which.

The examples lie along the first axis of x that is not a channel's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._measure import measure
from jaxbn._types import Axes, Inputs, Moments, Plan


def examples_axis(x: jax.Array, axes: Axes) -> int:
  """The axis along which the examples lie."""
  if not axes.reduced:
    raise ValueError(
      f"x of shape {x.shape} has channels on all its axes, and no axis of examples: name the "
      "channels' axis, or give x one axis more, in front."
    )
  return axes.reduced[0]


def indices(
  name: str, value: Any, rows: int, x: jax.Array, axes: Axes, valid: jax.Array | None
) -> jax.Array:
  """One row of a table for each example: (N,), from that or from one integer for all.

  One that is out of range becomes 0 where its example has no valid element.
  """
  number = x.shape[examples_axis(x, axes)]
  value = value if isinstance(value, jax.Array) else np.asarray(value)  # a list as well
  dtype = jnp.result_type(value)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"{name} has dtype {dtype}; they are integers from 0 to {rows - 1}.")
  if np.shape(value) not in ((), (number,)):
    raise ValueError(
      f"{name} has shape {np.shape(value)}, but x of shape {x.shape} holds {number} examples: pass "
      f"one integer for each, of shape ({number},), or one for all."
    )
  exists = _existing(x, axes, valid)
  if _checks.concrete(value) and (exists is None or _checks.concrete(exists)):
    # In NumPy: inside jit, operations of JAX are traced even where their arguments are known.
    known = np.broadcast_to(value, (number,))
    known = known if exists is None else known[np.broadcast_to(exists, (number,))]
    if np.any((known < 0) | (known >= rows)):
      outside = known[(known < 0) | (known >= rows)][0]
      raise ValueError(
        f"{name} hold {outside}, but there are rows from 0 to {rows - 1}: count from 0, and mask "
        "examples that have none."
      )
  index = jnp.broadcast_to(jnp.asarray(value), (number,))
  if exists is not None:
    index = jnp.where(exists | ((index >= 0) & (index < rows)), index, 0)
  return _as_sharded(index, x, axes)


def _as_sharded(index: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
  """Where types say how arrays are sharded: as x's examples are."""
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.explicit_axes:
    return index
  of_examples = jax.P(sharding.spec[examples_axis(x, axes)])
  return jax.sharding.reshard(index, jax.NamedSharding(sharding.mesh, of_examples))


def _existing(x: jax.Array, axes: Axes, valid: jax.Array | None) -> Any:
  """Which examples have a valid element, of shape (N,) or (1,); None: all."""
  if valid is None:
    return None
  others = tuple(a for a in range(x.ndim) if a != examples_axis(x, axes))
  return np.any(np.asarray(valid), others) if _checks.concrete(valid) else jnp.any(valid, others)


def table(name: str, value: Any, rows: int, x: jax.Array, axes: Axes) -> jax.Array:
  """A table as an array, if it has that many rows of the channels' shape."""
  value, shape = jnp.asarray(value), (rows, *axes.shape(x))
  if value.shape != shape:
    raise ValueError(
      f"{name} has shape {value.shape}, but for {rows} rows and x of shape {x.shape} with its "
      f"channels on axis {axes.features} it is {shape}: pass that, or name the channels' axis."
    )
  return value


def row_of_each(value: jax.Array, index: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
  """Each example's row of a table, with as many axes as x; NaN where there is no such row."""
  axis = examples_axis(x, axes)
  sharding, out_sharding = jax.typeof(x).sharding, None
  if sharding.mesh.explicit_axes:
    channels = (sharding.spec[a] for a in axes.features)
    out_sharding = jax.NamedSharding(sharding.mesh, jax.P(sharding.spec[axis], *channels))
  rows = value.at[index].get(
    mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=out_sharding
  )
  together = sorted((axis, *axes.features))
  rows = jnp.moveaxis(rows, 0, together.index(axis))
  return jnp.expand_dims(rows, [a for a in range(x.ndim) if a not in together])


def moments_of_examples(plan: Plan, inputs: Inputs) -> Moments:
  """The moments of each example by itself, in one pass: the examples' axis is in front."""
  x, axes = inputs.x, plan.axes
  axis = examples_axis(x, axes)
  together = tuple(sorted((axis, *axes.features)))
  position, others = together.index(axis), tuple(a for a in axes.reduced if a != axis)
  own = measure(plan._replace(axes=Axes(together, others)), inputs)
  # What all share is shared no more once some of them are left out.
  each = jnp.ones([x.shape[axis] if a == axis else 1 for a in together], jnp.int32)
  own = own._replace(count=jnp.asarray(own.count) * each)
  return Moments(*(jnp.moveaxis(v, position, 0) for v in own))
