r"""Recurrent batch normalization: between time steps (Cooijmans et al. 2016).

`lstm_step` and `gru_step` normalize, in every step, what comes from the input and what comes from
the hidden state separately, and the LSTM's cell ("Recurrent Batch Normalization", section 3).
Statistics are of one time step: they have a leading axis of time. To normalize the input's part
only, of whole sequences, is in `jaxbn.variants.input_norm`.

What decides the time of a step is how much the backward pass finds stored, for a scan copies it all
once more. So a step keeps what it normalizes, before and not after, and computes the gates again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import Moments, RunningStats, _checks, init, moments, normalize, sync, update
from jaxbn._running import require_running_stats

if TYPE_CHECKING:
  import chex

__all__ = [
  "GRUCarry",
  "GRUParams",
  "GRUStats",
  "LSTMCarry",
  "LSTMParams",
  "LSTMStats",
  "gru_carry",
  "gru_stats",
  "gru_step",
  "lstm_carry",
  "lstm_stats",
  "lstm_step",
]

Tree = TypeVar("Tree")


class LSTMParams(NamedTuple):
  """The parameters of an LSTM of H units: the gates i, f, g, o beside each other, as in Flax.

  The paper's gamma are `*_scale`, of which it starts all at 0.1; its W_x, W_h and b are
  `input_kernel`, `hidden_kernel` and `bias`.

  Attributes:
    input_kernel: of shape (features of x, 4 H).
    hidden_kernel: of shape (H, 4 H).
    bias: of the gates, (4 H,). Forget gates usually start at 1.
    input_scale: gamma_x, (4 H,).
    hidden_scale: gamma_h, (4 H,).
    cell_scale: gamma_c, (H,).
    cell_bias: beta_c, (H,).
  """

  input_kernel: chex.Array
  hidden_kernel: chex.Array
  bias: chex.Array
  input_scale: chex.Array
  hidden_scale: chex.Array
  cell_scale: chex.Array
  cell_bias: chex.Array


class GRUParams(NamedTuple):
  """The parameters of a GRU of H units: the gates r, z and the candidate n beside each other.

  Attributes:
    input_kernel, hidden_kernel, bias, input_scale, hidden_scale: as in `LSTMParams`, with 3 H for
      4 H.
  """

  input_kernel: chex.Array
  hidden_kernel: chex.Array
  bias: chex.Array
  input_scale: chex.Array
  hidden_scale: chex.Array


class LSTMStats(NamedTuple):
  """Running statistics of an LSTM, each with a leading axis of time.

  Attributes:
    input: of W_x x_t, (max_length, 4 H).
    hidden: of W_h h_{t-1}, (max_length, 4 H).
    cell: of c_t, (max_length, H).
  """

  input: RunningStats
  hidden: RunningStats
  cell: RunningStats


class GRUStats(NamedTuple):
  """Running statistics of a GRU: `input` and `hidden` as in `LSTMStats`, with 3 H for 4 H."""

  input: RunningStats
  hidden: RunningStats


class LSTMCarry(NamedTuple):
  """What an LSTM hands to its next step.

  Attributes:
    c: the cell, (*batch, H).
    h: the hidden state, (*batch, H).
    t: how many steps there were, int32, (*batch,); the same for all examples.
    seq_lengths: how many steps each example has, (*batch,); None: all of them.
  """

  c: chex.Array
  h: chex.Array
  t: chex.Array
  seq_lengths: chex.Array | None = None


class GRUCarry(NamedTuple):
  """What a GRU hands to its next step: `h`, `t` and `seq_lengths` as in `LSTMCarry`."""

  h: chex.Array
  t: chex.Array
  seq_lengths: chex.Array | None = None


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


def _lstm(c: jax.Array, hidden: jax.Array, given: jax.Array) -> tuple[jax.Array, jax.Array]:
  i, f, g, o = jnp.split(hidden + given, 4, -1)
  return jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g), jax.nn.sigmoid(o)


def _gru(h: jax.Array, hidden: jax.Array, given: jax.Array) -> tuple[jax.Array, None]:
  a_r, a_z, a_n = jnp.split(hidden, 3, -1)
  b_r, b_z, b_n = jnp.split(given, 3, -1)
  n, z = jnp.tanh(jax.nn.sigmoid(a_r + b_r) * a_n + b_n), jax.nn.sigmoid(a_z + b_z)
  return (1 - z) * n + z * h, None


LSTM = Cell(4, _lstm, LSTMParams, LSTMStats, LSTMCarry)
GRU = Cell(3, _gru, GRUParams, GRUStats, GRUCarry)


def lstm_stats(
  features: int, max_length: int, *, momentum: float | None = 0.99, debias: bool = False
) -> LSTMStats:
  """Running statistics of an LSTM before the first batch: mean 0, variance 1.

  Args:
    features: H, the number of units.
    max_length: how many steps have statistics of their own; those of the last serve all later ones.
    momentum, debias: as they will be given to `lstm_step`.

  Returns:
    LSTMStats.

  >>> from jaxbn.variants import recurrent
  >>> recurrent.lstm_stats(8, max_length=5).hidden.mean.shape
  (5, 32)
  """
  return LSTM.start_stats(features, max_length, momentum=momentum, debias=debias)


def gru_stats(
  features: int, max_length: int, *, momentum: float | None = 0.99, debias: bool = False
) -> GRUStats:
  """Running statistics of a GRU before the first batch: mean 0, variance 1.

  Args:
    features, max_length, momentum, debias: as of `lstm_stats`.

  Returns:
    GRUStats.

  >>> from jaxbn.variants import recurrent
  >>> recurrent.gru_stats(8, max_length=5).hidden.mean.shape
  (5, 24)
  """
  return GRU.start_stats(features, max_length, momentum=momentum, debias=debias)


def lstm_carry(
  batch_shape: int | Sequence[int],
  features: int,
  seq_lengths: chex.Array | None = None,
  dtype: Any = jnp.float32,
) -> LSTMCarry:
  """The carry before the first step: zeros.

  Args:
    batch_shape: the shape of the batch; an integer n means (n,).
    features: H, the number of units.
    seq_lengths: integers of the batch's shape: how many steps of each example exist. The others are
      padding, at the end.
    dtype: of c and h.

  Returns:
    LSTMCarry.

  >>> from jaxbn.variants import recurrent
  >>> recurrent.lstm_carry(2, 3).h.shape
  (2, 3)
  """
  return LSTM.start_carry(batch_shape, features, seq_lengths, dtype)


def gru_carry(
  batch_shape: int | Sequence[int],
  features: int,
  seq_lengths: chex.Array | None = None,
  dtype: Any = jnp.float32,
) -> GRUCarry:
  """The carry before the first step: zeros.

  Args:
    batch_shape, features, seq_lengths, dtype: as of `lstm_carry`.

  Returns:
    GRUCarry.

  >>> from jaxbn.variants import recurrent
  >>> recurrent.gru_carry(2, 3).h.shape
  (2, 3)
  """
  return GRU.start_carry(batch_shape, features, seq_lengths, dtype)


def lstm_step(
  params: LSTMParams,
  stats: LSTMStats,
  carry: LSTMCarry,
  x: chex.Array,
  *,
  use_running_average: bool,
  mask: chex.Array | None = None,
  momentum: chex.Numeric | None = 0.99,
  epsilon: float = 1e-5,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
) -> tuple[LSTMCarry, jax.Array, LSTMStats]:
  r"""One step of an LSTM with recurrent batch normalization (Cooijmans et al. 2016, section 3).

      (i, f, g, o) = BN(W_h h_{t-1}; gamma_h) + BN(W_x x_t; gamma_x) + b
      c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
      h_t = sigmoid(o) tanh(BN(c_t; gamma_c, beta_c))

  In training each BN takes the statistics of the batch in this step, and row min(t, max_length - 1)
  of its running ones follows; in evaluation it takes that row. The two in the gates have no bias
  (b is it), and c itself is handed on as it is. The initial h is the same for all examples if it is
  not given otherwise: its product then has variance 0, and counts for nothing. Where inputs too are
  constant, the paper starts h with some noise, for 1/sqrt(epsilon) multiplies its gradient.

  What is wrong in the running statistics of one step adds to the next's: to evaluate while the
  parameters still change fast, average them anew, over batches with momentum=None, as the paper
  does in the end.

  Works under every transformation, also around a `lax.scan` of it.

  Args:
    params: LSTMParams.
    stats: LSTMStats, as from `lstm_stats`. They are no path for gradients in training.
    carry: LSTMCarry, as from `lstm_carry` or the last step. All examples are at the same time: the
      latest of carry.t.
    x: the input of this step, (*batch, features).
    use_running_average: False in training, True in evaluation; a Python bool.
    mask: boolean, (*batch,): which examples exist in this step; beside carry.seq_lengths. One that
      does not enters no statistic and no gradient, its x may be NaN, and its c and h stay as they
      were.
    epsilon: added to the variances.
    axis_name, axis_index_groups: as in `jaxbn.sync`. There are two all-reduces in a step: of the
      gates' products, and of the cell.
    momentum, debias, unbiased, skip_nonfinite: as in `jaxbn.update`.

  Returns:
    (carry, y, stats): y is the new h; stats in evaluation as they were.

  Raises:
    TypeError, ValueError: shapes that do not fit each other; a mask that is not boolean; what
      `jaxbn.moments`, `sync` and `update` refuse.

  >>> import jax, jax.numpy as jnp
  >>> from jaxbn.variants import recurrent
  >>> w_x = jax.random.normal(jax.random.key(0), (2, 4 * 3))
  >>> w_h = jax.random.normal(jax.random.key(1), (3, 4 * 3))
  >>> gain = jnp.full(12, 0.1)
  >>> params = recurrent.LSTMParams(w_x, w_h, jnp.zeros(12), gain, gain, gain[:3], jnp.zeros(3))
  >>> def step(carry_and_stats, x):
  ...   carry, stats = carry_and_stats
  ...   carry, y, stats = recurrent.lstm_step(params, stats, carry, x, use_running_average=False)
  ...   return (carry, stats), y
  >>> x = jax.random.normal(jax.random.key(2), (5, 8, 2))  # time, batch, features
  >>> start = recurrent.lstm_carry(8, 3), recurrent.lstm_stats(3, max_length=5)
  >>> (carry, stats), y = jax.lax.scan(step, start, x)
  >>> y.shape
  (5, 8, 3)
  """
  tracking = {"debias": debias, "unbiased": unbiased, "skip_nonfinite": skip_nonfinite}
  how = options(
    use_running_average, epsilon, axis_name, axis_index_groups, momentum=momentum, **tracking
  )
  return step(LSTM, params, stats, carry, x, mask, how)


def gru_step(
  params: GRUParams,
  stats: GRUStats,
  carry: GRUCarry,
  x: chex.Array,
  *,
  use_running_average: bool,
  mask: chex.Array | None = None,
  momentum: chex.Numeric | None = 0.99,
  epsilon: float = 1e-5,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
) -> tuple[GRUCarry, jax.Array, GRUStats]:
  r"""One step of a GRU with recurrent batch normalization, after the manner of `lstm_step`.

      (a_r, a_z, a_n) = BN(W_h h_{t-1}; gamma_h)
      (b_r, b_z, b_n) = BN(W_x x_t; gamma_x) + b
      r = sigmoid(a_r + b_r),   z = sigmoid(a_z + b_z),   n = tanh(r a_n + b_n)
      h_t = (1 - z) n + z h_{t-1}

  The reset gate comes after the product, as in Flax, so that one normalization serves all three.
  Cooijmans et al. 2016 have the LSTM only: this does for the GRU what they do.

  Args:
    params: GRUParams.
    stats: GRUStats, as from `gru_stats`. They are no path for gradients in training.
    carry: GRUCarry, as from `gru_carry` or the last step.
    x, use_running_average, mask, momentum, epsilon, axis_name, axis_index_groups, debias, unbiased,
      skip_nonfinite: as in `lstm_step`; here there is one all-reduce in a step.

  Returns:
    (carry, y, stats): y is the new h; stats in evaluation as they were.

  Raises:
    TypeError, ValueError: as in `lstm_step`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxbn.variants import recurrent
  >>> w_x = jax.random.normal(jax.random.key(0), (2, 3 * 3))
  >>> w_h = jax.random.normal(jax.random.key(1), (3, 3 * 3))
  >>> params = recurrent.GRUParams(w_x, w_h, jnp.zeros(9), jnp.full(9, 0.1), jnp.full(9, 0.1))
  >>> x = jax.random.normal(jax.random.key(2), (8, 2))
  >>> start = recurrent.gru_stats(3, max_length=5), recurrent.gru_carry(8, 3)
  >>> carry, y, stats = recurrent.gru_step(params, *start, x, use_running_average=False)
  >>> y.shape
  (8, 3)
  """
  tracking = {"debias": debias, "unbiased": unbiased, "skip_nonfinite": skip_nonfinite}
  how = options(
    use_running_average, epsilon, axis_name, axis_index_groups, momentum=momentum, **tracking
  )
  return step(GRU, params, stats, carry, x, mask, how)


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


def _existing(carry: Any, mask: chex.Array | None) -> jax.Array | None:
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


def forget_gates_at_one(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """The initial bias of an LSTM: 1 for forget gates, as in the code of Cooijmans et al., else 0."""
  del key  # what every initializer is given
  i, f, g, o = jnp.split(jnp.zeros(shape, dtype), 4, -1)
  return jnp.concatenate([i, f + 1, g, o], -1)


def _row(tree: Tree, t: jax.Array) -> Tree:
  return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, t, 0, keepdims=False), tree)


def _with_row(tree: Tree, t: jax.Array, row: Tree) -> Tree:
  def put(leaf: jax.Array, value: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(leaf, value.astype(leaf.dtype), t, 0)

  return jax.tree.map(put, tree, row)


def require_lengths(seq_lengths: chex.Array | None, batch: tuple[int, ...]) -> jax.Array | None:
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
  stats = cell.stats(*map(require_running_stats, stats))
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
