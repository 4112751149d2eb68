"""What the tests of moments share: tolerances, elements, and the gradients that are right."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from tests import oracle

# ---------------------------------------------------------------------------------------------
# Tolerances: first-order rounding analysis, u the unit roundoff, p the pivot, E over the elements.
#
# Each element goes through h additions of the sum. One pass over d = x - p makes, besides those, at
# most 3 roundings in E[d] (difference, weight, division), and 7 in E[|d|^2] (the difference twice,
# two squares and their sum for complex x, weight, division), all relative to values of which E|d|
# and E[|d|^2] are the sums of absolute values. With R^2 = E[|d|^2] = var + |mean - p|^2 >= E|d|^2:
#
#   |mean - exact| <= u |mean| + (h + 3) u R
#   |var - exact|  <= (h + 7) u R^2 + (2 (h + 3) + 2) u R^2 + u var + 2 u R^2 <= (3h + 18) u R^2
#
# (E[|d|^2], the square of E[d], their difference, and the floor of 2 u |E[d]|^2 beneath it). A
# second pass starts from deviations e = d - E[d], each with an absolute error of at most
# (h + 5) u R, and sums positive terms: |var - exact| <= (h + 7) u var + 2 std (h + 5) u R + square.


def unit_roundoff(dtype):
  """Of the accumulator for elements of this dtype: half the distance from 1 to the next number."""
  return float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps) / 2


def additions(n):
  """How many additions an element goes through in a sum of n.

  Never more than n - 1, in any order. Long sums over one axis are cut into windows of 32, whose
  sums are cut again (XLA's tree reduction).
  """
  return n if n <= 1024 else 32 * math.ceil(math.log(n, 32))


def measured_within(exact, pivot, n, dtype, fast=True):
  """The tolerances for mean and var of `moments` on n elements per channel, of the exact ones."""
  mean, std = np.abs(exact.mean), np.sqrt(exact.var)

  def tolerances(u, distance, fast):
    h, r = additions(n), np.hypot(std, distance)
    deviation = (h + 5) * u * r
    var = (h + 7) * u * std**2 + 2 * std * deviation + deviation**2
    return u * mean + (h + 3) * u * r, (3 * h + 18) * u * r**2 if fast else var

  # The oracle's own rounding: two passes in float64, around zero. Numbers below `tiny` are flushed.
  own = tolerances(2.0**-53, mean, fast=False)
  tiny = float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).tiny)
  given = tolerances(unit_roundoff(dtype), np.abs(exact.mean - pivot), fast)
  return tuple(a + b + 2 * tiny for a, b in zip(given, own, strict=True))


def shared_within(*pieces, steps=1):
  """The exact moments of several (x, mask) together, and the tolerances of `merge` or `sync`.

  Errors of at most e in the pieces' means move var by 2 std e + e^2 at most; those of their
  variances are averaged. Sharing is one pass over the pieces' means, with up to 8 more roundings
  than `moments` (counts as floating-point numbers, their products and quotients), and one of each
  mean on the way; and by `sync`, d^2 u^2 of each of three sums is lost (jaxbn/_digits.py). As many
  `steps` one after the other add up.
  """
  xs, masks = zip(*pieces, strict=True)
  exact = oracle.moments(np.concatenate(xs), mask=np.concatenate(masks))
  parts = [oracle.moments(x, mask=mask) for x, mask in pieces]

  def largest(values):
    return np.max([np.where(p.count > 0, v, 0) for p, v in zip(parts, values, strict=True)], axis=0)

  pivots = [np.take_along_axis(x, mask.argmax(0)[None], 0)[0] for x, mask in pieces]
  own = [
    measured_within(part, first, len(x), x.dtype)
    for part, first, x in zip(parts, pivots, xs, strict=True)
  ]
  own_mean, own_var = (largest(tolerances) for tolerances in zip(*own, strict=True))
  spread = largest([np.abs(part.mean - exact.mean) for part in parts])
  u, std = unit_roundoff(xs[0].dtype), np.sqrt(exact.var)
  c = len(pieces) + 8
  mean = own_mean + steps * (u * (np.abs(exact.mean) + spread) + c * u * spread)
  lost = (3 * len(pieces) ** 2 + 4) * (u * (np.abs(exact.mean) + spread)) ** 2
  var = (3 * c + 18) * u * std**2 + lost
  return exact, (mean, own_var + 2 * std * mean + mean**2 + steps * var)


def assert_within(got, exact, tolerances):
  for name, tolerance in zip(("mean", "var"), tolerances, strict=True):
    value, wanted = np.asarray(getattr(got, name)), getattr(exact, name)
    assert value.shape == wanted.shape, f"{name}: {value.shape}, not {wanted.shape}"
    error = np.abs(value.astype(wanted.dtype) - wanted)
    assert np.all(error <= tolerance), f"{name}: off by {error}, allowed {tolerance}"
  assert np.array_equal(np.broadcast_to(got.count, exact.count.shape), exact.count)


def samples(seed, shape, ratio=0.0, dtype=np.float32):
  """Normal numbers of standard deviation 1 around `ratio`, rounded to dtype before any use."""
  rng = np.random.default_rng(seed)
  x = ratio + rng.normal(size=shape)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    x = x + 1j * rng.normal(size=shape)
  return np.asarray(x).astype(dtype)


@functools.partial(jax.jit, static_argnames=("axis", "use_fast_variance"))
def measure(x, axis=-1, **kwargs):
  return jaxbn.moments(x, axis=axis, **kwargs)


def on_device(stats, i):
  return jax.tree.map(lambda a: np.asarray(a)[i], stats)


def total(x, mask=None, weights=None, fast=True):
  stats = jaxbn.moments(x, mask=mask, weights=weights, use_fast_variance=fast)
  return jnp.sum(stats.mean + stats.var)


# ---------------------------------------------------------------------------------------------
# Gradients: d mean/dx = w / count, d var/dx = 2 w (x - mean) / count


def assert_gradient(got, x, a, b, pivot, mask=None, weights=None):
  """got is the gradient of sum(a mean + b var), up to its roundings.

  a/count + b/count 2 (d - E[d]), times the weight: E[d] has h + 3 roundings, the rest fewer than 8;
  they are relative to |a| + 2 |b| (|d| + R).
  """
  exact = oracle.moments(x, mask=mask, weights=weights)
  w = oracle.weights_of(x, mask, weights)
  share = w / np.where(exact.count > 0, exact.count, 1)
  d = np.where(w > 0, oracle.wide(x) - exact.mean, 0)
  wanted = share * (a + 2 * b * d)
  scale = np.abs(a) + 2 * np.abs(b) * (np.abs(d) + 2 * np.abs(exact.mean - pivot) + exact.var**0.5)
  tolerance = (additions(len(x)) + 11) * unit_roundoff(x.dtype) * share * scale
  error = np.abs(np.asarray(got, wanted.dtype) - wanted)
  assert np.all(error <= tolerance), f"off by {error}, allowed {tolerance}"
