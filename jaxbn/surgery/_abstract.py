"""Functions run on shapes alone, whatever else is among their arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import errors

_LACKING = (
  errors.ScopeVariableNotFoundError,
  errors.ScopeCollectionNotFound,
  errors.ScopeParamNotFoundError,
)


def split_static(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
  """The function of the arrays among these arguments, and those; flags and names are left."""
  leaves, tree = jax.tree.flatten((args, kwargs))
  is_array = [hasattr(v, "dtype") and not isinstance(v, np.generic) for v in leaves]

  def of_arrays(arrays: list[Any]) -> Any:
    rest = iter(arrays)
    filled = [next(rest) if on else v for on, v in zip(is_array, leaves, strict=True)]
    args, kwargs = jax.tree.unflatten(tree, filled)
    return function(*args, **kwargs)

  return of_arrays, [v for on, v in zip(is_array, leaves, strict=True) if on]


def shapes_of_variables(model: Any, args: Any, arguments: Any) -> Any:
  """Those that a Linen module's init makes."""
  init, arrays = split_static(model.init, jax.random.key(0), *args, **arguments)
  return jax.eval_shape(init, arrays)


@contextlib.contextmanager
def saying_what_lacks() -> Iterator[None]:
  """Around what may run a Linen module: Flax's error with the mend."""
  try:
    yield
  except _LACKING as error:
    raise ValueError(
      f"variables lacks what a layer needs: {error} Give all collections, as init makes them: "
      "{'params': params, 'batch_stats': batch_stats}."
    ) from error
