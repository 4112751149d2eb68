"""A recurrent layer for Flax Linen whose input only is normalized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from jaxbn import RunningStats, init
from jaxbn._names import ByOurNames
from jaxbn.linen._common import as_function, has_count, mended
from jaxbn.variants import input_norm


class InputNormRNN(ByOurNames, nn.Module):
  r"""A recurrent layer whose input-to-hidden product is batch normalized, of whole sequences.

      simple   h_t = activation(BN(W_x x_t; input_scale) + W_h h_{t-1} + bias)

  (Amodei et al. 2015, "Deep Speech 2", section 3.2), or the gates of an LSTM (Laurent et al. 2015)
  or a GRU likewise; `jaxbn.variants.input_norm.input_norm_rnn` says more. The running statistics,
  in the collection `batch_stats`, are `mean` and `var`.

  Attributes:
    features: number of units.
    kind: "simple", "lstm" or "gru".
    activation: of the simple kind, a function or a module.
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

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.InputNormRNN(4, kind="simple", activation=jax.nn.relu)
  >>> x, lengths = jnp.ones((8, 5, 3)), jnp.array([5, 5, 3, 2, 5, 1, 4, 4])
  >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
  >>> y, updates = layer.apply(
  ...   variables, x, seq_lengths=lengths, use_running_average=False, mutable=["batch_stats"]
  ... )
  >>> y.shape
  (8, 5, 4)
  """

  features: int
  kind: str = "lstm"
  use_running_average: bool | None = None
  activation: Callable[..., Any] = jnp.tanh
  max_length: int | None = None
  reverse: bool = False
  momentum: float | None = 0.99
  epsilon: float = 1e-5
  scale_init: Initializer = nn.initializers.ones
  kernel_init: Initializer = nn.initializers.lecun_normal()
  recurrent_kernel_init: Initializer = nn.initializers.orthogonal()
  bias_init: Initializer = nn.initializers.zeros
  param_dtype: Dtype = jnp.float32
  axis_name: Any = None
  axis_index_groups: Any = None
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False

  @nn.compact
  @mended
  def __call__(
    self,
    x: jax.Array,
    *,
    seq_lengths: jax.Array | None = None,
    use_running_average: bool | None = None,
  ) -> jax.Array:
    """The outputs of all steps.

    Args:
      x: (batch, time, features).
      seq_lengths: integers, (batch,): how many steps of each sequence exist.
      use_running_average: True in evaluation, False in training, if not said in the constructor.

    Returns:
      y, (batch, time, features of this layer).
    """
    use_running_average = nn.merge_param(
      "use_running_average", self.use_running_average, use_running_average
    )
    options: dict[str, Any] = {"momentum": self.momentum, "debias": self.debias}
    channels = input_norm.channels(self.kind, self.features)
    shape = (channels,) if self.max_length is None else (self.max_length, channels)
    initializing = self.is_initializing()
    evaluating = initializing or use_running_average
    start = init(shape, **options)
    if not has_count(self, **options, evaluating=evaluating):
      start = start._replace(count=None)
    variables = {
      name: self.variable("batch_stats", name, lambda leaf=leaf: leaf)
      for name, leaf in start._asdict().items()
      if leaf is not None
    }
    initial = {
      "input_kernel": (self.kernel_init, (x.shape[-1], channels)),
      "hidden_kernel": (self.recurrent_kernel_init, (self.features, channels)),
      "bias": (self.bias_init, (channels,)),
      "input_scale": (self.scale_init, (channels,)),
    }
    params = {name: self.param(name, *how, self.param_dtype) for name, how in initial.items()}
    if initializing and self.kind == "simple":
      self.activation(jnp.zeros((self.features,), self.param_dtype))  # where it makes parameters
    y, state = input_norm.input_norm_rnn(
      input_norm.InputNormParams(**params),
      RunningStats(**{name: variable.value for name, variable in variables.items()}),
      x,
      use_running_average=evaluating,
      kind=self.kind,
      activation=as_function(self.activation),
      frame_wise=self.max_length is not None,
      seq_lengths=seq_lengths,
      reverse=self.reverse,
      epsilon=self.epsilon,
      axis_name=None if initializing else self.axis_name,
      axis_index_groups=None if initializing else self.axis_index_groups,
      unbiased=self.unbiased,
      skip_nonfinite=self.skip_nonfinite,
      **options,
    )
    if state is not None and not evaluating:
      for name, variable in variables.items():
        variable.value = getattr(state, name)
    return y
