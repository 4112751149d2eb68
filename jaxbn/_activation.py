"""What becomes of an activation: a function of arrays alone, which any transformation can keep."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._names import shown


class Hoisted(NamedTuple):
  """A function of z and of the arrays that it held: what it computes, and nothing else of it."""

  function: Callable[..., jax.Array]
  constants: tuple[Any, ...]
  lasts: bool  # as long as the process, so that JAX's caches may hold it


def hoist(name: str, function: Any, z: jax.Array, dtype: Any) -> Hoisted:
  """The elementwise function for arguments like z, called now and not again.

  So what it draws is drawn once, the arrays that it holds become arguments, as a custom rule needs
  them, and a cache that keeps the result keeps neither the function nor those. Only one that its
  module holds is used as it is: it can be told from others, so that layers alike are traced once.

  Raises:
    TypeError: no function; a result that is no floating-point number, or that dtype cannot hold.
    ValueError: a result of another shape.
  """
  if not callable(function):
    raise TypeError(
      f"{name}={shown(function)} is not a function: pass an elementwise one, such as jax.nn.relu, "
      "or None."
    )
  lasts = _lasts(function)
  # Else in a new function, since JAX remembers what it has traced.
  traced, result = jax.make_jaxpr(function if lasts else lambda z: function(z), return_shape=True)(
    z
  )
  _check_result(f"{name}={shown(function)}", z.shape, result, dtype)
  if lasts and not traced.consts:
    return Hoisted(function, (), True)

  # Once more, since what was traced holds its arrays, too.
  evaluate = functools.partial(jax.core.eval_jaxpr, traced.jaxpr)
  constants = tuple(traced.consts)
  pure = jax.make_jaxpr(lambda z, *constants: evaluate(constants, z))(z, *constants)

  def of_arrays(z: jax.Array, *constants: Any) -> jax.Array:
    return jax.core.eval_jaxpr(pure.jaxpr, pure.consts, z, *constants)[0]

  return Hoisted(of_arrays, constants, False)


def _check_result(given: str, shape: tuple[int, ...], result: Any, dtype: Any) -> None:
  if getattr(result, "shape", None) != shape:
    raise ValueError(
      f"{given} turns an array of shape {shape} into {result}: pass a function that "
      "works element by element, and apply others to y."
    )
  if not jnp.issubdtype(result.dtype, jnp.inexact):
    raise TypeError(
      f"{given} gives {result.dtype}, which has no derivative: pass a function that gives "
      "floating-point numbers, or apply this one to y."
    )
  if jnp.issubdtype(result.dtype, jnp.complexfloating) and not jnp.issubdtype(
    dtype, jnp.complexfloating
  ):
    raise TypeError(
      f"{given} gives {result.dtype}, but y has dtype={jnp.dtype(dtype)}, which cannot hold "
      "complex numbers: pass dtype=jnp.complex64, or take the real part in it."
    )


def _lasts(function: Any) -> bool:
  """Whether a module holds this function under its name, as long as it is loaded."""
  home = sys.modules.get(str(getattr(function, "__module__", None)))
  name = getattr(function, "__name__", None)
  return home is not None and isinstance(name, str) and getattr(home, name, None) is function
