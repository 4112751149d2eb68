"""Counts, which stay exact: integers as far as they go, NumPy numbers where shapes tell them.

A float32 sum of ones stops at 2^24. A count that follows from shapes alone is the same on every
device, and need not be sent.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._dtypes import accumulation_dtype
from jaxbn._meshes import sharded_alike
from jaxbn._types import INT32_MAX, Array, Axes, Numeric

_EXACT_ONES = 2**24  # of which a sum in float32 is exact
_LOW_BITS = 12  # of a count, which travels as these and those above


def count_of(axes: Axes, x: jax.Array, counted: jax.Array | None) -> Numeric:
  """How many elements of x each channel has, by a mask or by weights; of the smallest shape."""
  if counted is None:
    return axes.size(x)
  whole, own = (math.prod(a.shape[i] for i in axes.reduced) for a in (x, counted))
  # Counting the mask as it is, not broadcast, is exact and costs little.
  integer = counted.dtype == jnp.bool_ and (not isinstance(whole, int) or whole <= INT32_MAX)
  real = accumulation_dtype(jnp.finfo(x.dtype).dtype)
  # Under jit with sharded arrays a sum of the dtype of the others is one all-reduce with them.
  exact = isinstance(own, int) and own <= _EXACT_ONES
  count = jnp.sum(counted, axes.reduced, dtype=jnp.int32 if integer and not exact else real)
  dtype = jnp.int32 if integer else real
  count = count.astype(dtype) * jnp.asarray(whole // own, dtype)
  return count.reshape(()) if count.size == 1 else count


def are_reliabilities(weights: Array | None) -> bool:
  """Whether these weights say how far an element can be relied on, not how often it is there."""
  return weights is not None and jnp.issubdtype(jnp.result_type(weights), jnp.floating)


def is_known(count: Any) -> bool:
  """Whether a count follows from shapes alone, and so is the same on every device."""
  return isinstance(count, int | float | np.generic | np.ndarray)


def is_integer(count: Numeric) -> bool:
  return jnp.issubdtype(jnp.result_type(count), jnp.integer)


def divisor(count: Numeric, dtype: Any) -> Numeric:
  """The count to divide by: 1 where there is nothing to divide."""
  if is_known(count):
    return np.where(np.asarray(count) > 0, count, 1).astype(dtype)
  count = jnp.asarray(count, dtype)
  return jnp.where(count > 0, count, 1)


def occupied(count: Numeric) -> Any:
  """Whether a channel has elements; True itself where all are known to have."""
  if is_known(count) and np.all(np.asarray(count) > 0):
    return True
  return jnp.asarray(count) > 0


def where(condition: Any, value: jax.Array, otherwise: Numeric) -> jax.Array:
  """jnp.where, and no operation at all where the condition is True itself."""
  if condition is True:
    return value
  condition, value, otherwise = sharded_alike(condition, value, otherwise)
  return jnp.where(condition, value, otherwise)


def add(a: Numeric, b: Numeric) -> Numeric:
  """a + b, which stops at the largest int32 rather than wrapping around."""
  if not (is_integer(a) and is_integer(b)):
    return jnp.asarray(a) + jnp.asarray(b)
  if is_known(a) and is_known(b) and np.max(np.add(a, b, dtype=np.int64), initial=0) <= INT32_MAX:
    return np.add(a, b, dtype=np.int32)
  a, b = jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32)
  return jnp.where(a > INT32_MAX - b, INT32_MAX, a + b)


def multiply_known(count: Numeric, times: int) -> Numeric:
  if is_integer(count) and int(np.max(count, initial=0)) * times <= INT32_MAX:
    return np.asarray(count, np.int32) * np.int32(times)
  return np.asarray(count, np.float32) * np.float32(times)


def high_and_low(count: jax.Array, dtype: Any) -> jax.Array:
  """An integer as its high and low bits, whose sums in float32 are exact up to 2^36."""
  high, low = count >> _LOW_BITS << _LOW_BITS, count & (2**_LOW_BITS - 1)
  return jnp.stack([high.astype(dtype), low.astype(dtype)])


def from_high_and_low(high_and_low: jax.Array) -> jax.Array:
  """The integer, which stops at the largest int32."""
  high, low = high_and_low
  fits = jnp.floor(high / 2**_LOW_BITS) + jnp.floor(low / 2**_LOW_BITS) < 2 ** (31 - _LOW_BITS)
  return jnp.where(fits, high.astype(jnp.int32) + low.astype(jnp.int32), INT32_MAX)
