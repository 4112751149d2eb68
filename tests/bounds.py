r"""How far a result may lie from the float64 oracle: derived from the arithmetic, not tuned.

Notation, per channel: u the unit roundoff of the accumulator (half its eps), n the elements of a
sum, s = sqrt(var + epsilon), z = (x - mean) / s, k = |mean| / s, and D the largest distance in s of
the mean from a pivot: from any element (max |z|), unless it is given.

  sums       A sum of n terms is off by S(n) = min(n, 6 sqrt(n)) u times the sum of the terms'
             magnitudes (Higham & Mary 2019, theorem 2.4, with lambda = 6: the chance of more is
             1e-7; the other form is the worst case). sqrt(1 + D^2) s bounds the mean magnitude of
             x - pivot, and (1 + D^2) s^2 that of its square. Numerator and denominator are sums,
             and products with weights and x - pivot round too: twice S, plus 4 u.
  mean       e_m = u k (1 for storing it; 2 if shared, for each device stores its own)
                   + (2 S + 4 u) sqrt(1 + D^2)                                      in deviations
  variance   e_v = (2 S + 4 u) (1 + D^2), and if shared by d devices 4 u k + (3 d^2 + 4) u^2 k^2:
             the devices' means are rounded before their distances are squared, and d^2 u^2 of each
             of three sums is lost (jaxbn/_digits.py); D is 1 in a second pass            relative
  z          e_z = e_m + |z| (e_v / 2 + 8 u): 8 u for x - mean, var + epsilon (and epsilon itself,
             rounded), rsqrt (4 u), the two products
  y          |scale| e_z + u (|y| + |scale z| + |bias|), and the rounding of the output's dtype.

Gradients, with g the cotangent, r = 1/s, w the weights and W their sum, from oracle.gradients:

  bias       (S + u) sum |g|
  scale      (S + 2 u) sum |g z| + sum |g| e_z
  x          |scale| r [ 4 u |g| + w/W ( (2 S + 8 u) (sum |g| + (|z| + D) sum |g z|)
                                         + e_z |sum g z| + |z| sum |g| e_z ) ] + (e_v/2 + 8 u) |dx|
             (|z| + D: the derivative of E[|d|^2] - |E[d]|^2 is a difference of terms of size D).

Terms of second order are left out: the bounds hold where e_z is well below one.
"""

import jax.numpy as jnp
import numpy as np

from tests import oracle


def roundoff(dtype):
  return float(jnp.finfo(dtype).eps) / 2


def accumulator(dtype):
  return jnp.promote_types(dtype, jnp.float32)


def summing(n, u):
  return np.minimum(n, 6 * np.sqrt(n)) * u


def standardized(x, epsilon, axis, mask, weights, u, pivot, devices, two_passes=False):
  """z, r, D, S, e_m, e_v, e_z, the per-channel ones broadcasting against x."""
  stats = oracle.moments(x, axis, mask, weights)
  w = oracle.weights_of(x, mask, weights)
  axes = [a % x.ndim for a in np.atleast_1d(np.asarray(axis, int))]
  reduced = tuple(a for a in range(x.ndim) if a not in axes)
  mean, var = (oracle.expand(v, x, axis) for v in stats[1:])
  s = np.sqrt(var + epsilon)
  values = np.where(w > 0, oracle.wide(x), mean)
  z = np.abs(values - mean) / s
  n = np.prod([x.shape[a] for a in reduced])
  distance, k = z.max(reduced, keepdims=True), np.abs(mean) / s
  if pivot is not None:
    pivot = oracle.expand(np.broadcast_to(pivot, stats.mean.shape), x, axis)
    distance = np.maximum(distance, np.abs(mean - pivot) / s)
  total = summing(n, u)
  e_m = (1 if devices == 1 else 2) * u * k + (2 * total + 4 * u) * np.sqrt(1 + distance**2)
  e_v = (2 * total + 4 * u) * (1 + (1 if two_passes else distance**2))
  if devices > 1:
    e_v = e_v + 4 * u * k + (3 * devices**2 + 4) * (u * k) ** 2
  return z, 1 / s, distance, total, e_m, e_v, e_m + z * (e_v / 2 + 8 * u)


def normalized(y, scaled_z, bias, dtype, out_dtype):
  """For y = z scale + bias where mean and variance are given: the last three lines of z and y."""
  u = roundoff(accumulator(dtype))
  return 9 * u * np.abs(scaled_z) + u * (np.abs(y) + np.abs(bias)) + rounding(y, out_dtype)


def rounding(y, dtype):
  return roundoff(dtype) * np.abs(y) + float(jnp.finfo(dtype).tiny)


def output(x, scale, bias, dtype=None, epsilon=1e-5, axis=-1, two_passes=False, **counted):
  """Of y in training, in x's shape (meaningful where x is valid); dtype is y's, default x's."""
  u = roundoff(accumulator(x.dtype))
  counted = {"mask": None, "weights": None, "pivot": None, "devices": 1, **counted}
  z, *_, e_z = standardized(x, epsilon, axis, u=u, two_passes=two_passes, **counted)
  scale, bias = (np.abs(oracle.expand(oracle.wide(v), x, axis)) for v in (scale, bias))
  y = z * scale + bias
  return scale * e_z + 2 * u * y + rounding(y, dtype or x.dtype)


def gradients(x, scale, cotangent, epsilon=1e-5, axis=-1, mask=None, weights=None, devices=1):
  """Of the gradients in training, of float32 or float64 x: x's, scale's, bias's."""
  u = roundoff(x.dtype)
  exact = oracle.gradients(x, scale, cotangent, epsilon, axis, mask, weights)
  z, r, distance, total, _, e_v, e_z = standardized(
    x, epsilon, axis, mask, weights, u, None, devices
  )
  w = oracle.weights_of(x, mask, weights)
  g = np.where(w > 0, np.abs(cotangent), 0)
  reduced = tuple(a for a in range(x.ndim) if a not in [b % x.ndim for b in np.atleast_1d(axis)])

  def over(values):
    return values.sum(reduced, keepdims=True)

  share = w / np.maximum(over(w), np.finfo(float).tiny)
  abs_scale = np.abs(oracle.expand(oracle.wide(scale), x, axis))
  sum_gz = np.abs(oracle.expand(exact.scale, x, axis))
  inner = (2 * total + 8 * u) * (over(g) + (z + distance) * over(g * z))
  inner = inner + e_z * sum_gz + z * over(g * e_z)
  dx = abs_scale * r * (4 * u * g + share * inner) + (e_v / 2 + 8 * u) * np.abs(exact.x)
  d_scale = (total + 2 * u) * over(g * z) + over(g * e_z)
  d_bias = (total + u) * over(g)
  tiny = float(np.finfo(x.dtype).tiny)
  return oracle.Gradients(dx + tiny, *(v.squeeze(reduced) + tiny for v in (d_scale, d_bias)))


def assert_within(actual, expected, bound, where=True):
  """|actual - expected| <= bound everywhere (or where asked), and nowhere NaN."""
  error = np.abs(oracle.wide(actual) - expected)
  where = np.broadcast_to(where, error.shape)
  bad = where & ~(error <= bound)
  ratio = np.max(np.where(where, error / bound, 0), initial=0)
  assert not bad.any(), (
    f"{bad.sum()} of {where.sum()} beyond the bound, the worst {ratio:.3g} times"
  )
