"""Prediction-time batch normalization for a whole network of Flax Linen, as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jaxbn._types import Chosen, Moments, RunningStats
from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.variants.prediction_time import NOT_TRACKED, elements_per_example, interpolate

# A context of JAX's, so that what jit has traced without it is not used within it.
_predicting = jax.make_user_context(None)


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
  intercept = functools.partial(_predict, prior)

  @functools.wraps(function)
  def predicting(*args: Any, **kwargs: Any) -> Any:
    with _predicting(intercept), nn.intercept_methods(intercept):
      return function(*args, **kwargs)

  return predicting


class _Interpolated(NamedTuple):
  """The `choose` of a layer that predicts, which can be told from a user's."""

  prior: float
  elements: int

  def __call__(self, batch: Moments, state: RunningStats | None) -> Chosen:
    return interpolate(self.prior, self.elements)(batch, state)


def _predict(
  prior: float,
  next_function: Callable[..., Any],
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  context: nn.module.InterceptorContext,
) -> Any:
  layer = context.module
  called = isinstance(layer, BatchNorm) and context.method_name == "__call__"
  if not called or layer.is_initializing() or isinstance(layer.choose, _Interpolated):
    return next_function(*args, **kwargs)
  if type(layer) is not BatchNorm or layer.choose is not None:
    raise ValueError(
      f"prediction_time knows the layers BatchNorm, not {type(layer).__name__} at "
      f"{'/'.join(layer.path) or 'the top'}{' with choose' if layer.choose else ''}: use "
      "jaxbn.variants.prediction_time there."
    )

  def training(x: Any, use_running_average: bool | None = None, **given: Any) -> jax.Array:
    del use_running_average  # in either mode
    choose = _Interpolated(prior, elements_per_example(x, layer.axis))
    streams = [] if layer.scope is None else layer.scope.rngs
    y, _ = layer.clone(parent=None, use_running_average=False, choose=choose, **NOT_TRACKED).apply(
      layer.variables,
      x,
      rngs={name: layer.make_rng(name) for name in streams},
      mutable=["batch_stats"],
      **given,
    )
    return y

  return training(*args, **kwargs)
