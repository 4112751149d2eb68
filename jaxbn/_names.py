"""Names: those imported on first use, those of other libraries, and those that errors use."""

from __future__ import annotations

import functools
import importlib
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
T = TypeVar("T")

# What PyTorch, Keras, Haiku, Equinox and papers call an argument.
_ARGUMENTS = {
  "eps": "epsilon",
  "decay": "momentum, the share of the old value that is kept",
  "decay_rate": "momentum, the share of the old value that is kept",
  "alpha": "momentum, the share of the old value that is kept",
  "train": "use_running_average=not train",
  "training": "use_running_average=not training",
  "is_training": "use_running_average=not is_training",
  "inference": "use_running_average",
  "deterministic": "use_running_average",
  "gamma": "scale",
  "weight": "scale (weights are something else: how much each element counts)",
  "beta": "bias",
  "offset": "bias",
  "affine": "use_scale and use_bias",
  "create_scale": "use_scale",
  "create_offset": "use_bias",
  "center": "use_bias",
  "running_mean": "state=jaxbn.RunningStats(mean, var)",
  "running_var": "state=jaxbn.RunningStats(mean, var)",
  "channel_axis": "axis, which is the channels'",
  "feature_axis": "axis, which is the channels'",
  "data_format": "axis, which is the channels': 1 for NCHW, -1 for NHWC",
  "axes": "axis, which is the channels': it is summed over the others",
  "num_channels": "num_features",
  "cross_replica_axis": "axis_name",
  "process_group": "axis_name",
  "ghost_batch_size": "virtual_batch_size",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_BATCH_NORM = re.compile(r"(sync_?)?batch_?norm(alization)?(_?[123]d)?", re.IGNORECASE)


def on_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
  """A package's `__getattr__`: imports a name from its home, a submodule, or that itself."""

  def __getattr__(name: str) -> Any:
    if name not in homes:
      said = f"module {package!r} has no attribute {name!r}{_meant(package, name)}"
      raise AttributeError(said, name=name, obj=sys.modules[package])
    home = importlib.import_module(f"{package}.{homes[name]}")
    return home if homes[name] == name else getattr(home, name)

  return __getattr__


def _meant(package: str, name: str) -> str:
  if package in ("jaxbn.linen", "jaxbn.nnx") and _BATCH_NORM.fullmatch(name):
    return f": {package}.BatchNorm takes any number of axes, and axis_name= synchronizes it."
  if package == "jaxbn" and (_BATCH_NORM.fullmatch(name) or name[:1].isupper()):
    return (
      ": the layers are in jaxbn.linen and jaxbn.nnx, such as jaxbn.nnx.BatchNorm; "
      "jaxbn.batch_norm is the function."
    )
  return ""


def require_our_names(what: str, given: Mapping[str, Any]) -> None:
  """Refuses an argument by the name that another library gives it."""
  for name in given:
    if name in _ARGUMENTS:
      raise TypeError(f"{what} has no argument {name!r}: here it is {_ARGUMENTS[name]}.")


def shown(value: Any) -> str:
  """A value as its user would write it: a function by its name, an array by dtype and shape."""
  if isinstance(value, jax.Array | np.ndarray) and value.size > 1:
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"
  name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
  return name if isinstance(name, str) and "<" not in name else _SHORT.repr(value)


def by_our_names(function: Callable[P, T]) -> Callable[P, T]:
  """A function that says what another library's name for an argument is here."""

  @functools.wraps(function)
  def call(*args: P.args, **kwargs: P.kwargs) -> T:
    if not _ARGUMENTS.keys().isdisjoint(kwargs):
      require_our_names(function.__qualname__, kwargs)
    return function(*args, **kwargs)

  return call


class ByOurNames:
  """A layer whose constructor says what another library's name for an argument is here."""

  if not TYPE_CHECKING:  # as a signature it would hide that of `__init__`

    def __new__(cls, *args, **kwargs):
      require_our_names(cls.__name__, kwargs)
      return super().__new__(cls)
