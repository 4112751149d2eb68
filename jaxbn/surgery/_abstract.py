"""Functions run on shapes alone, whatever else is among their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


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
