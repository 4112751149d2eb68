"""What the NNX layers do alike: modes, parameters, and variables that are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax.typing import Dtype, Initializer

from jaxbn import _checks
from jaxbn._names import ByOurNames


# In this order an object of Flax's class may become one of ours: Python compares the first bases.
class Trackable(nnx.Module, ByOurNames):
  """A layer with running statistics: whether it evaluates, and how they are written."""

  use_running_average: bool | None

  def set_view(self, use_running_average: bool | None = None) -> None:
    """What `nnx.view` calls to make a view with another mode.

    Args:
      use_running_average: True in evaluation, False in training, None to leave it.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average

  def _evaluating(self, use_running_average: bool | None) -> bool:
    """What the call says, or else the constructor."""
    if use_running_average is None:
      use_running_average = self.use_running_average
    if use_running_average is None:
      raise ValueError(
        "use_running_average was given neither to the constructor nor to the call: pass it to one, "
        "or choose with train() and eval()."
      )
    return _checks.static_bool("use_running_average", use_running_average)

  def _store(self, state: Any) -> None:
    """Writes the leaves of a state, a NamedTuple, into the variables of their names."""
    for name, value in state._asdict().items():
      if value is not None:
        write(self, getattr(self, name), value)


def of_shape(variable: nnx.Variable | jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The value, in this shape if it has as many elements.

  Channels on several axes are one vector in the layer, and other libraries' checkpoints keep axes
  of size one. What does not fit stays as it is: the core says which shape is wrong.
  """
  value = variable[...] if isinstance(variable, nnx.Variable) else variable
  return value.reshape(shape) if value.size == math.prod(shape) else value


def write(layer: nnx.Module, variable: nnx.Variable, value: jax.Array) -> None:
  """Sets a running statistic: as in Flax they are no path for gradients."""
  put(layer, variable, jax.lax.stop_gradient(value).reshape(variable.shape))


def put(layer: nnx.Module, variable: nnx.Variable, value: jax.Array) -> None:
  """Sets a variable, or says why that cannot be done here."""
  try:
    variable.set_value(value)
  except (errors.TraceContextError, errors.ImmutableVariableError) as error:
    raise type(error)(
      f"the running statistics of this {type(layer).__name__} cannot be updated inside a JAX "
      "transformation that it was not passed through: use the nnx one (nnx.jit, nnx.grad, ...) "
      "with the model as an argument; or nnx.split it outside, nnx.merge(..., copy=True) it inside "
      "and return the new state; or make it under nnx.var_defaults(ref=True); or evaluate with "
      "model.eval()."
    ) from error


def parameter(
  wanted: bool,
  initializer: Initializer,
  shape: tuple[int, ...],
  dtype: Dtype,
  rngs: nnx.Rngs,
  metadata: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
  """A parameter, or None if it is not wanted."""
  return (
    nnx.Param(initializer(rngs.params(), shape, dtype), **metadata) if wanted else nnx.data(None)
  )


def tuples(value: Any) -> Any:
  """Lists, however deep, as tuples: NNX compares and hashes what is not data."""
  return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def as_function(activation: Any, x: jax.Array) -> Any:
  """The activation for the core, which traces it: a module with random numbers draws them here.

  NNX sets no variable where another one is traced, and a count of numbers drawn is a variable. So
  its streams move on by one, and what is traced is a copy that draws from what they gave.
  """
  if not isinstance(activation, nnx.Module) or not _streams(activation):
    return activation
  own = nnx.clone(activation)
  if _draws(own, x):
    for stream, copied in zip(_streams(activation), _streams(own), strict=True):
      copied.key.set_value(stream())
      copied.count.set_value(jnp.zeros_like(copied.count[...]))
  graphdef, state = nnx.split(own)
  return lambda z: nnx.merge(graphdef, state, copy=True)(z)


def _streams(module: nnx.Module) -> list[nnx.RngStream]:
  return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]


def _draws(module: nnx.Module, x: jax.Array) -> bool:
  """Whether a call draws: not one of `nnx.Dropout` in evaluation."""
  graphdef, state = nnx.split(module)
  seen = []

  def call(x: jax.Array) -> None:
    copy: Any = nnx.merge(graphdef, state, copy=True)
    before = [stream.count.get_raw_value() for stream in _streams(copy)]
    copy(x)
    after = [stream.count.get_raw_value() for stream in _streams(copy)]
    seen.append(any(a is not b for a, b in zip(after, before, strict=True)))

  jax.eval_shape(call, x)
  return seen[0]
