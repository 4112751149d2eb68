"""Batch normalization in float64 NumPy, written from the equations and from nothing else.

Everything here takes the whole batch at once: what several devices hold is concatenated first.
`axis` is the channels' axis or axes, as in jaxbn. Where x is masked or has weight 0 it may hold
anything.
"""

from typing import NamedTuple

import numpy as np


class Stats(NamedTuple):
  count: np.ndarray  # per channel
  mean: np.ndarray
  var: np.ndarray


class Gradients(NamedTuple):
  x: np.ndarray
  scale: np.ndarray
  bias: np.ndarray


def channels_first(x, axis):
  """x as (channels, elements) in float64 (or complex128), and how to undo it."""
  axes = sorted(a % x.ndim for a in np.atleast_1d(axis))
  order = axes + [a for a in range(x.ndim) if a not in axes]
  shape = tuple(x.shape[a] for a in axes)
  rows = x.transpose(order)
  permuted = rows.shape

  def undo(values):
    return values.reshape(permuted).transpose(np.argsort(order))

  return rows.reshape(int(np.prod(shape, dtype=int)), -1), shape, undo


def weights_of(x, mask=None, weights=None):
  """Every element's weight in float64, 0 where masked."""
  w = np.ones(x.shape) if weights is None else np.broadcast_to(weights, x.shape).astype(np.float64)
  return w if mask is None else np.where(np.broadcast_to(mask, x.shape), w, 0)


def wide(x):
  return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def moments(x, axis=-1, mask=None, weights=None):
  """count = sum w, mean = sum w x / count, var = sum w |x - mean|^2 / count; 0 where count is 0."""
  w, shape, _ = channels_first(weights_of(x, mask, weights), axis)
  x, _, _ = channels_first(wide(x), axis)
  x = np.where(w > 0, x, 0)
  count = w.sum(1)
  safe = np.where(count > 0, count, 1)
  mean = (w * x).sum(1) / safe
  var = (w * np.abs(x - mean[:, None]) ** 2).sum(1) / safe
  return Stats(count.reshape(shape), mean.reshape(shape), var.reshape(shape))


def reliability(x, axis=-1, mask=None, weights=None):
  """1 / (1 - sum w^2 / (sum w)^2), which makes a weighted variance unbiased."""
  w, shape, _ = channels_first(weights_of(x, mask, weights), axis)
  return (1 / (1 - (w**2).sum(1) / w.sum(1) ** 2)).reshape(shape)


def expand(statistic, x, axis):
  axes = [a % x.ndim for a in np.atleast_1d(axis)]
  return np.expand_dims(statistic, tuple(a for a in range(x.ndim) if a not in axes))


def normalize(x, mean, var, scale=None, bias=None, epsilon=1e-5, axis=-1):
  """(x - mean) / sqrt(var + epsilon) * scale + bias."""
  mean, var = wide(mean), np.asarray(var, np.float64)
  y = (wide(x) - expand(mean, x, axis)) / np.sqrt(expand(var, x, axis) + epsilon)
  if scale is not None:
    y = y * expand(wide(scale), x, axis)
  return y if bias is None else y + expand(wide(bias), x, axis)


def batch_norm(x, scale=None, bias=None, epsilon=1e-5, axis=-1, mask=None, weights=None):
  stats = moments(x, axis, mask, weights)
  return normalize(x, stats.mean, stats.var, scale, bias, epsilon, axis)


def gradients(x, scale, cotangent, epsilon=1e-5, axis=-1, mask=None, weights=None):
  """Of sum(cotangent * y) for real x; masked elements are given no output (cotangent 0 there).

  With g the cotangent, r = 1/sqrt(var + epsilon), z = (x - mean) r and w the weights:

    bias: sum g,   scale: sum g z,
    x:    scale r (g - w/count sum g - w/count z sum g z)

  (Ioffe & Szegedy 2015, section 3, with their six equations substituted into each other.)
  """
  w, shape, undo = channels_first(weights_of(x, mask, weights), axis)
  stats = moments(x, axis, mask, weights)
  rows, _, _ = channels_first(wide(x), axis)
  g, _, _ = channels_first(wide(cotangent), axis)
  rows, g = np.where(w > 0, rows, 0), np.where(w > 0, g, 0)
  r = 1 / np.sqrt(stats.var.reshape(-1, 1) + epsilon)
  z = (rows - stats.mean.reshape(-1, 1)) * r
  share = w / np.where(stats.count > 0, stats.count, 1).reshape(-1, 1)
  sum_g, sum_gz = g.sum(1, keepdims=True), (g * z).sum(1, keepdims=True)
  dx = np.asarray(scale, np.float64).reshape(-1, 1) * r * (g - share * (sum_g + z * sum_gz))
  dx = np.where(w > 0, dx, 0)
  return Gradients(undo(dx), sum_gz.reshape(shape), sum_g.reshape(shape))


def running(batches, momentum=0.99, debias=False, unbiased=False):
  """Running mean and variance after a list of Stats, from mean 0 and variance 1."""
  mean, var = np.zeros_like(batches[0].mean), np.ones_like(batches[0].var)
  if momentum is None:
    mean, var = 0 * mean, 0 * var
  first_var = var
  t = len(batches)
  for batch in batches:
    n = batch.count
    batch_var = batch.var * n / (n - 1) if unbiased else batch.var
    if momentum is None:
      mean, var = mean + batch.mean, var + batch_var  # sums, divided below
    else:
      mean = momentum * mean + (1 - momentum) * batch.mean
      var = momentum * var + (1 - momentum) * batch_var
  if momentum is None:
    return mean / t, var / t
  if debias:
    # The weight of the initial values is momentum^t: take it out, and divide by the rest.
    left = momentum**t
    return mean / (1 - left), (var - left * first_var) / (1 - left)
  return mean, var
