"""Recurrent cells for Flax Linen: they hold parameters and state, and call the functions."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from jaxbn._types import RunningStats
from jaxbn.variants import recurrent


class _Cell(nn.RNNCellBase):
  """What LSTMCell and GRUCell do alike; the class variables say which functions."""

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

  _stats_type: ClassVar[Any]
  _step: ClassVar[Any]
  _start: ClassVar[Any]
  _carry: ClassVar[Any]

  def setup(self) -> None:
    """Makes the statistics: what the scan of `nn.RNN` carries must be there before it."""

    def start(name: str) -> dict[str, jax.Array]:
      options = {"momentum": self.momentum, "debias": self.debias}
      return _leaves(getattr(type(self)._start(self.features, self.max_length, **options), name))

    for name in type(self)._stats_type._fields:
      mutable = self.is_mutable_collection("batch_stats")
      if not mutable and not self.has_variable("batch_stats", name):
        raise ValueError(
          "this cell finds no running statistics in the collection batch_stats: pass those that "
          "init made, and tell nn.RNN to hand them on, with variable_carry='batch_stats'."
        )
    self._stats = {
      name: self.variable("batch_stats", name, start, name)
      for name in type(self)._stats_type._fields
    }

  @nn.compact
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
    params = self._params(inputs.shape[-1])
    stats = {name: RunningStats(**variable.value) for name, variable in self._stats.items()}
    # Initialization never changes the statistics, and needs no bound axis.
    initializing = self.is_initializing()
    carry, y, new = type(self)._step(
      params,
      type(self)._stats_type(**stats),
      carry,
      inputs,
      use_running_average=initializing or self.use_running_average,
      momentum=self.momentum,
      epsilon=self.epsilon,
      axis_name=None if initializing else self.axis_name,
      axis_index_groups=None if initializing else self.axis_index_groups,
      debias=self.debias,
      unbiased=self.unbiased,
      skip_nonfinite=self.skip_nonfinite,
    )
    if not (initializing or self.use_running_average):
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
    carry = type(self)._carry(input_shape[:-1], self.features, seq_lengths, self.param_dtype)
    names = [name for name in ("c", "h") if hasattr(carry, name)]
    keys = jax.random.split(rng, len(names))
    states = {
      name: self.carry_init(key, carry.h.shape, self.param_dtype)
      for name, key in zip(names, keys, strict=True)
    }
    return carry._replace(**states)

  @property
  def num_feature_axes(self) -> int:
    """How many axes of the input are features."""
    if self.scope is not None:
      _ = self._stats  # `nn.RNN` asks before its scan: see `setup`
    return 1

  @nn.nowrap
  def _params(self, in_features: int) -> Any:
    raise NotImplementedError

  @nn.nowrap
  def _gate_params(self, in_features: int, channels: int) -> dict[str, jax.Array]:
    initial = {
      "input_kernel": (self.kernel_init, (in_features, channels)),
      "hidden_kernel": (self.recurrent_kernel_init, (self.features, channels)),
      "bias": (self.bias_init, (channels,)),
      "input_scale": (self.scale_init, (channels,)),
      "hidden_scale": (self.scale_init, (channels,)),
    }
    return {name: self.param(name, *start, self.param_dtype) for name, start in initial.items()}


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
    momentum: share of the old running values that is kept; None for a cumulative average.
    epsilon: added to the variances.
    scale_init: initializer of all scales; 0.1 keeps the gates away from saturation.
    kernel_init: initializer of input_kernel.
    recurrent_kernel_init: initializer of hidden_kernel.
    bias_init: initializer of bias; default, 1 for forget gates and 0 for the others.
    param_dtype: of the parameters, and of the carry.
    axis_name: the axis of pmap, shard_map or vmap whose members share statistics. Under jit with
      sharded arrays none is needed.
    axis_index_groups: indices along it in groups, each sharing among itself only.
    debias: running statistics without the weight of their initial values. Adds leaves `count`.
    unbiased: track the variance times n / (n - 1), as PyTorch does.
    skip_nonfinite: statistics that are not finite leave the running ones as they were.
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

  _stats_type = recurrent.LSTMStats
  _step = staticmethod(recurrent.lstm_step)
  _start = staticmethod(recurrent.lstm_stats)
  _carry = staticmethod(recurrent.lstm_carry)

  @nn.nowrap
  def _params(self, in_features: int) -> recurrent.LSTMParams:
    shape = (self.features,)
    return recurrent.LSTMParams(
      **self._gate_params(in_features, 4 * self.features),
      cell_scale=self.param("cell_scale", self.scale_init, shape, self.param_dtype),
      cell_bias=self.param("cell_bias", nn.initializers.zeros, shape, self.param_dtype),
    )


class GRUCell(_Cell):
  r"""A GRU cell with recurrent batch normalization, after the manner of `LSTMCell`.

      (a_r, a_z, a_n) = BN(W_h h; hidden_scale),   (b_r, b_z, b_n) = BN(W_x x; input_scale) + bias
      r = sigmoid(a_r + b_r),   z = sigmoid(a_z + b_z),   n = tanh(r a_n + b_n)
      h = (1 - z) n + z h

  with statistics of the time step; `jaxbn.variants.recurrent.gru_step` says more. For `nn.RNN`,
  which is told of the statistics, as the carry of padding, as in `LSTMCell`.

  Attributes:
    features: number of units.
    max_length: how many steps have statistics of their own, usually the length of the longest
      training sequence; those of the last serve all later ones.
    use_running_average: True in evaluation, False in training.
    momentum: share of the old running values that is kept; None for a cumulative average.
    epsilon: added to the variances.
    scale_init: initializer of all scales; 0.1 keeps the gates away from saturation.
    kernel_init: initializer of input_kernel.
    recurrent_kernel_init: initializer of hidden_kernel.
    bias_init: initializer of bias.
    param_dtype: of the parameters, and of the carry.
    axis_name: the axis of pmap, shard_map or vmap whose members share statistics. Under jit with
      sharded arrays none is needed.
    axis_index_groups: indices along it in groups, each sharing among itself only.
    debias: running statistics without the weight of their initial values. Adds leaves `count`.
    unbiased: track the variance times n / (n - 1), as PyTorch does.
    skip_nonfinite: statistics that are not finite leave the running ones as they were.
    carry_init: initializer of h.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
  >>> cell = jaxbn.linen.GRUCell(4, max_length=5, use_running_average=False)
  >>> rnn = nn.RNN(cell, variable_carry="batch_stats")
  >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))  # batch, time, features
  >>> variables = rnn.init(jax.random.key(1), x)
  >>> y, updates = rnn.apply(variables, x, mutable=["batch_stats"])
  >>> y.shape, updates["batch_stats"]["cell"]["hidden"]["mean"].shape
  ((8, 5, 4), (5, 12))
  """

  _stats_type = recurrent.GRUStats
  _step = staticmethod(recurrent.gru_step)
  _start = staticmethod(recurrent.gru_stats)
  _carry = staticmethod(recurrent.gru_carry)

  @nn.nowrap
  def _params(self, in_features: int) -> recurrent.GRUParams:
    return recurrent.GRUParams(**self._gate_params(in_features, 3 * self.features))


def _leaves(stats: RunningStats) -> dict[str, jax.Array]:
  return {name: leaf for name, leaf in stats._asdict().items() if leaf is not None}
