"""Recurrent cells for Flax NNX: they hold parameters and state, and call the functions."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jaxbn import RunningStats
from jaxbn.nnx._common import Trackable, tuples, write
from jaxbn.variants import recurrent
from jaxbn.variants._cells import Cell, options, step

_SCALE_INIT = nnx.initializers.constant(0.1)
_KERNEL_INIT = nnx.initializers.lecun_normal()
_RECURRENT_KERNEL_INIT = nnx.initializers.orthogonal()


class _Rows(nnx.Module):
  """The running statistics of one product, a row for each time step."""

  def __init__(self, stats: RunningStats):
    self.mean = nnx.BatchStat(stats.mean)
    self.var = nnx.BatchStat(stats.var)
    if stats.count is not None:
      self.count = nnx.BatchStat(stats.count)

  def read(self) -> RunningStats:
    count = getattr(self, "count", None)
    return RunningStats(self.mean[...], self.var[...], None if count is None else count[...])

  def follow(self, stats: RunningStats) -> None:
    for name, value in stats._asdict().items():
      if value is not None:
        write(self, getattr(self, name), value)


class _Cell(Trackable, nnx.RNNCellBase):
  """Any cell of `jaxbn.variants.recurrent`."""

  _cell: ClassVar[Cell]
  _bias_init: ClassVar[Any]

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    max_length: int,
    *,
    use_running_average: bool | None = False,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    scale_init: Initializer = _SCALE_INIT,
    kernel_init: Initializer = _KERNEL_INIT,
    recurrent_kernel_init: Initializer = _RECURRENT_KERNEL_INIT,
    bias_init: Initializer | None = None,
    param_dtype: Dtype = jnp.float32,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    debias: bool = False,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
    rngs: nnx.Rngs,
  ):
    self.in_features = in_features
    self.hidden_features = hidden_features
    self.max_length = max_length
    self.param_dtype = param_dtype
    self.use_running_average = use_running_average
    self.momentum = momentum
    self.epsilon = epsilon
    self.axis_name = axis_name
    self.axis_index_groups = tuples(axis_index_groups)
    self.debias = debias
    self.unbiased = unbiased
    self.skip_nonfinite = skip_nonfinite

    stats = self._cell.start_stats(hidden_features, max_length, momentum=momentum, debias=debias)
    for name, rows in stats._asdict().items():
      setattr(self, name, _Rows(rows))
    initial: dict[str, Initializer] = {
      "input_kernel": kernel_init,
      "hidden_kernel": recurrent_kernel_init,
      "bias": bias_init or self._bias_init,
      "cell_bias": nnx.initializers.zeros,
    }
    for name, shape in self._cell.parameter_shapes(in_features, hidden_features).items():
      value = initial.get(name, scale_init)(rngs.params(), shape, param_dtype)
      setattr(self, name, nnx.Param(value))

  def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
    """One time step.

    Args:
      carry: from `initialize_carry` or the last step.
      inputs: the input of this step, (*batch, features).

    Returns:
      The new carry and the output.
    """
    if self.use_running_average is None:
      raise ValueError(
        "use_running_average was not given: pass it to the constructor, or choose with train() "
        "and eval()."
      )
    how = options(
      self.use_running_average,
      self.epsilon,
      self.axis_name,
      self.axis_index_groups,
      momentum=self.momentum,
      debias=self.debias,
      unbiased=self.unbiased,
      skip_nonfinite=self.skip_nonfinite,
    )
    cell = self._cell
    params = cell.params(*(getattr(self, name)[...] for name in cell.params._fields))
    rows = [getattr(self, name) for name in cell.stats._fields]
    stats = cell.stats(*(r.read() for r in rows))
    carry, y, new = step(cell, params, stats, carry, inputs, None, how)
    if not self.use_running_average:
      for r, value in zip(rows, new, strict=True):
        r.follow(value)
    return carry, y

  def initialize_carry(
    self,
    input_shape: tuple[int, ...],
    rngs: Any = None,
    carry_init: Initializer | None = None,
    *,
    seq_lengths: jax.Array | None = None,
  ) -> Any:
    """The carry before the first step.

    Args:
      input_shape: of the input of one step, (*batch, features).
      rngs: where carry_init takes its keys from.
      carry_init: initializer of the states; default, zeros.
      seq_lengths: how many steps each example has, so that padding enters no statistic.

    Returns:
      The carry.
    """
    cell, dtype = self._cell, self.param_dtype
    carry = cell.start_carry(input_shape[:-1], self.hidden_features, seq_lengths, dtype)
    if carry_init is None:
      return carry
    stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
    if stream is None:
      raise ValueError("carry_init needs keys: pass rngs, such as nnx.Rngs(carry=0).")
    return carry._replace(**{n: carry_init(stream(), carry.h.shape, dtype) for n in cell.states})

  @property
  def num_feature_axes(self) -> int:
    """How many axes of the input are features."""
    return 1


class LSTMCell(_Cell):
  r"""An LSTM cell with recurrent batch normalization (Cooijmans et al. 2016).

      (i, f, g, o) = BN(W_h h; hidden_scale) + BN(W_x x; input_scale) + bias
      c = sigmoid(f) c + sigmoid(i) tanh(g)
      h = sigmoid(o) tanh(BN(c; cell_scale, cell_bias))

  with statistics of the time step: the batch's after `train()` and the running ones after `eval()`;
  `jaxbn.variants.recurrent.lstm_step` says more. For `nnx.RNN`, which carries the statistics from
  step to step as it carries everything, if its state_axes do not say otherwise. Padding enters no
  statistic if the carry knows of it:

      carry = cell.initialize_carry((batch, features), seq_lengths=seq_lengths)
      nnx.RNN(cell)(x, initial_carry=carry, seq_lengths=seq_lengths)

  An example keeps its carry and output from its last step on, and its padding may be NaN.

  Args:
    in_features: number of input features.
    hidden_features: number of units.
    max_length: how many steps have statistics of their own, usually the length of the longest
      training sequence; those of the last serve all later ones.
    use_running_average: True in evaluation, False in training.
    momentum, epsilon, axis_name, axis_index_groups, debias, unbiased, skip_nonfinite: as in
      `BatchNorm`.
    scale_init: initializer of all scales; 0.1 keeps the gates away from saturation.
    kernel_init: initializer of input_kernel.
    recurrent_kernel_init: initializer of hidden_kernel.
    bias_init: initializer of bias; default, 1 for forget gates and 0 for the others.
    param_dtype: of the parameters, and of the carry.
    rngs: rng key.

  >>> import jax, jaxbn.nnx
  >>> from flax import nnx
  >>> rnn = nnx.RNN(jaxbn.nnx.LSTMCell(3, 4, max_length=5, rngs=nnx.Rngs(0)))
  >>> y = rnn(jax.random.normal(jax.random.key(0), (8, 5, 3)))  # batch, time, features
  >>> y.shape, rnn.cell.hidden.mean.shape
  ((8, 5, 4), (5, 16))
  >>> rnn.eval()
  """

  _cell = recurrent.LSTM
  _bias_init = staticmethod(recurrent.forget_gates_at_one)


class GRUCell(_Cell):
  r"""A GRU cell with recurrent batch normalization, after the manner of `LSTMCell`.

      (a_r, a_z, a_n) = BN(W_h h; hidden_scale),   (b_r, b_z, b_n) = BN(W_x x; input_scale) + bias
      r = sigmoid(a_r + b_r),   z = sigmoid(a_z + b_z),   n = tanh(r a_n + b_n)
      h = (1 - z) n + z h

  with statistics of the time step; `jaxbn.variants.recurrent.gru_step` says more. For `nnx.RNN`.
  Padding is told to the carry, as in `LSTMCell`.

  Args:
    in_features, hidden_features, max_length, use_running_average, momentum, epsilon, scale_init,
      kernel_init, recurrent_kernel_init, bias_init, param_dtype, axis_name, axis_index_groups,
      debias, unbiased, skip_nonfinite, rngs: as in `LSTMCell`, but the bias starts at 0.

  >>> import jax, jaxbn.nnx
  >>> from flax import nnx
  >>> rnn = nnx.RNN(jaxbn.nnx.GRUCell(3, 4, max_length=5, rngs=nnx.Rngs(0)))
  >>> rnn(jax.random.normal(jax.random.key(0), (8, 5, 3))).shape
  (8, 5, 4)
  """

  _cell = recurrent.GRU
  _bias_init = staticmethod(nnx.initializers.zeros)
