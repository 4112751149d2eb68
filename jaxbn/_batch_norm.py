"""The whole layer as one pure function: measure, share, choose, apply, track."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp

from jaxbn._apply import apply
from jaxbn._arguments import check_layer, check_state
from jaxbn._choose import choose as choose_statistics
from jaxbn._measure import measure
from jaxbn._names import by_our_names
from jaxbn._share import share, worth
from jaxbn._track import track
from jaxbn._types import (
  Array,
  Choose,
  Chosen,
  Inputs,
  Moments,
  Numeric,
  Options,
  Plan,
  RunningStats,
)
from jaxbn._virtual import in_groups


@overload
def batch_norm(
  x: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  state: None = None,
  *,
  use_running_average: bool,
  **options: Unpack[Options],
) -> tuple[jax.Array, None]: ...


@overload
def batch_norm(
  x: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  state: RunningStats = ...,
  *,
  use_running_average: bool,
  **options: Unpack[Options],
) -> tuple[jax.Array, RunningStats]: ...


@overload
def batch_norm(
  x: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  state: RunningStats | None = None,
  *,
  use_running_average: bool,
  **options: Unpack[Options],
) -> tuple[jax.Array, RunningStats | None]: ...


@by_our_names
def batch_norm(
  x: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  state: RunningStats | None = None,
  *,
  use_running_average: bool,
  axis: int | Sequence[int] = -1,
  momentum: Numeric | None = 0.99,
  epsilon: float = 1e-5,
  mask: Array | None = None,
  weights: Array | None = None,
  masked_value: float | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  virtual_batch_size: int | str | None = None,
  use_fast_variance: bool = True,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
  detach_stats: bool = False,
  choose: Choose | None = None,
  activation: Callable[[jax.Array], jax.Array] | None = None,
  residual: Array | None = None,
  dtype: Any = None,
) -> tuple[jax.Array, RunningStats | None]:
  r"""Batch normalization (Ioffe & Szegedy 2015, Algorithm 1 in training, 2 in evaluation).

      training     m = sync(moments(x))
                   y = normalize(x, m.mean, m.var)           (or by what `choose` makes of m)
                   new_state = update(state, m)
      evaluation   y = normalize(x, state.mean, state.var)

  each function as documented on its own. Pure: works under jit, vmap, scan, remat, pmap, shard_map,
  export for any batch size and every derivative. Gradients flow through the batch's statistics,
  across devices as well. jax.experimental.jet alone does not work: it fails at every custom
  derivative, that of jax.nn.relu too; nest jax.jvp instead.

  Accuracy: outputs are right to about u |mean|/std standard deviations (u = 6e-8 in float32) plus,
  for the variance, u ((mean - p)/std)^2 relative, where p lies among the batch (on CPUs, within 2
  std of the mean, if not among the batch). Devices of axis_name share by one all-reduce from which
  no digit cancels, so that the same holds for all of them together. On accelerators, bfloat16 x
  with a state has p = 0: up to |mean|/std of 150 that is below the rounding of y, and beyond it x
  itself is off by half a standard deviation.

  One element in a channel, such as a last batch of one example without positions, is legal in
  training: its variance is 0, y is bias whatever x is, x gets no gradient, and the running variance
  moves towards 0. Drop such a batch, or merge it with the one before.

  Args:
    x: real or complex array of any rank.
    scale: gamma, of the shape of x's channels, or None for 1; where it differs between examples, as
      in conditional batch normalization, with as many axes as x, each of size 1 or x's.
    bias: beta, likewise, or None for 0.
    state: running statistics, from `init`. None in training: nothing is tracked.
    use_running_average: False in training, True in evaluation; known when tracing, as all flags
      are, but not necessarily a Python bool: 0, 1 and concrete arrays will do.
    axis: the axis or axes of the channels.
    momentum: the share of the old running value that is kept; PyTorch's momentum is 1 minus it.
    debias, unbiased, skip_nonfinite: as in `update`; with unbiased, weights of an integer
      dtype are counts, how often an element is there, and those of a floating dtype say how far it
      can be relied on (that takes one more small all-reduce).
    epsilon: added to the variance.
    mask, weights: as in `moments`: which elements exist, and how much each counts.
    masked_value: what y holds in positions that do not exist (masked, or of weight 0), as in
      `normalize`.
    axis_name: name (or names) of the axis of pmap, shard_map or vmap whose members share
      statistics. Under jit with sharded arrays none is needed: the batch is the whole batch.
    axis_index_groups: as in `sync`.
    virtual_batch_size: V: the global batch (over all devices of axis_name, in their order; without
      axis_name that of the whole array, under jit however it is sharded) is cut along the first
      axis that is no channel's into consecutive groups of V examples, each normalized in training
      by statistics of its own (ghost batch norm, Hoffer et al. 2017). A device that holds more than
      V splits them, without communication; where it holds fewer, neighbours share. The running
      statistics track the plain mean of the groups' means and variances (`unbiased`: each with its
      own count), over the groups that are not empty, of all devices: one more small all-reduce.
      "device": V is what each device of axis_name holds. None: one group of all.
    use_fast_variance: False takes a second pass over x.
    detach_stats: treat the statistics as constants in gradients. It exists to show what happens
      then (Ioffe & Szegedy 2015, section 2): training fails to converge as it should.
    choose: which statistics normalize in training, where it is not the batch's own: a function of
      the batch's `Moments` (of all devices) and the state (None if there is none), which gives a
      `Chosen`. With virtual_batch_size both have one more axis, of groups. The running statistics
      track the batch's own. What is beside the batch in `jaxbn.variants` goes through here.
    activation, residual: as in `normalize`: y = activation(normalized x + residual).
    dtype: of y; default, what x, scale, bias and residual promote to.

  Returns:
    (y, new_state): y of x's shape; new_state with the leaves of state, in evaluation state itself.

  Raises:
    TypeError, ValueError: as the functions named above; state missing in evaluation;
      axis_index_groups without axis_name, or with virtual_batch_size; a virtual_batch_size that
      does not fit the batch, or "device" without axis_name; a flag that is traced, or
      is neither True nor False.

  >>> import jax, jax.numpy as jnp, jaxbn
  >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (64, 3))
  >>> state = jaxbn.init(3)
  >>> y, state = jaxbn.batch_norm(x, jnp.ones(3), jnp.zeros(3), state, use_running_average=False)
  >>> jnp.allclose(y.mean(0), 0, atol=1e-6) and jnp.allclose(y.std(0), 1, atol=1e-5)
  Array(True, dtype=bool)
  """
  plan, inputs, tracking = check_layer(**locals())
  state = check_state(state, plan, inputs.x, tracking)
  if plan.use_running_average and state is not None:
    return apply(plan, inputs, Chosen(state.mean, state.var)), state

  def normalize_by_batch(
    plan: Plan, inputs: Inputs, state: RunningStats | None
  ) -> tuple[jax.Array, Moments]:
    batch = measure(plan, inputs)
    if plan.axis_name is not None:
      batch = share(plan, batch)
    chosen = Chosen(batch.mean, batch.var)
    if choose is not None or plan.detach_stats:
      chosen = choose_statistics(plan, inputs.x, choose, batch, state)
    y = apply(plan, inputs, chosen)
    return y, worth(plan, inputs, batch) if plan.count_by_worth else batch

  # bfloat16 cannot tell apart what a sum in float32 around 0 would confuse: see docs/design.md.
  plan = plan._replace(sample_pivot=state is None or inputs.x.dtype != jnp.bfloat16)
  if plan.groups is None:
    y, batch = normalize_by_batch(plan, inputs, state)
  else:
    # The groups' variances are made unbiased one by one, before their mean.
    y, batch = in_groups(normalize_by_batch, tracking.unbiased, plan, inputs, state)
    tracking = tracking._replace(unbiased=False)
  return y, None if state is None else track(state, batch, tracking)
