r"""Sums over devices of which the leading digits may cancel, without loss of those that remain.

The variance of all devices together is a difference of sums of their n_i mean_i^2 and n_i mean_i.
As floating-point numbers these sums are rounded, and the difference is off by u (mean/std)^2. So
each number travels in `pieces` that add up without rounding. Its digits are cut at positions that
are the same on all devices, multiples of `bits` in the exponent,

    number = 2^(bits (j - 1)) k_1 + 2^(bits (j - 2)) k_2 + rest,    integers |k_1|, |k_2| <= 2^bits

and with t bits in a significand, the k_1 of up to 2^(t - bits) devices add up exactly, and so do
the k_2. Since others may have larger or smaller numbers, the piece at position j - i travels in
slot (j - i) mod 3: devices that put different positions in one slot are 2^(2 bits) apart, and what
the smaller number loses there is below the rounding of the larger. Otherwise nothing is lost but
in the sum of the rests, each of which is below 2^-(bits + 1) of its number: D devices lose at most
D^2 2^-2t of the largest.

Whatever a compiler fuses or reorders, the result is the same: all products are of halves, of t/2
digits each, and so are exact; all sums whose rounding would matter are of multiples of one power of
two, and so are exact, too. (Halves: Dekker 1971, "A floating-point technique for extending the
available precision". Common positions: Rump, Ogita & Oishi 2008, "Accurate floating-point
summation"; Demmel & Nguyen 2013, "Fast reproducible floating-point summation".)

The terms of a sum lie along the first axis.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SLOTS = 3


def significand(dtype: np.dtype) -> int:
  """t: how many bits the integers have that a dtype holds without a gap."""
  return int(jnp.finfo(dtype).nmant) + 1


def upper_half(x: jax.Array) -> jax.Array:
  """x, rounded to half of its digits."""
  info = jnp.finfo(x.dtype)
  return lax.reduce_precision(x, info.nexp, significand(x.dtype) // 2 - 1)


def halves(terms: jax.Array) -> jax.Array:
  """Twice as many terms of the same sum, each of half as many digits."""
  upper = upper_half(terms)
  return jnp.concatenate([upper, terms - upper])


def products(a: jax.Array, b: jax.Array) -> jax.Array:
  """The product of two sums, in terms of which none is rounded; those of a are halves already."""
  b = halves(b)
  return jnp.concatenate([half * b for half in a])


def halves_of_known(n: int, dtype: np.dtype) -> np.ndarray:
  """A number that is known when tracing, in halves, without zeros."""
  lower = n & (2 ** (significand(dtype) // 2) - 1)
  return np.array([half for half in (n - lower, lower) if half], dtype)


@functools.partial(jax.jit, static_argnames="bits")
def pieces(terms: jax.Array, about: jax.Array, more: jax.Array, *, bits: int) -> jax.Array:
  """The sum of terms in pieces that add up without rounding.

  Args:
    terms: finite or not.
    about: their sum, rounded. Where it is not finite, it is sent alone.
    more: added to the rest.
    bits: how many digits a piece has.
  """
  # Positions are counted from the smallest exponent: 2^(bits position) is above the number. Where
  # there are no three positions below it, all of it is rest.
  position = jnp.maximum(lax.div(_exponent(about) + (bits - 1), jnp.int32(bits)), 3)
  unit, lower_unit = (_power_of_two(bits * (position - i), terms.dtype) for i in (1, 2))
  first, terms = _rounded(terms, unit)
  second, terms = _rounded(terms, lower_unit)
  carry = jnp.round(second / unit) * unit  # of several remainders, each up to half a unit
  first, second, rest = first + carry, second - carry, jnp.sum(terms, 0)
  finite, slot = jnp.isfinite(about), lax.rem(position, jnp.int32(_SLOTS))
  slots = [
    jnp.where(finite & (slot == i), first, jnp.where(finite & (slot == after), second, 0))
    for i, after in ((0, 1), (1, 2), (2, 0))
  ]
  return jnp.stack([*slots, jnp.where(finite, rest, about) + more])


@jax.jit
def total(terms: jax.Array) -> jax.Array:
  """The sum of a few terms, right to a unit in the last place whatever cancels."""
  free = significand(terms.dtype) - (len(terms) - 1).bit_length()
  exponent = _exponent(jnp.max(jnp.abs(terms), 0))
  first, terms = _rounded(terms, _power_of_two(exponent - free, terms.dtype))
  second, terms = _rounded(terms, _power_of_two(exponent - 2 * free, terms.dtype))
  return (first + second) + jnp.sum(terms, 0)


def _rounded(terms: jax.Array, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sum of all terms rounded to multiples of a power of two, and what is left of each."""
  multiples = jnp.round(terms / unit) * unit
  return jnp.sum(multiples, 0), terms - multiples


def _exponent(x: jax.Array) -> jax.Array:
  """e, where 2^(e - 1) <= |x| < 2^e, counted from the smallest that there is."""
  info = jnp.finfo(x.dtype)
  bits = lax.bitcast_convert_type(jnp.abs(x), _integer(x.dtype))
  return (bits >> info.nmant).astype(jnp.int32) + 1


def _power_of_two(exponent: jax.Array, dtype: np.dtype) -> jax.Array:
  """2^exponent, counted alike, and normal."""
  bits = jnp.maximum(exponent, 1).astype(_integer(dtype)) << jnp.finfo(dtype).nmant
  return lax.bitcast_convert_type(bits, dtype)


def _integer(dtype: np.dtype) -> Any:
  """Of as many bits."""
  return jnp.int64 if jnp.finfo(dtype).bits == 64 else jnp.int32
