"""A recurrent layer for Flax NNX whose input only is normalized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jaxbn import RunningStats, init
from jaxbn.nnx._common import Trackable, of_shape, tuples
from jaxbn.variants import input_norm

_KERNEL_INIT = nnx.initializers.lecun_normal()
_RECURRENT_KERNEL_INIT = nnx.initializers.orthogonal()


class InputNormRNN(Trackable):
  r"""A recurrent layer whose input-to-hidden product is batch normalized, of whole sequences.

      simple   h_t = activation(BN(W_x x_t; input_scale) + W_h h_{t-1} + bias)

  (Amodei et al. 2015, "Deep Speech 2", section 3.2), or the gates of an LSTM (Laurent et al. 2015)
  or a GRU likewise; `jaxbn.variants.input_norm.input_norm_rnn` says more. The running statistics
  are the BatchStats `mean` and `var`.

  Args:
    in_features: number of input features.
    hidden_features: number of units.
    kind: "simple", "lstm" or "gru".
    activation: of the simple kind.
    max_length: None: statistics over all frames of all sequences (sequence-wise). A number: of each
      time step (frame-wise), up to it; those of the last serve all later ones.
    reverse: from the last step to the first; the output stays in the input's order.
    scale_init: initializer of input_scale.
    kernel_init: initializer of input_kernel.
    recurrent_kernel_init: initializer of hidden_kernel.
    bias_init: initializer of bias.
    param_dtype: of the parameters.
    use_running_average, momentum, epsilon, axis_name, axis_index_groups, debias, unbiased,
      skip_nonfinite: as in `BatchNorm`.
    rngs: rng key.

  >>> import jax, jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.InputNormRNN(3, 4, kind="simple", rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((8, 5, 3)), seq_lengths=jnp.array([5, 5, 3, 2, 5, 1, 4, 4])).shape
  (8, 5, 4)
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    kind: str = "lstm",
    use_running_average: bool | None = False,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
    max_length: int | None = None,
    reverse: bool = False,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    scale_init: Initializer = nnx.initializers.ones,
    kernel_init: Initializer = _KERNEL_INIT,
    recurrent_kernel_init: Initializer = _RECURRENT_KERNEL_INIT,
    bias_init: Initializer = nnx.initializers.zeros,
    param_dtype: Dtype = jnp.float32,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    debias: bool = False,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
    rngs: nnx.Rngs,
  ):
    self.kind = kind
    self.use_running_average = use_running_average
    self.activation = activation
    self.max_length = max_length
    self.reverse = reverse
    self.momentum = momentum
    self.epsilon = epsilon
    self.axis_name = axis_name
    self.axis_index_groups = tuples(axis_index_groups)
    self.debias = debias
    self.unbiased = unbiased
    self.skip_nonfinite = skip_nonfinite

    channels = input_norm.channels(kind, hidden_features)
    shape = (channels,) if max_length is None else (max_length, channels)
    start = init(shape, momentum=momentum, debias=debias)
    self.mean = nnx.BatchStat(start.mean)
    self.var = nnx.BatchStat(start.var)
    if start.count is not None:
      self.count = nnx.BatchStat(start.count)
    initial: dict[str, tuple[Initializer, tuple[int, ...]]] = {
      "input_kernel": (kernel_init, (in_features, channels)),
      "hidden_kernel": (recurrent_kernel_init, (hidden_features, channels)),
      "bias": (bias_init, (channels,)),
      "input_scale": (scale_init, (channels,)),
    }
    for name, (initializer, size) in initial.items():
      setattr(self, name, nnx.Param(initializer(rngs.params(), size, param_dtype)))

  def __call__(
    self,
    x: jax.Array,
    *,
    seq_lengths: jax.Array | None = None,
    use_running_average: bool | None = None,
  ) -> jax.Array:
    """The outputs of all steps.

    Args:
      x: (batch, time, in_features).
      seq_lengths: integers, (batch,): how many steps of each sequence exist.
      use_running_average: True in evaluation, False in training; before the constructor's.

    Returns:
      y, (batch, time, hidden_features).
    """
    use_running_average = self._evaluating(use_running_average)
    names = input_norm.InputNormParams._fields
    params = input_norm.InputNormParams(**{name: getattr(self, name)[...] for name in names})
    rows = () if self.max_length is None else (self.max_length,)
    stats = {
      name: of_shape(getattr(self, name), (*rows, *params.bias.shape))
      for name in RunningStats._fields
      if hasattr(self, name)
    }
    y, state = input_norm.input_norm_rnn(
      params,
      RunningStats(**stats),
      x,
      use_running_average=use_running_average,
      kind=self.kind,
      activation=self.activation,
      frame_wise=self.max_length is not None,
      seq_lengths=seq_lengths,
      reverse=self.reverse,
      momentum=self.momentum,
      epsilon=self.epsilon,
      axis_name=self.axis_name,
      axis_index_groups=self.axis_index_groups,
      debias=self.debias,
      unbiased=self.unbiased,
      skip_nonfinite=self.skip_nonfinite,
    )
    if state is not None and not use_running_average:
      self._store(state)
    return y
