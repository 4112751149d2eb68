r"""Recurrent batch normalization: between time steps (Cooijmans et al. 2016).

`lstm_step` and `gru_step` normalize, in every step, what comes from the input and what comes from
the hidden state separately, and the LSTM's cell ("Recurrent Batch Normalization", section 3).
Statistics are of one time step: they have a leading axis of time. To normalize the input's part
only, of whole sequences, is in `jaxbn.variants.input_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import RunningStats
from jaxbn._names import by_our_names
from jaxbn._types import Array, Numeric
from jaxbn.variants._cells import Cell, options, step

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


def __dir__() -> list[str]:
  return __all__


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

  input_kernel: jax.Array
  hidden_kernel: jax.Array
  bias: jax.Array
  input_scale: jax.Array
  hidden_scale: jax.Array
  cell_scale: jax.Array
  cell_bias: jax.Array


class GRUParams(NamedTuple):
  """The parameters of a GRU of H units: the gates r, z and the candidate n beside each other.

  `input_kernel`, `hidden_kernel`, `bias`, `input_scale` and `hidden_scale` are those of
  `LSTMParams`, with 3 H for 4 H.
  """

  input_kernel: jax.Array
  hidden_kernel: jax.Array
  bias: jax.Array
  input_scale: jax.Array
  hidden_scale: jax.Array


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
  """Running statistics of a GRU: `input` and `hidden` of `LSTMStats`, with 3 H for 4 H."""

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

  c: jax.Array
  h: jax.Array
  t: jax.Array
  seq_lengths: jax.Array | None = None


class GRUCarry(NamedTuple):
  """What a GRU hands to its next step: `h`, `t` and `seq_lengths` of `LSTMCarry`."""

  h: jax.Array
  t: jax.Array
  seq_lengths: jax.Array | None = None


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


def forget_gates_at_one(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """The initial bias of an LSTM: 1 for forget gates, as in the code of Cooijmans et al., else 0."""
  del key  # what every initializer is given
  i, f, g, o = jnp.split(jnp.zeros(shape, dtype), 4, -1)
  return jnp.concatenate([i, f + 1, g, o], -1)


def lstm_stats(
  features: int, max_length: int, *, momentum: float | None = 0.99, debias: bool = False
) -> LSTMStats:
  """The LSTMStats before the first batch: mean 0, variance 1.

  Args:
    features: H, the number of units.
    max_length: how many steps have statistics of their own; those of the last serve all later ones.
    momentum, debias: as they will be given to `lstm_step`.

  >>> from jaxbn.variants import recurrent
  >>> recurrent.lstm_stats(8, max_length=5).hidden.mean.shape
  (5, 32)
  """
  return LSTM.start_stats(features, max_length, momentum=momentum, debias=debias)


def gru_stats(
  features: int, max_length: int, *, momentum: float | None = 0.99, debias: bool = False
) -> GRUStats:
  """The GRUStats before the first batch: mean 0, variance 1.

  Args:
    features, max_length, momentum, debias: as of `lstm_stats`.

  >>> from jaxbn.variants import recurrent
  >>> recurrent.gru_stats(8, max_length=5).hidden.mean.shape
  (5, 24)
  """
  return GRU.start_stats(features, max_length, momentum=momentum, debias=debias)


def lstm_carry(
  batch_shape: int | Sequence[int],
  features: int,
  seq_lengths: Array | None = None,
  dtype: Any = jnp.float32,
) -> LSTMCarry:
  """The LSTMCarry before the first step: zeros.

  Args:
    batch_shape: the shape of the batch; an integer n means (n,).
    features: H, the number of units.
    seq_lengths: integers of the batch's shape: how many steps of each example exist. The others are
      padding, at the end.
    dtype: of c and h.

  >>> from jaxbn.variants import recurrent
  >>> recurrent.lstm_carry(2, 3).h.shape
  (2, 3)
  """
  return LSTM.start_carry(batch_shape, features, seq_lengths, dtype)


def gru_carry(
  batch_shape: int | Sequence[int],
  features: int,
  seq_lengths: Array | None = None,
  dtype: Any = jnp.float32,
) -> GRUCarry:
  """The GRUCarry before the first step: zeros.

  Args:
    batch_shape, features, seq_lengths, dtype: as of `lstm_carry`.

  >>> from jaxbn.variants import recurrent
  >>> recurrent.gru_carry(2, 3).h.shape
  (2, 3)
  """
  return GRU.start_carry(batch_shape, features, seq_lengths, dtype)


@by_our_names
def lstm_step(
  params: LSTMParams,
  stats: LSTMStats,
  carry: LSTMCarry,
  x: Array,
  *,
  use_running_average: bool,
  mask: Array | None = None,
  momentum: Numeric | None = 0.99,
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


@by_our_names
def gru_step(
  params: GRUParams,
  stats: GRUStats,
  carry: GRUCarry,
  x: Array,
  *,
  use_running_average: bool,
  mask: Array | None = None,
  momentum: Numeric | None = 0.99,
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
    (carry, y, stats), and raises errors, as `lstm_step`.

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
