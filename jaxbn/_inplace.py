"""Keeping the output instead of the input: In-Place Activated BatchNorm.

Rota Bulo, Porzi & Kontschieder 2018, "In-Place Activated BatchNorm for Memory-Optimized Training of
DNNs". The next layer keeps y for its own derivative anyway; where activation and scale can be
undone, x - mean = (act^-1(y) - bias) / k, and x need not be kept beside it. The tangents are those
of `_rule.py` and `_moments.py`, of that centered x, whose mean is zero.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._moments import Elements, How, Moments, d_mean_and_var, measure, sum_over_devices
from jaxbn._rule import Elementwise, Form, Given, apply, d_apply, nonzero, recomputing, slope


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def normalize_keeping_output(
  form: Form, inverse: Elementwise, how: How, given: Given, weight: Any, pivot: Any
) -> tuple[jax.Array, Moments]:
  """y, normalized by the statistics of the batch (of all devices), and these."""
  elements = Elements(given.x, given.wide, given.valid, weight)
  batch = measure(how, elements, shared_pivot=pivot)
  batch = batch._replace(count=jnp.asarray(batch.count))
  return apply(form, given, batch.mean, batch.var), batch


@functools.partial(normalize_keeping_output.defjvp, symbolic_zeros=True)
def _jvp(
  form: Form, inverse: Elementwise, how: How, primals: Any, tangents: Any
) -> tuple[Any, Any]:
  given, weight, _ = primals
  d_given, d_weight, _ = nonzero(tangents)

  @recomputing
  def tangent(kept: Given, weight: Any, batch: Moments, d_given: Given, d_weight: Any) -> Any:
    mean = jnp.zeros_like(batch.mean)
    centered = kept._replace(x=_centered(form, inverse, kept, batch.var))
    around = (None, mean, batch.var)
    d_moments = _d_moments(how, centered, weight, batch.count, around, d_given, d_weight)
    # Apart from the sums, as everywhere: see `_rule.py`.
    centered = kept._replace(x=_centered(form, inverse, kept, lax.optimization_barrier(batch.var)))
    values = mean, batch.var, d_given, d_moments.mean, d_moments.var
    # x is worth sharing where it has to be computed: it was left out to save memory.
    d_y = d_apply(form, centered, *values, sums_apart=False)
    return d_y, d_moments

  y, batch = normalize_keeping_output(form, inverse, how, *primals)
  kept = given._replace(x=y, wide=None)
  d_y, d_batch = tangent(kept, weight, batch, d_given, d_weight)
  if not jnp.issubdtype(batch.count.dtype, jnp.inexact):
    d_batch = d_batch._replace(count=np.zeros(batch.count.shape, jax.dtypes.float0))
  return (y, batch), (d_y, d_batch)


def _centered(form: Form, inverse: Elementwise, kept: Given, var: jax.Array) -> jax.Array:
  """(act^-1(y) - bias) / k, with y in the place of x."""
  k, _ = slope(kept, var)
  y = inverse(kept.x.astype(k.dtype))
  if kept.bias is not None:
    y = y - form.axes.expand(kept.bias)
  return y / form.axes.expand(k)


def _d_moments(
  how: How, kept: Given, weight: Any, count: Any, values: Any, d_given: Given, d_weight: Any
) -> Moments:
  """The tangents of the moments of all devices, by one all-reduce of what each contributes."""
  axes, real = how.axes, values[2].dtype
  d_count = jnp.zeros(count.shape, real)
  if d_weight is not None:
    total = jnp.sum(jnp.broadcast_to(d_weight, kept.x.shape), axes.reduced)
    # A count has one number where all channels share it, and so weigh the same.
    d_count = total[tuple(map(slice, count.shape))] if count.ndim else total.ravel()[0]
  elements = Elements(kept.x, None, kept.valid, weight)
  d_elements = Elements(None, d_given.wide, None, d_weight)
  sums = [*d_mean_and_var(how, elements, count, values, d_elements, d_count), d_count]
  if how.axis_name is not None:
    if d_weight is None:
      sums[:2] = sum_over_devices(sums[:2], how.axis_name, how.axis_index_groups)
    else:
      sums = sum_over_devices(sums, how.axis_name, how.axis_index_groups)
  return Moments(sums[2], sums[0], sums[1])
