"""Prediction-time batch normalization for a whole network of Flax NNX, as it is."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxbn import _checks, _layers
from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._common import as_function
from jaxbn.variants.prediction_time import NOT_TRACKED, elements_per_example, interpolate


def prediction_time(model: Any, prior: float = 0.0) -> Any:
  """A network like this one, in which every `BatchNorm` normalizes by what is predicted.

  See `jaxbn.variants.prediction_time`. The new one predicts only: nothing is tracked, the other one
  stays as it is, and the rest of the new one is in its mode: take it after `model.eval()`. Layers
  with an axis_name share over it here as in training, and need it to be bound.

  Args:
    model: a module.
    prior: how many pseudo-examples the running statistics count for: 0 for none, inf for
      evaluation as usual.

  Returns:
    A module that is called in the same way.

  Raises:
    ValueError: a negative prior; a layer that is derived from `BatchNorm`, for it has other
      statistics.

  >>> import jax.numpy as jnp, jaxbn.nnx
  >>> from flax import nnx
  >>> model = nnx.Sequential(jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
  >>> predict = jaxbn.nnx.prediction_time(model)
  >>> print(predict(jnp.array([[9.0], [11.0]])).ravel().round(2))
  [-1.  1.]
  """
  interpolate(prior)

  def replaced(path: Any, node: Any) -> Any:
    if not isinstance(node, BatchNorm):
      return node
    if type(node) is not BatchNorm:
      raise ValueError(
        f"prediction_time knows the layers BatchNorm, not {type(node).__name__} at "
        f"{'.'.join(map(str, path)) or 'the top'}: use jaxbn.variants.prediction_time there."
      )
    return _Predicting(node, prior)

  return nnx.recursive_map(replaced, model)


class _Predicting(nnx.Module):
  """A `BatchNorm` that is never in training."""

  def __init__(self, layer: BatchNorm, prior: float):
    self.layer = layer
    self.prior = prior

  def __call__(self, x: Any, use_running_average: bool | None = None, **given: Any) -> jax.Array:
    del use_running_average  # in either mode
    layer = self.layer
    x, scale, bias, state, dtype = layer._promoted(
      _checks.inexact(x), layer.scale, layer.bias, False
    )
    y, _ = _layers.call(
      layer,
      x,
      scale,
      bias,
      state,
      use_running_average=False,
      **NOT_TRACKED,
      axis_name=layer.axis_name,
      axis_index_groups=layer.axis_index_groups,
      virtual_batch_size=layer.virtual_batch_size,
      dtype=dtype,
      activation=as_function(layer.activation, x),
      choose=interpolate(self.prior, elements_per_example(x, layer.axis)),
      **given,
    )
    return y
