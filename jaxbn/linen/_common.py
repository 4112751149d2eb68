"""What the Linen layers do alike: variables that are missing or do not fit, and activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.core import meta

from jaxbn import _checks
from jaxbn._activation import hoist
from jaxbn._arguments import valid_elements
from jaxbn._names import require_our_names

P = ParamSpec("P")
T = TypeVar("T")


def has_count(layer: nn.Module, momentum: float | None, debias: bool, evaluating: bool) -> bool:
  """Whether the layer has the leaf `count` in `batch_stats`.

  Statistics without one, such as Flax's, will do for evaluation, which does not read it; training
  on would begin to count at 0, and forget them.
  """
  if not (debias or momentum is None):
    return False
  started = layer.has_variable("batch_stats", "mean")
  if not started or layer.has_variable("batch_stats", "count"):
    return True
  if not evaluating:
    raise ValueError(
      f"batch_stats of {called(layer)} has a mean but no count, which "
      "debias=True and momentum=None need in training: it was saved without that option. Add the "
      "leaf with jaxbn.surgery.stats.add_count(variables, updates_so_far), or leave the option out."
    )
  return False


def mended(call: Callable[P, T]) -> Callable[P, T]:
  """A layer's `__call__`, with errors about its variables and arguments that say what to do."""

  @functools.wraps(call)
  def mended_call(*args: P.args, **kwargs: P.kwargs) -> T:
    layer: Any = args[0]
    require_our_names(f"{type(layer).__name__}.__call__", kwargs)
    try:
      return call(*args, **kwargs)
    except errors.ScopeParamShapeError as error:
      _say(error, _other_channels(layer, args[1] if len(args) > 1 else kwargs.get("x")))
      raise
    except errors.ModifyScopeVariableError as error:
      _say(error, _immutable(layer))
      raise
    except errors.ScopeCollectionNotFound as error:
      _say(error, _missing(layer))
      raise

  return mended_call


def _say(error: Exception, mend: str | None) -> None:
  """An error of Flax's in our words; in its own where it is not about the layer itself."""
  if mend is not None:
    error.args = (mend,)


def _other_channels(layer: Any, x: Any) -> str | None:
  if not hasattr(layer, "axis"):
    return None  # of a kernel: Flax says which
  x = jnp.asarray(x)
  axes = _checks.split_axes(x.ndim, layer.axis)
  params = meta.unbox(layer.variables["params"])
  held = {name: params[name].shape for name in ("scale", "bias") if name in params}
  channels = {shape[-len(axes.features) :] for shape in held.values()} - {axes.shape(x)}
  if not channels:
    return None  # of an activation's parameter
  return (
    f"{called(layer)} has parameters of shape {held}, but x of shape {x.shape} has channels of "
    f"shape {axes.shape(x)} on axis={layer.axis}: pass x with as many channels, or name the "
    f"channels' axis{_checks.other_axis(x, channels.pop())}"
  )


def _immutable(layer: Any) -> str | None:
  if layer.is_mutable_collection("batch_stats"):
    return None
  return (
    f"{called(layer)} updates its running statistics in training, but batch_stats is not mutable: "
    "y, updates = module.apply(variables, x, mutable=['batch_stats']) returns the new ones; or "
    "evaluate, with use_running_average=True."
  )


def _missing(layer: Any) -> str | None:
  wanted = {
    "params": getattr(layer, "use_scale", True) or getattr(layer, "use_bias", True),
    "batch_stats": hasattr(layer, "use_running_average"),
  }
  missing = [name for name in wanted if wanted[name] and not layer.variables.get(name)]
  if not missing:
    return None
  return (
    f"{called(layer)} finds nothing of its own in {' and '.join(missing)}: pass to apply all "
    "collections that init made, {'params': ..., 'batch_stats': ...}."
  )


def called(layer: Any) -> str:
  """A layer as its user knows it: by its path in the network."""
  return "/".join(layer.path) or "the layer"


def pure(layer: Any) -> Any:
  """The layer's activation for the core, which traces it: of a module a function of its variables.

  None at initialization, when it may make parameters: see `first_activation`.
  """
  if layer.is_initializing() and callable(layer.activation):
    return None
  return as_function(layer.activation)


def first_activation(layer: Any, y: jax.Array, mask: Any, weights: Any) -> jax.Array:
  """At initialization, what `pure` left to do: parameters are not made where the core traces."""
  if not layer.is_initializing() or layer.activation is None:
    return y
  activated = layer.activation(y)
  if jnp.shape(activated) != y.shape or jnp.result_type(activated, y) != y.dtype:
    hoist("activation", layer.activation, y, y.dtype)  # says what is wrong, if it is
  valid, _ = valid_elements(y, None if mask is None else jnp.asarray(mask, bool), weights)
  activated = activated.astype(y.dtype)
  if valid is None or layer.masked_value is None:
    return activated
  return jnp.where(valid, activated, layer.masked_value)


def as_function(activation: Any) -> Any:
  """A module that has its variables as a function of one argument; a function as it is."""
  if not isinstance(activation, nn.Module):
    return activation
  module, variables = activation.unbind()
  streams = [] if activation.scope is None else activation.scope.rngs
  rngs = {name: activation.make_rng(name) for name in streams}

  def function(x: jax.Array) -> Any:
    return module.apply(variables, x, rngs=rngs)

  return function
