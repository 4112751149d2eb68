"""Weight normalization for Linen: parameters and state for `jaxbn.alternatives.weight_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.typing import Dtype, Initializer

from jaxbn import RunningStats, _checks, init
from jaxbn._names import ByOurNames
from jaxbn.alternatives import weight_norm
from jaxbn.linen._common import has_count, mended


class WeightNorm(nn.Module):
  r"""Weight normalization (Salimans & Kingma 2016) of a layer with a kernel.

      y = layer(x) with the kernel scale * kernel / ||kernel||

  What `flax.linen.WeightNorm` lacks: `init` looks at the x that it is given, and chooses scale and
  bias such that each feature of y has mean 0 and variance 1 over it (the paper's section 3), layer
  by layer through a model. Give it a batch of data, then, not zeros.

  Attributes:
    layer: an `nn.Dense`, an `nn.Conv`, or another with a parameter `kernel` and perhaps a `bias`,
      whose output features are the last axis of both kernel and output.
    data_dependent_init: False starts with the scale that gives the layer's own initial kernel.
    epsilon: as in `jaxbn.alternatives.weight_norm.weight_norm`.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
  >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (64, 5))
  >>> layer = jaxbn.linen.WeightNorm(nn.Dense(3))
  >>> variables = layer.init(jax.random.key(1), x)
  >>> jax.tree.map(jnp.shape, variables)
  {'params': {'bias': (3,), 'kernel': (5, 3), 'scale': (3,)}}
  >>> y = layer.apply(variables, x)
  >>> jnp.allclose(y.mean(0), 0, atol=1e-4) and jnp.allclose(y.std(0), 1, atol=1e-4)
  Array(True, dtype=bool)
  """

  layer: nn.Module
  data_dependent_init: bool = True
  epsilon: float = 1e-12

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """The layer, with the normalized kernel.

    Args:
      x: what the layer takes; at initialization a batch of data.

    Returns:
      What the layer gives.
    """
    plain = self.layer.clone(parent=None, name=None)
    if self.is_initializing():
      first = self._first(plain, x)
      params = {name: self.param(name, lambda _, v=v: v) for name, v in first.items()}
    else:
      params = dict(meta.unbox(self.variables["params"]))
    kernel = weight_norm.weight_norm(params["kernel"], params.pop("scale"), epsilon=self.epsilon)
    y: Any = plain.apply({"params": params | {"kernel": kernel}}, x)
    return y

  @nn.nowrap
  def _first(self, plain: nn.Module, x: jax.Array) -> dict[str, jax.Array]:
    """The first parameters."""
    params = dict(plain.init(self.make_rng("params"), x).get("params", {}))
    if not {"kernel"} <= set(params) <= {"kernel", "bias"}:
      raise ValueError(
        f"layer={type(plain).__name__} has the parameters {sorted(params)}; weight normalization "
        "is for one with a kernel and perhaps a bias, such as nn.Dense."
      )
    # Boxes, with names of axes of a mesh, stay around what the layer has itself.
    kernel, bias = meta.unbox((params["kernel"], params.get("bias")))
    if not self.data_dependent_init:
      return params | {"scale": weight_norm.lengths(kernel)}
    ones = jnp.ones(kernel.shape[-1:], kernel.dtype)
    unit = {"kernel": weight_norm.weight_norm(kernel, ones, epsilon=self.epsilon)}
    t: Any = plain.apply(
      {"params": unit if bias is None else unit | {"bias": jnp.zeros_like(bias)}}, x
    )
    scale, first_bias = weight_norm.data_dependent_init(t)
    params["scale"] = scale.astype(kernel.dtype)
    if bias is not None:
      params["bias"] = meta.replace_boxed(params["bias"], first_bias.astype(bias.dtype))
    return params


class MeanOnlyBatchNorm(ByOurNames, nn.Module):
  r"""Mean-only batch normalization (Salimans & Kingma 2016, section 4), after a `WeightNorm`.

      y = x - mean + bias

  with the batch's mean in training and the running one, `mean` in the collection `batch_stats`, in
  evaluation. The layer before it needs no bias of its own.

  Attributes:
    use_running_average, axis, momentum, dtype, param_dtype, use_bias, bias_init, axis_name,
      axis_index_groups, debias, masked_value: as in `BatchNorm`.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.MeanOnlyBatchNorm(use_running_average=False)
  >>> x = jnp.array([[1.0], [5.0]])
  >>> variables = layer.init(jax.random.key(0), x)
  >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
  >>> y[:, 0].tolist(), updates["batch_stats"]["mean"].round(2).tolist()
  ([-2.0, 2.0], [0.029999999329447746])
  """

  use_running_average: bool | None = None
  axis: int | Sequence[int] = -1
  momentum: float | None = 0.99
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  use_bias: bool = True
  bias_init: Initializer = nn.initializers.zeros
  axis_name: Any = None
  axis_index_groups: Any = None
  debias: bool = False
  masked_value: float | None = None

  @nn.compact
  @mended
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
      use_running_average: True in evaluation, False in training, if not said in the constructor.
      mask: boolean, broadcasts against x: which elements exist.

    Returns:
      y, of x's shape.
    """
    use_running_average = nn.merge_param(
      "use_running_average", self.use_running_average, use_running_average
    )
    x = _checks.inexact(x)
    shape = _checks.split_axes(x.ndim, self.axis).shape(x)
    bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
    initializing = self.is_initializing()
    evaluating = use_running_average or (initializing and not x.size)
    start = init(shape, momentum=self.momentum, debias=self.debias)
    counted = has_count(self, self.momentum, self.debias, evaluating)
    mean = self.variable("batch_stats", "mean", lambda: start.mean)
    count = None
    if counted:
      count = self.variable("batch_stats", "count", lambda: start.count)
    y, new_state = weight_norm.mean_only_batch_norm(
      x,
      bias,
      RunningStats(mean.value, start.var, None if count is None else count.value),
      use_running_average=evaluating,
      axis=self.axis,
      momentum=self.momentum,
      debias=self.debias,
      mask=mask,
      masked_value=None if mask is None else self.masked_value,
      axis_name=None if initializing else self.axis_name,
      axis_index_groups=None if initializing else self.axis_index_groups,
      dtype=self.dtype,
    )
    if not initializing and not use_running_average and new_state is not None:
      mean.value = new_state.mean
      if count is not None:
        count.value = new_state.count
    return y
