"""Weight normalization for NNX: parameters and state for `jaxbn.alternatives.weight_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jaxbn import RunningStats, _checks, init
from jaxbn._names import by_our_names
from jaxbn.alternatives import weight_norm
from jaxbn.nnx._common import Trackable, of_shape, parameter, tuples, write


class WeightNorm(nnx.Module):
  r"""Weight normalization (Salimans & Kingma 2016) of a layer with a kernel.

      y = layer(x) with the kernel scale * kernel / ||kernel||

  The scale starts such that the layer is what it was. Unlike in `flax.nnx.WeightNorm` it is a
  parameter, which optimizers see, and a call leaves the kernel as it is.

  The paper's initialization by data (section 3) is a call in another mode, once, through the model:

      model.set_attributes(initializing=True)
      model(x)  # scale and bias of each WeightNorm, such that its y has mean 0 and variance 1
      model.set_attributes(initializing=False)

  Args:
    layer: an `nnx.Linear`, an `nnx.Conv`, or another with a `kernel` and perhaps a `bias`, whose
      output features are the last axis of both kernel and output.
    epsilon: as in `jaxbn.alternatives.weight_norm.weight_norm`.
    initializing: whether calls choose scale and bias by the x that they are given.

  >>> import jax, jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.WeightNorm(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), initializing=True)
  >>> y = layer(3 + 2 * jax.random.normal(jax.random.key(0), (64, 5)))
  >>> jnp.allclose(y.mean(0), 0, atol=1e-4) and jnp.allclose(y.std(0), 1, atol=1e-4)
  Array(True, dtype=bool)
  >>> layer.set_attributes(initializing=False)
  """

  def __init__(self, layer: nnx.Module, *, epsilon: float = 1e-12, initializing: bool = False):
    kernel = getattr(layer, "kernel", None)
    if not isinstance(kernel, nnx.Variable):
      raise ValueError(
        f"layer={type(layer).__name__} has no kernel; weight normalization is for one that has, "
        "such as nnx.Linear."
      )
    self.layer = layer
    self.scale = nnx.Param(weight_norm.lengths(kernel[...]))
    self.epsilon = epsilon
    self.initializing = initializing

  def __call__(self, x: jax.Array) -> jax.Array:
    """The layer, with the normalized kernel.

    Args:
      x: what the layer takes.

    Returns:
      What the layer gives.
    """
    if self.initializing:
      self._initialize(x)
    bias = self._bias()
    return self._apply(x, self.scale[...], None if bias is None else bias[...])

  def _initialize(self, x: jax.Array) -> None:
    bias = self._bias()
    zeros = None if bias is None else jnp.zeros_like(bias[...])
    t = self._apply(x, jnp.ones_like(self.scale[...]), zeros)
    scale, first_bias = weight_norm.data_dependent_init(t)
    self.scale.set_value(scale.astype(self.scale.dtype))
    if bias is not None:
      bias.set_value(first_bias.astype(bias.dtype))

  def _bias(self) -> nnx.Variable | None:
    bias = getattr(self.layer, "bias", None)
    return bias if isinstance(bias, nnx.Variable) else None

  def _apply(self, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    plain: Any = nnx.clone(self.layer)  # what is set below is not to stay
    kernel = weight_norm.weight_norm(plain.kernel[...], scale, epsilon=self.epsilon)
    # New variables: of those that are mutable in JAX some may not be set in a transformation.
    plain.kernel = nnx.Param(kernel)
    if bias is not None:
      plain.bias = nnx.Param(bias)
    return plain(x)


class MeanOnlyBatchNorm(Trackable):
  r"""Mean-only batch normalization (Salimans & Kingma 2016, section 4), after a `WeightNorm`.

      y = x - mean + bias

  with the batch's mean after `train()` and the running one after `eval()`. The layer before it
  needs no bias of its own.

  Args:
    num_features: number of channels.
    use_running_average, axis, momentum, dtype, param_dtype, use_bias, bias_init, axis_name,
      axis_index_groups, debias, masked_value, rngs: as in `BatchNorm`.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> layer = jaxbn.nnx.MeanOnlyBatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
  >>> layer(jnp.array([[1.0], [5.0]]))[:, 0].tolist(), layer.mean[...].tolist()
  ([-2.0, 2.0], [1.5])
  """

  def __init__(
    self,
    num_features: int,
    *,
    use_running_average: bool | None = False,
    axis: int = -1,
    momentum: float | None = 0.99,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_bias: bool = True,
    bias_init: Initializer = nnx.initializers.zeros,
    axis_name: Any = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    debias: bool = False,
    masked_value: float | None = None,
    rngs: nnx.Rngs,
  ):
    start = init(num_features, momentum=momentum, debias=debias)
    self.mean = nnx.BatchStat(start.mean)
    self.count = nnx.data(None) if start.count is None else nnx.BatchStat(start.count)
    self.bias = parameter(use_bias, bias_init, (num_features,), param_dtype, rngs)
    self.use_running_average = use_running_average
    self.axis = axis
    self.momentum = momentum
    self.dtype = dtype
    self.axis_name = axis_name
    self.axis_index_groups = tuples(axis_index_groups)
    self.debias = debias
    self.masked_value = masked_value

  @by_our_names
  def __call__(
    self,
    x: Any,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Centres x.

    Args:
      x: real or complex array of any rank.
      use_running_average: True in evaluation, False in training; before the constructor's.
      mask: boolean, broadcasts against x: which elements exist.

    Returns:
      y, of x's shape.
    """
    use_running_average = self._evaluating(use_running_average)
    x = _checks.inexact(x)
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)
    mean = of_shape(self.mean, shape)
    count, bias = (None if v is None else of_shape(v, shape) for v in (self.count, self.bias))
    y, new_state = weight_norm.mean_only_batch_norm(
      x,
      bias,
      RunningStats(mean, jnp.ones_like(mean.real), count),
      use_running_average=use_running_average,
      axis=self.axis,
      momentum=self.momentum,
      debias=self.debias,
      mask=mask,
      masked_value=None if mask is None else self.masked_value,
      axis_name=self.axis_name,
      axis_index_groups=self.axis_index_groups,
      dtype=self.dtype,
    )
    if not use_running_average and new_state is not None:
      write(self, self.mean, new_state.mean)
      if self.count is not None and new_state.count is not None:
        write(self, self.count, new_state.count)
    return y
