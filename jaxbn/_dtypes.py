"""In which dtype things are computed: ours to say, once it is settled what a user mixes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
T = TypeVar("T")


def accumulation_dtype(dtype: Any) -> Any:
  """The dtype in which sums over elements of `dtype` are taken: float32 at least."""
  return jnp.float32 if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def wide(x: Any) -> Any:
  """In the dtype of sums; None stays None."""
  return None if x is None else x.astype(accumulation_dtype(x.dtype))


def promoting(function: Callable[P, T]) -> Callable[P, T]:
  """The same function, in which dtypes promote, also where JAX is told that they shall not."""

  @functools.wraps(function)
  def call(*args: P.args, **kwargs: P.kwargs) -> T:
    with jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return call
