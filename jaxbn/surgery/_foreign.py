"""Batch norms that are not Flax's: how to read one, and its call by ours."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._batch_norm import batch_norm
from jaxbn._types import RunningStats

_OF_THE_CALL = {"x", "scale", "bias", "state", "mask", "weights", "residual", "use_running_average"}


@dataclasses.dataclass(frozen=True, eq=False)  # NNX compares and hashes it
class Foreign:
  """How to read a batch norm that is not Flax's: `foreign={TheirBatchNorm: Foreign(...)}`.

  Attributes:
    training: name of the call's argument, or else of the field, that is True in training; with
      "not " before it, in evaluation. Or a function of the layer and its call's arguments.
    options: the options of `jaxbn.batch_norm` (axis, epsilon, momentum, axis_name, ...): each the
      name of its field there, or a function of the layer. Those left out have our defaults.
    variables: its names for mean, var, scale and bias, where they are others. A statistic may have
      axes of size one around the channels. A variable that is not there is none.
    scale_offset: what the scale lacks: 1.0 where gamma - 1 is stored.
    mask: name of the call's argument that says which elements exist, or None.
    returns: what the call gives, made of y; for one that gives more than y.

  >>> import jaxbn.surgery
  >>> reading = jaxbn.surgery.Foreign(training="train", options={"epsilon": "eps"})
  """

  training: str | Callable[[Any, Mapping[str, Any]], bool] = "not use_running_average"
  options: Mapping[str, str | Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
  variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
  scale_offset: float = 0.0
  mask: str | None = None
  returns: Callable[[jax.Array], Any] = lambda y: y

  def options_of(self, layer: Any) -> dict[str, Any]:
    return {
      name: getattr(layer, field) if isinstance(field, str) else field(layer)
      for name, field in self.options.items()
    }

  def name(self, ours: str) -> str:
    return self.variables.get(ours, ours)


def theirs(foreign: Mapping[type, Foreign], kind: type, name: str) -> str:
  """What a layer of this class calls its mean, var, scale or bias."""
  return foreign[kind].name(name) if kind in foreign else name


class Read(NamedTuple):
  """What a call says, of whatever batch norm."""

  x: Any
  given: dict[str, Any]  # mask, weights and domains
  evaluating: bool | None


def read(reading: Foreign | None, layer: Any, arguments: Mapping[str, Any]) -> Read:
  """The arguments of a call by our names."""
  first = next(iter(arguments.values()), None)
  if reading is None:
    given = {name: arguments.get(name) for name in ("mask", "weights", "domains")}
    evaluating = arguments.get("use_running_average")
    if evaluating is None:  # nor have all layers such a field, where others are looked for
      evaluating = getattr(layer, "use_running_average", None)
    return Read(first, given, evaluating)
  mask = None if reading.mask is None else arguments.get(reading.mask)
  training = reading.training
  if not isinstance(training, str):
    return Read(first, {"mask": mask}, not training(layer, arguments))
  name = training.removeprefix("not ")
  value = arguments.get(name)
  if value is None:
    value = getattr(layer, name, None)
  if value is None:
    raise ValueError(
      f"training={training!r} of the reading of {type(layer).__name__} is neither an argument of "
      f"this call, which has {', '.join(arguments)}, nor a field: name the one that chooses its "
      "mode."
    )
  return Read(first, {"mask": mask}, bool(value) == (name != training))


def bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
  """The arguments of a call by their names, with defaults."""
  call = inspect.signature(function).bind(*args, **kwargs)
  call.apply_defaults()
  return call.arguments


def run(
  reading: Foreign,
  layer: Any,
  arguments: Mapping[str, Any],
  get: Callable[[str], Any],
  put: Callable[[str, jax.Array], None],
  *,
  evaluating: bool | None = None,
  **options: Any,
) -> Any:
  """A call of such a batch norm, by ours, with its variables as they are."""
  x, given, as_said = read(reading, layer, arguments)
  evaluating = as_said if evaluating is None else evaluating
  mine = {name: get(reading.name(name)) for name in ("mean", "var", "scale", "bias")}
  options = reading.options_of(layer) | options
  if mine["mean"] is None or mine["var"] is None:
    raise ValueError(
      f"{type(layer).__name__} has no variable {reading.name('mean')!r} or "
      f"{reading.name('var')!r}: say in Foreign(variables={{...}}) what they are called there."
    )
  shape = _checks.split_axes(jnp.ndim(x), options.get("axis", -1)).shape(x)
  mean: Any
  var: Any
  mean, var, scale, bias = (None if v is None else jnp.reshape(v, shape) for v in mine.values())
  if scale is not None:
    scale = scale + reading.scale_offset
  if given["mask"] is not None:
    given["mask"] = jnp.asarray(given["mask"], bool)
  state = RunningStats(mean, var)
  options |= {**given, "use_running_average": bool(evaluating)}
  y, new = batch_norm(x, scale, bias, state, **options)
  if not evaluating and new is not None:
    for name in ("mean", "var"):
      put(reading.name(name), getattr(new, name).reshape(mine[name].shape))
  return reading.returns(y)


def options_of_function(layer: Any, options: dict[str, Any]) -> dict[str, Any]:
  """The options, where it is the function that runs a layer that is not Flax's."""
  known = set(inspect.signature(batch_norm).parameters) - _OF_THE_CALL
  for name in options.keys() - known:
    raise TypeError(
      f"{name!r} is no option for {layer}, which is not Flax's: {', '.join(known)} are."
    )
  if options.get("debias") or options.get("momentum", 0.99) is None:
    raise ValueError(
      f"{layer} is not Flax's and has no leaf count, which debias=True and momentum=None need: "
      "leave the option out there, by a rule or where=."
    )
  return options
