"""What recurrent cells with batch normalization do alike, and what tells one from another.

What decides the time of a step is how much the backward pass finds stored, for a scan copies it all
once more. So a step keeps what it normalizes, before and not after, and computes the gates again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import Moments, RunningStats, _checks, init, moments, normalize, sync, update
from jaxbn._types import Array

Tree = TypeVar("Tree")


class Cell(NamedTuple):
  """What tells one cell from another.

  Attributes:
    gates: how many numbers each unit has in a product with a kernel.
    recur: of (state, W_h h, W_x x + b), the new state and an output gate. The output is gate *
      tanh(state), or without a gate (None) the state.
    params, stats, carry: the types. The carry's first field is the state.
  """

  gates: int
  recur: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]
  params: Any
  stats: Any
  carry: Any

  def size(self, name: str, features: int) -> int:
    """How many numbers a statistic or parameter has: of the cell one per unit, or of the gates."""
    return features if name.startswith("cell") else self.gates * features

  def parameter_shapes(self, in_features: int, features: int) -> dict[str, tuple[int, ...]]:
    """By their names, in the order in which they are made."""
    rows = {"input_kernel": (in_features,), "hidden_kernel": (features,)}
    return {n: (*rows.get(n, ()), self.size(n, features)) for n in self.params._fields}

  def start_stats(self, features: int, max_length: int, **options: Any) -> Any:
    """Running statistics before the first batch."""
    if max_length < 1:
      raise ValueError(
        f"max_length={max_length}: at least one step has statistics: give the length of the "
        "longest training sequence."
      )
    sizes = [self.size(name, features) for name in self.stats._fields]
    return self.stats(*(init((max_length, size), **options) for size in sizes))

  def start_carry(self, batch_shape: Any, features: int, seq_lengths: Any, dtype: Any) -> Any:
    """The carry before the first step."""
    batch = _checks.channel_shape(batch_shape)
    states = dict.fromkeys(self.states, jnp.zeros((*batch, features), dtype))
    seq_lengths = require_lengths(seq_lengths, batch)
    return self.carry(**states, t=jnp.zeros(batch, jnp.int32), seq_lengths=seq_lengths)

  @property
  def states(self) -> tuple[str, ...]:
    """The carry's fields that are states: c and h, or h alone."""
    return self.carry._fields[:-2]


class Options(NamedTuple):
  """How it is normalized; `tracking` goes to `update`."""

  use_running_average: bool
  epsilon: float
  axis_name: Any
  axis_index_groups: Any
  tracking: dict[str, Any]


def options(
  use_running_average: bool, epsilon: float, axis_name: Any, groups: Any, **tracking: Any
) -> Options:
  """The options, checked as far as this can be done before there are statistics."""
  axis_name, groups = _checks.sharing(axis_name, groups)
  running = _checks.static_bool("use_running_average", use_running_average)
  return Options(running, epsilon, axis_name, groups, tracking)


def step(
  cell: Cell, params: Any, stats: Any, carry: Any, x: Any, mask: Any, how: Options
) -> tuple[Any, jax.Array, Any]:
  """One step of any cell: `lstm_step` and `gru_step` say what that is."""
  x = _checks.inexact(x)
  stats = _checked(cell, params, stats, carry, x)
  valid = _existing(carry, mask)
  # What does not exist may be NaN, which in the kernels' gradients even a zero would not stop.
  x = x if valid is None else jnp.where(valid, x, 0)
  products = [x @ params.input_kernel, carry.h @ params.hidden_kernel]
  taken, after = _statistics(how, carry.t, products, [stats.input, stats.hidden], valid)

  def apply(z: jax.Array, taken: _Taken, scale: jax.Array, bias: Any = None) -> jax.Array:
    return normalize(z, *taken, scale, bias, epsilon=how.epsilon)

  @_recomputing
  def recur(p: Any, state: jax.Array, products: Any, taken: Any) -> Any:
    given = apply(products[0], taken[0], p.input_scale, p.bias)
    return cell.recur(state, apply(products[1], taken[1], p.hidden_scale), given)

  @_recomputing
  def output(p: Any, state: jax.Array, gate: jax.Array, taken: _Taken) -> jax.Array:
    return gate * jnp.tanh(apply(state, taken, p.cell_scale, p.cell_bias))

  state, gate = recur(params, carry[0], products, taken)
  h = state = where_valid(valid, state, carry[0])
  if gate is not None:
    (taken_c,), after_c = _statistics(how, carry.t, [state], [stats.cell], valid)
    after += after_c
    h = where_valid(valid, output(params, state, gate, taken_c), carry.h)
  states = {carry._fields[0]: state, "h": h}
  return carry._replace(**states, t=carry.t + 1), h, cell.stats(*after)


