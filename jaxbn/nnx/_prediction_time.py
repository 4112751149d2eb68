"""Prediction-time batch normalization for a whole network of Flax NNX, as it is."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxbn.nnx._batch_norm import BatchNorm
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
    if type(node) is not BatchNorm or node.choose is not None:
      raise ValueError(
        f"prediction_time knows the layers BatchNorm, not {type(node).__name__} at "
        f"{'.'.join(map(str, path)) or 'the top'}{' with choose' if node.choose else ''}: use "
        "jaxbn.variants.prediction_time there."
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
    layer: Any = nnx.clone(self.layer)  # what it tracks goes with it
    layer.activation = self.layer.activation  # which may count what it draws
    layer.choose = interpolate(self.prior, elements_per_example(x, layer.axis))
    for name, value in NOT_TRACKED.items():
      setattr(layer, name, value)
    return layer(x, use_running_average=False, **given)
