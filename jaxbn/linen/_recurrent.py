"""Recurrent cells for Flax Linen: they hold parameters and state, and call the functions."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from jaxbn import RunningStats
from jaxbn._names import ByOurNames
from jaxbn.linen._common import mended
from jaxbn.variants import recurrent
from jaxbn.variants._cells import Cell, options, step


class _Cell(ByOurNames, nn.RNNCellBase):
  """Any cell of `jaxbn.variants.recurrent`."""

  features: int
  max_length: int
  use_running_average: bool | None = None
  momentum: float | None = 0.99
  epsilon: float = 1e-5
  scale_init: Initializer = nn.initializers.constant(0.1)
  kernel_init: Initializer = nn.initializers.lecun_normal()
  recurrent_kernel_init: Initializer = nn.initializers.orthogonal()
  bias_init: Initializer = nn.initializers.zeros
  param_dtype: Dtype = jnp.float32
  axis_name: Any = None
  axis_index_groups: Any = None
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False
  carry_init: Initializer = nn.initializers.zeros

  _cell: ClassVar[Cell]

  def setup(self) -> None:
    """Makes the statistics: what the scan of `nn.RNN` carries must be there before it."""
    start = self._cell.start_stats(
      self.features, self.max_length, momentum=self.momentum, debias=self.debias
    )
    mutable = self.is_mutable_collection("batch_stats")
    if not mutable and not self.has_variable("batch_stats", "hidden"):
      raise ValueError(
        "this cell finds no running statistics in the collection batch_stats: pass those that init "
        "made, and tell nn.RNN to hand them on, with variable_carry='batch_stats'."
      )
    self._stats = {
      name: self.variable("batch_stats", name, lambda rows=rows: _leaves(rows))
      for name, rows in start._asdict().items()
    }

  @nn.compact
  @mended
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
        "use_running_average was not given: make the cell with use_running_average=False in "
        "training and True in evaluation."
      )
    # Initialization never changes the statistics, and needs no bound axis.
    initializing = self.is_initializing()
    how = options(
      initializing or self.use_running_average,
      self.epsilon,
      None if initializing else self.axis_name,
      None if initializing else self.axis_index_groups,
      momentum=self.momentum,
      debias=self.debias,
      unbiased=self.unbiased,
      skip_nonfinite=self.skip_nonfinite,
    )
    params = self._params(inputs.shape[-1])
    stats = {name: RunningStats(**variable.value) for name, variable in self._stats.items()}
    carry, y, new = step(self._cell, params, self._cell.stats(**stats), carry, inputs, None, how)
    if not how.use_running_average:
      for name, rows in new._asdict().items():
        self._stats[name].value = _leaves(rows)
    return carry, y

  @nn.nowrap
  def initialize_carry(
    self, rng: jax.Array, input_shape: tuple[int, ...], seq_lengths: jax.Array | None = None
  ) -> Any:
    """The carry before the first step.

    Args:
      rng: key for carry_init.
      input_shape: of the input of one step, (*batch, features).
      seq_lengths: how many steps each example has, so that padding enters no statistic.

    Returns:
      The carry.
    """
    cell, dtype = self._cell, self.param_dtype
    carry = cell.start_carry(input_shape[:-1], self.features, seq_lengths, dtype)
    keys = zip(cell.states, jax.random.split(rng, len(cell.states)), strict=True)
    states = {name: self.carry_init(key, carry.h.shape, dtype) for name, key in keys}
    return carry._replace(**states)

  @property
  def num_feature_axes(self) -> int:
    """How many axes of the input are features."""
    if self.scope is not None:
      _ = self._stats  # `nn.RNN` asks before its scan: see `setup`
    return 1

  @nn.nowrap
  def _params(self, in_features: int) -> Any:
    initial = {
      "input_kernel": self.kernel_init,
      "hidden_kernel": self.recurrent_kernel_init,
      "bias": self.bias_init,
      "cell_bias": nn.initializers.zeros,
    }
    shapes = self._cell.parameter_shapes(in_features, self.features)
    params = (
      self.param(name, initial.get(name, self.scale_init), shape, self.param_dtype)
      for name, shape in shapes.items()
    )
    return self._cell.params(*params)


class LSTMCell(_Cell):
  r"""An LSTM cell with recurrent batch normalization (Cooijmans et al. 2016).

      (i, f, g, o) = BN(W_h h; hidden_scale) + BN(W_x x; input_scale) + bias
      c = sigmoid(f) c + sigmoid(i) tanh(g)
      h = sigmoid(o) tanh(BN(c; cell_scale, cell_bias))

  with statistics of the time step: the batch's in training and the running ones, in the collection
  `batch_stats`, in evaluation; `jaxbn.variants.recurrent.lstm_step` says more. For `nn.RNN`, which
  hands the statistics on from step to step, and takes them to be immutable or not:

      nn.RNN(cell, variable_carry="batch_stats")                       in training
      nn.RNN(cell, variable_broadcast=("params", "batch_stats"))       in evaluation

  Padding enters no statistic if the carry knows of it:

      carry = cell.initialize_carry(key, (batch, features), seq_lengths)
      rnn.apply(variables, x, initial_carry=carry, seq_lengths=seq_lengths, mutable=["batch_stats"])

  An example keeps its carry and output from its last step on, and its padding may be NaN.

  Attributes:
    features: number of units.
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
    carry_init: initializer of c and h.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
  >>> cell = jaxbn.linen.LSTMCell(4, max_length=5, use_running_average=False)
  >>> rnn = nn.RNN(cell, variable_carry="batch_stats")
  >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))  # batch, time, features
  >>> variables = rnn.init(jax.random.key(1), x)
  >>> y, updates = rnn.apply(variables, x, mutable=["batch_stats"])
  >>> y.shape, updates["batch_stats"]["cell"]["hidden"]["mean"].shape
  ((8, 5, 4), (5, 16))
  """

  bias_init: Initializer = recurrent.forget_gates_at_one

  _cell = recurrent.LSTM


class GRUCell(_Cell):
  r"""A GRU cell with recurrent batch normalization, after the manner of `LSTMCell`.

      (a_r, a_z, a_n) = BN(W_h h; hidden_scale),   (b_r, b_z, b_n) = BN(W_x x; input_scale) + bias
      r = sigmoid(a_r + b_r),   z = sigmoid(a_z + b_z),   n = tanh(r a_n + b_n)
      h = (1 - z) n + z h

  with statistics of the time step; `jaxbn.variants.recurrent.gru_step` says more. For `nn.RNN`,
  which is told of the statistics, as the carry of padding, as in `LSTMCell`.

  Attributes:
    features, max_length, use_running_average, momentum, epsilon, scale_init, kernel_init,
      recurrent_kernel_init, bias_init, param_dtype, axis_name, axis_index_groups, debias, unbiased,
      skip_nonfinite, carry_init: as in `LSTMCell`, but the bias starts at 0.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
  >>> cell = jaxbn.linen.GRUCell(4, max_length=5, use_running_average=False)
  >>> rnn = nn.RNN(cell, variable_carry="batch_stats")
  >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))  # batch, time, features
  >>> variables = rnn.init(jax.random.key(1), x)
  >>> y, updates = rnn.apply(variables, x, mutable=["batch_stats"])
  >>> y.shape, updates["batch_stats"]["cell"]["hidden"]["mean"].shape
  ((8, 5, 4), (5, 12))
  """

  _cell = recurrent.GRU


def _leaves(stats: RunningStats) -> dict[str, jax.Array]:
  return {name: leaf for name, leaf in stats._asdict().items() if leaf is not None}
