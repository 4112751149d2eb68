"""Statistics of each domain: domain-specific, auxiliary (AdvProp) and split batch normalization."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._apply import apply
from jaxbn._arguments import check_layer, valid_elements
from jaxbn._choose import choose
from jaxbn._counts import divisor
from jaxbn._measure import abs_square
from jaxbn._names import by_our_names, shown
from jaxbn._share import of_equal_weights, share
from jaxbn._track import track
from jaxbn._types import Array, Axes, Chosen, Inputs, Moments, Numeric, Plan, RunningStats
from jaxbn.variants._examples import indices, moments_of_examples, row_of_each, table

__all__ = ["domain_batch_norm", "split_domains"]


def __dir__() -> list[str]:
  return __all__


@by_our_names
def domain_batch_norm(
  x: Array,
  scale: Array | None,
  bias: Array | None,
  state: RunningStats,
  *,
  domains: Array,
  use_running_average: bool,
  axis: int | Sequence[int] = -1,
  momentum: Numeric | None = 0.99,
  epsilon: float = 1e-5,
  mask: Array | None = None,
  weights: Array | None = None,
  masked_value: float | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  use_fast_variance: bool = True,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
  detach_stats: bool = False,
  activation: Callable[[jax.Array], jax.Array] | None = None,
  residual: Array | None = None,
  dtype: Any = None,
) -> tuple[jax.Array, RunningStats]:
  r"""Batch normalization in which each example belongs to a domain with statistics of its own.

      training     m_d = sync(moments(x_i of domain d))            for every domain d
                   y_i = normalize(x_i, m_d.mean, m_d.var)         with d the domain of example i
                   new_state_d = update(state_d, m_d)              unchanged where d is absent
      evaluation   y_i = normalize(x_i, state_d.mean, state_d.var)

  With a scale and a bias for each domain it is domain-specific batch normalization (Chang et al.
  2019, "Domain-specific batch normalization for unsupervised domain adaptation") or AdvProp's
  auxiliary batch norm (Xie et al. 2020, "Adversarial examples improve image recognition": clean
  examples are domain 0, adversarial ones 1, and evaluation takes `domains=0`). With shared ones and
  `split_domains` it is split batch norm (Zając, Żołna & Jastrzębski 2019, for labelled and
  unlabelled data).

  x is read once, however many domains there are: first come the moments of each example, then those
  of the examples of a domain together. All domains share one all-reduce.

  Args:
    x: real or complex array, with its examples along the first axis that is not a channel's.
    scale: of the channels' shape, for all domains; or (domains, channels), or None for 1.
    bias: likewise, or None for 0.
    state: with leaves of shape (domains, channels): jaxbn.init((domains, channels)).
    domains: each example's domain, integers of shape (N,), or one for all. One that is out of range
      is refused where its value can be seen; where it cannot, under jit, its example is NaN and
      enters no statistics. That of an example masked as a whole is not looked at.
    use_running_average: False in training, True in evaluation; a Python bool.
    axis, epsilon, activation, residual, dtype: as in `normalize`.
    momentum, debias, unbiased, skip_nonfinite: as in `update`, domain by domain.
    mask, weights: as in `moments`.
    masked_value: as in `normalize`.
    axis_name, axis_index_groups: as in `batch_norm`. A device need not have all domains.
    use_fast_variance: as in `batch_norm`.
    detach_stats: as in `batch_norm`.

  Returns:
    (y, new_state): y of x's shape; new_state with the leaves of state, in evaluation state itself.

  Raises:
    TypeError: domains that are not integers; a state of another type; and as `batch_norm`.
    ValueError: a state, a scale or a bias of another shape; domains not of shape (N,) or out of
      range; and as `batch_norm`.

  >>> import jax.numpy as jnp, jaxbn
  >>> from jaxbn.variants.domain import domain_batch_norm
  >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
  >>> state, domains = jaxbn.init((2, 1), momentum=0.0), jnp.array([0, 0, 1, 1])
  >>> y, state = domain_batch_norm(
  ...   x, None, None, state, domains=domains, use_running_average=False, momentum=0.0
  ... )
  >>> y.ravel().round(3), state.mean.ravel()
  (Array([-1.,  1., -1.,  1.], dtype=float32), Array([ 2., 20.], dtype=float32))
  """
  given = {name: value for name, value in locals().items() if name != "domains"}
  x = _checks.inexact(x)
  axes = _checks.split_axes(x.ndim, axis)
  state = _checks.running_stats(state)
  rows = _number_of_domains(state, x, axes)
  valid, _ = valid_elements(x, mask, weights)
  domain = indices("domains", domains, rows, x, axes, valid)
  scale = _parameter("scale", scale, rows, domain, x, axes)
  bias = _parameter("bias", bias, rows, domain, x, axes)
  plan, inputs, tracking = check_layer(**given | {"scale": scale, "bias": bias})
  _checks.has_count(state, tracking.momentum, tracking.debias)

  def normalize(stats: Any) -> jax.Array:
    mean, var = (row_of_each(jnp.asarray(v), domain, x, axes) for v in (stats.mean, stats.var))
    return apply(plan, inputs, Chosen(mean, var))

  if plan.use_running_average:
    return normalize(state), state
  batch = _by_domain(plan, inputs, domain, rows)
  if plan.axis_name is not None:
    batch = share(plan, batch)
  y = normalize(choose(plan, x, None, batch, state))
  if plan.count_by_worth:
    squared = inputs._replace(weight=jnp.square(inputs.weight))
    squares = _by_domain(plan, squared, domain, rows).count
    batch = batch._replace(count=of_equal_weights(plan, batch.count, squares))
  return y, track(state, batch, tracking)


def of_layer(
  *args: Any, virtual_batch_size: int | str | None, choose: Any, **options: Any
) -> tuple[jax.Array, RunningStats]:
  """`domain_batch_norm`, for a layer that has two more options."""
  if choose is not None:
    raise ValueError(
      f"choose={shown(choose)} in a layer with domains: their statistics are what it normalizes "
      "by: leave it out."
    )
  if virtual_batch_size is not None:
    raise ValueError(
      f"virtual_batch_size={shown(virtual_batch_size)} in a layer with domains: both say which "
      "examples share their statistics: leave one of them out."
    )
  return domain_batch_norm(*args, **options)


def split_domains(number: int, parts: int) -> jax.Array:
  """The domains of a batch in consecutive parts of equal size, as `domain_batch_norm` takes them.

  On several devices each has all parts: pass the number of examples of one device.

  Args:
    number: of examples.
    parts: how many there are; divides the number.

  Returns:
    Integers of shape (number,): 0 for the examples of the first part, and so on.

  Raises:
    ValueError: parts that do not divide the number.

  >>> from jaxbn.variants.domain import split_domains
  >>> split_domains(6, 2).tolist()
  [0, 0, 0, 1, 1, 1]
  """
  number, parts = operator.index(number), operator.index(parts)
  if parts < 1 or number % parts:
    raise ValueError(
      f"parts={parts} do not divide number={number}: all parts have the same size; where they have "
      "not, write the domains out, for instance with jnp.repeat."
    )
  return jnp.asarray(np.repeat(np.arange(parts, dtype=np.int32), number // parts))


def _number_of_domains(state: Any, x: jax.Array, axes: Axes) -> int:
  shape, channels = jnp.shape(state.mean), axes.shape(x)
  if shape[1:] != channels or not shape or jnp.shape(state.var) != shape:
    raise ValueError(
      f"state has a mean of shape {shape} and a var of shape {jnp.shape(state.var)}, but x of "
      f"shape {x.shape} has channels of shape {channels}: each has one row more for every domain: "
      f"make it with jaxbn.init((domains, {', '.join(map(str, channels))}))."
    )
  return shape[0]


def _parameter(
  name: str, value: Any, rows: int, domain: jax.Array, x: jax.Array, axes: Axes
) -> jax.Array | None:
  """A parameter of all domains as it is, or each example's from a table."""
  if value is None or jnp.shape(value) == axes.shape(x):
    return value
  return row_of_each(table(name, value, rows, x, axes), domain, x, axes)


def _by_domain(plan: Plan, inputs: Inputs, domain: jax.Array, rows: int) -> Moments:
  """Measure: a table of this device's moments, one row for each domain."""
  own = moments_of_examples(plan, inputs)
  return jax.vmap(lambda d: _merge_examples(own, domain == d))(jnp.arange(rows))


def _merge_examples(own: Moments, member: jax.Array) -> Moments:
  """`merge` of the examples along the first axis, of those that are members.

  mean = sum_i n_i mean_i / N and var = sum_i n_i (var_i + |mean_i - mean|^2) / N: no term cancels.
  """
  member = jnp.expand_dims(member, tuple(range(1, own.mean.ndim)))
  # A select of all three: an example that is not finite is its own domain's matter.
  n, means, variances = (jnp.where(member, v, 0) for v in own)
  count = jnp.sum(n, 0, dtype=n.dtype)
  share = jnp.asarray(n, variances.dtype) / jnp.asarray(divisor(count, variances.dtype))[None]
  mean = jnp.sum(share * means, 0)
  return Moments(count, mean, jnp.sum(share * (variances + abs_square(means - mean[None])), 0))
