"""Prediction-time batch normalization for a whole network of Flax Linen, as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxbn import _checks, _layers
from jaxbn._running import RunningStats
from jaxbn.linen._batch_norm import BatchNorm, instead
from jaxbn.linen._common import pure
from jaxbn.variants.prediction_time import NOT_TRACKED, elements_per_example, interpolate


def prediction_time(function: Callable[..., Any], prior: float = 0.0) -> Callable[..., Any]:
  """The same function, in which every `BatchNorm` normalizes by what is predicted.

  See `jaxbn.variants.prediction_time`. Neither the network nor its variables change, nothing is
  written, and the rest of the network is in the mode that is asked for: ask for evaluation.
  Layers with an axis_name share over it here as in training, and need it to be bound.

  Args:
    function: that applies the network, such as `module.apply`.
    prior: how many pseudo-examples the running statistics count for: 0 for none, inf for
      evaluation as usual.

  Returns:
    A function of the same arguments.

  Raises:
    ValueError: a negative prior; at the call, a layer that is derived from `BatchNorm`, for it has
      other statistics.

  >>> import jax, jax.numpy as jnp, jaxbn.linen
  >>> layer = jaxbn.linen.BatchNorm(use_running_average=True)
  >>> x = jnp.array([[9.0], [11.0]])
  >>> variables = layer.init(jax.random.key(0), x)
  >>> predict = jax.jit(jaxbn.linen.prediction_time(layer.apply))
  >>> print(predict(variables, x).ravel().round(2))
  [-1.  1.]
  """
  interpolate(prior)  # refuses what is no prior now, not at the first layer
  predict = functools.partial(_predict, prior)

  @functools.wraps(function)
  def predicting(*args: Any, **kwargs: Any) -> Any:
    with instead(predict):
      return function(*args, **kwargs)

  return predicting


def _predict(
  prior: float, layer: BatchNorm, x: jax.Array, scale: Any, bias: Any, **given: Any
) -> jax.Array:
  if type(layer) is not BatchNorm:
    raise ValueError(
      f"prediction_time knows the layers BatchNorm, not {type(layer).__name__} at "
      f"{'/'.join(layer.path) or 'the top'}: use jaxbn.variants.prediction_time there."
    )
  state = layer._running_stats(_checks.split_axes(x.ndim, layer.axis).shape(x), True)
  y, _ = _layers.call(
    layer,
    x,
    scale,
    bias,
    RunningStats(state.mean.value, state.var.value),
    use_running_average=False,
    **NOT_TRACKED,
    axis_name=layer.axis_name,
    axis_index_groups=layer.axis_index_groups,
    virtual_batch_size=layer.virtual_batch_size,
    dtype=layer.dtype,
    activation=pure(layer),
    choose=interpolate(prior, elements_per_example(x, layer.axis)),
    **given,
  )
  return y