# In a scan it needs no barriers against common subexpressions: the other pass is another loop.
_recomputing = functools.partial(jax.checkpoint, prevent_cse=False)
_Taken = tuple[jax.Array, jax.Array]  # the mean and variance that normalize


def _existing(carry: Any, mask: Array | None) -> jax.Array | None:
  """Which examples exist in this step, (*batch, 1); None: all of them."""
  valid = None if mask is None else _checks.boolean_mask(mask, carry.h[..., 0])[..., None]
  if carry.seq_lengths is None:
    return valid
  there = (carry.t < carry.seq_lengths)[..., None]
  return there if valid is None else valid & there


def _statistics(
  how: Options,
  t: jax.Array,
  arrays: list[jax.Array],
  stats: list[RunningStats],
  valid: jax.Array | None,
) -> tuple[list[_Taken], list[RunningStats]]:
  """What normalizes each array, shared by one all-reduce, and the running statistics after it."""
  row = jnp.minimum(jnp.max(t), len(stats[0].mean) - 1)
  olds: list[RunningStats] = [_row(s, row) for s in stats]
  if how.use_running_average:
    return [(old.mean, old.var) for old in olds], stats
  batches = [moments(a, mask=valid) for a in arrays]
  if how.axis_name is not None:
    batches = _shared(how, batches)
  tracked = lax.stop_gradient(list(zip(olds, batches, strict=True)))
  news = [update(old, batch, **how.tracking) for old, batch in tracked]
  after = [_with_row(rows, row, new) for rows, new in zip(stats, news, strict=True)]
  return [(batch.mean, batch.var) for batch in batches], after


def _shared(how: Options, batches: list[Moments]) -> list[Moments]:
  """The moments of all devices: of several arrays with the same examples, by one all-reduce."""
  together = Moments(
    batches[0].count,
    jnp.concatenate([b.mean for b in batches]),
    jnp.concatenate([b.var for b in batches]),
  )
  count, *values = sync(together, how.axis_name, how.axis_index_groups)
  ends = np.cumsum([len(b.mean) for b in batches])[:-1]
  parts = zip(*(jnp.split(value, ends) for value in values), strict=True)
  return [Moments(count, mean, var) for mean, var in parts]


def where_valid(valid: jax.Array | None, new: jax.Array, old: jax.Array) -> jax.Array:
  """The new state of the examples that exist, in the carry's dtype."""
  new = new.astype(old.dtype)
  return new if valid is None else jnp.where(valid, new, old)


def _row(tree: Tree, t: jax.Array) -> Tree:
  return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, t, 0, keepdims=False), tree)


def _with_row(tree: Tree, t: jax.Array, row: Tree) -> Tree:
  def put(leaf: jax.Array, value: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(leaf, value.astype(leaf.dtype), t, 0)

  return jax.tree.map(put, tree, row)


def require_lengths(seq_lengths: Array | None, batch: tuple[int, ...]) -> jax.Array | None:
  """Refuses what is not one integer for each example."""
  if seq_lengths is None:
    return None
  seq_lengths = jnp.asarray(seq_lengths)
  if seq_lengths.shape != batch or not jnp.issubdtype(seq_lengths.dtype, jnp.integer):
    raise ValueError(
      f"seq_lengths are {seq_lengths.dtype} of shape {seq_lengths.shape}; they are integers of the "
      f"batch's shape {batch}, one for each example."
    )
  return seq_lengths.astype(jnp.int32)


def _checked(cell: Cell, params: Any, stats: Any, carry: Any, x: jax.Array) -> Any:
  """The statistics; refuses shapes that do not fit each other."""
  *batch, features = carry.h.shape
  if x.shape[:-1] != tuple(batch):
    raise ValueError(
      f"x has shape {x.shape}, but carry.h {carry.h.shape}: x is the input of one time step, and "
      "its axes but the last are the carry's."
    )
  shapes = cell.parameter_shapes(x.shape[-1], features)
  for name in ("input_kernel", "hidden_kernel", "bias"):
    require_shape(f"params.{name}", getattr(params, name), shapes[name])
  if not isinstance(stats, cell.stats):
    expected = cell.stats.__name__
    raise TypeError(
      f"stats is a {type(stats).__name__}; {expected} are needed: make them with "
      f"{expected.removesuffix('Stats').lower()}_stats(...)."
    )
  stats = cell.stats(*map(_checks.running_stats, stats))
  for name, value in stats._asdict().items():
    shape = len(value.mean), cell.size(name, features)
    require_shape(f"stats.{name}.mean", value.mean, shape)
  return stats


def require_shape(name: str, value: Any, shape: tuple[int, ...]) -> None:
  """Refuses another shape."""
  if jnp.shape(value) != shape:
    raise ValueError(
      f"{name} has shape {jnp.shape(value)}, but with this carry and x it must be {shape}."
    )
