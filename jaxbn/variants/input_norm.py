r"""Batch normalization of what comes from the input of a recurrent layer, of whole sequences.

Frame by frame or over all frames (Laurent et al. 2015, "Batch Normalized Recurrent Neural
Networks"; Amodei et al. 2015, "Deep Speech 2", section 3.2). Between time steps nothing is
normalized: that is `jaxbn.variants.recurrent`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import Moments, RunningStats, _checks, batch_norm, moments, normalize, sync, update
from jaxbn._names import by_our_names, shown
from jaxbn._types import Array, Numeric
from jaxbn.variants._cells import Options, options, require_lengths, require_shape, where_valid
from jaxbn.variants.recurrent import GRU, LSTM

__all__ = ["InputNormParams", "input_norm_rnn", "sequence_norm"]


def __dir__() -> list[str]:
  return __all__


GATES = {"simple": 1, "lstm": LSTM.gates, "gru": GRU.gates}


@by_our_names
def sequence_norm(
  x: Array,
  scale: Array | None = None,
  bias: Array | None = None,
  state: RunningStats | None = None,
  *,
  use_running_average: bool,
  frame_wise: bool = False,
  mask: Array | None = None,
  momentum: Numeric | None = 0.99,
  epsilon: float = 1e-5,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
) -> tuple[jax.Array, RunningStats | None]:
  r"""Batch normalization of sequences, over the frames that exist.

      sequence-wise   mean_k = sum_{b,t} x_{btk} / N,       N all frames of all sequences
      frame-wise      mean_tk = sum_b x_{btk} / N_t,        N_t those of step t

  and the variances likewise (Laurent et al. 2015; the first is also that of Amodei et al. 2015,
  section 3.2). It is meant for what comes from the input, W_x x, before the recurrence.

  Args:
    x: (batch, time, features).
    scale: gamma, (features,), or None for 1.
    bias: beta, (features,), or None for 0.
    state: running statistics: sequence-wise `jaxbn.init(features)`; frame-wise
      `jaxbn.init((max_length, features))`, of which the last row serves all later steps and, in
      training, follows them one after the other. None in training: nothing is tracked.
    use_running_average: False in training, True in evaluation; a Python bool.
    frame_wise: whether every time step has statistics of its own.
    mask: boolean, (batch, time): which frames exist; for seq_lengths,
      jnp.arange(time) < seq_lengths[:, None].
    epsilon: added to the variances.
    momentum, debias, unbiased, skip_nonfinite: as in `jaxbn.update`.
    axis_name, axis_index_groups: as in `jaxbn.sync`.

  Returns:
    (y, new_state): y of x's shape; new_state with the leaves of state.

  Raises:
    TypeError, ValueError: x that has not three axes; what `jaxbn.batch_norm` refuses.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import input_norm
  >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [jnp.nan]]])  # the second sequence is shorter
  >>> mask = jnp.array([[True, True], [True, False]])
  >>> y, _ = input_norm.sequence_norm(x, use_running_average=False, mask=mask)
  >>> y[..., 0].round(2)
  Array([[-1.22,  0.  ],
         [ 1.22,  0.  ]], dtype=float32)
  """
  x = _checks.inexact(x)
  if x.ndim != 3:
    raise ValueError(f"x has shape {x.shape}; sequences have three axes: batch, time, features.")
  valid = None
  if mask is not None:
    valid = _checks.boolean_mask(mask, x[..., 0])[..., None]
  tracking: dict[str, Any] = {"unbiased": unbiased, "skip_nonfinite": skip_nonfinite}
  tracking |= {"momentum": momentum, "debias": debias}
  if _checks.static_bool("frame_wise", frame_wise):
    how = options(use_running_average, epsilon, axis_name, axis_index_groups, **tracking)
    return _frame_wise(how, x, scale, bias, state, valid)
  return batch_norm(
    x,
    scale,
    bias,
    state,
    use_running_average=use_running_average,
    epsilon=epsilon,
    mask=valid,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    **tracking,
  )


class InputNormParams(NamedTuple):
  """The parameters of a recurrent layer of H units whose input only is normalized.

  G is 1 for a simple layer, 4 for an LSTM (i, f, g, o), 3 for a GRU (r, z, n).

  Attributes:
    input_kernel: of shape (features of x, G H).
    hidden_kernel: of shape (H, G H).
    bias: (G H,).
    input_scale: (G H,).
  """

  input_kernel: jax.Array
  hidden_kernel: jax.Array
  bias: jax.Array
  input_scale: jax.Array


@by_our_names
def input_norm_rnn(
  params: InputNormParams,
  state: RunningStats | None,
  x: Array,
  *,
  use_running_average: bool,
  kind: str = "lstm",
  activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
  frame_wise: bool = False,
  seq_lengths: Array | None = None,
  reverse: bool = False,
  momentum: Numeric | None = 0.99,
  epsilon: float = 1e-5,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
) -> tuple[jax.Array, RunningStats | None]:
  r"""A recurrent layer whose input-to-hidden product is normalized, of whole sequences.

      simple   h_t = activation(BN(W_x x_t; gamma) + W_h h_{t-1} + b)

  (Amodei et al. 2015, "Deep Speech 2", section 3.2), and the gates of an LSTM (Laurent et al. 2015)
  or a GRU likewise. The product of all steps is taken and normalized at once, by `sequence_norm`,
  before the recurrence.

  Args:
    params: InputNormParams.
    state: as in `sequence_norm`, with G H features.
    x: (batch, time, features).
    use_running_average: False in training, True in evaluation; a Python bool.
    kind: "simple", "lstm" or "gru".
    activation: of the simple kind; in Deep Speech 2 ReLU, cut off at 20.
    frame_wise: as in `sequence_norm`.
    seq_lengths: integers, (batch,): how many steps of each sequence exist; what follows is padding:
      it enters no statistic, may be NaN, and the state stays as it was.
    reverse: from the last step that exists to the first; y is in x's order.
    epsilon: added to the variances.
    momentum, debias, unbiased, skip_nonfinite: as in `jaxbn.update`.
    axis_name, axis_index_groups: as in `jaxbn.sync`.

  Returns:
    (y, new_state): y of shape (batch, time, H).

  Raises:
    ValueError: another kind; shapes that do not fit each other.
    TypeError, ValueError: as in `sequence_norm`.

  >>> import jax, jax.numpy as jnp, jaxbn
  >>> from jaxbn.variants import input_norm
  >>> w_x, w_h = jnp.ones((2, 3)), jnp.eye(3)
  >>> params = input_norm.InputNormParams(w_x, w_h, jnp.zeros(3), jnp.ones(3))
  >>> x = jax.random.normal(jax.random.key(0), (8, 5, 2))
  >>> y, state = input_norm.input_norm_rnn(
  ...   params, jaxbn.init(3), x, use_running_average=False, kind="simple"
  ... )
  >>> y.shape
  (8, 5, 3)
  """
  x = _checks.inexact(x)
  if x.ndim != 3:
    raise ValueError(f"x has shape {x.shape}; sequences have three axes: batch, time, features.")
  features = len(params.hidden_kernel)
  width = channels(kind, features)
  require_shape("params.input_kernel", params.input_kernel, (x.shape[-1], width))
  require_shape("params.hidden_kernel", params.hidden_kernel, (features, width))
  ends = require_lengths(seq_lengths, x.shape[:1])
  mask = None if ends is None else jnp.arange(x.shape[1])[None] < ends[:, None]
  x = x if mask is None else jnp.where(mask[..., None], x, 0)
  products, state = sequence_norm(
    x @ params.input_kernel,
    params.input_scale,
    params.bias,
    state,
    use_running_average=use_running_average,
    frame_wise=frame_wise,
    mask=mask,
    momentum=momentum,
    epsilon=epsilon,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    debias=debias,
    unbiased=unbiased,
    skip_nonfinite=skip_nonfinite,
  )

  def simple(h: jax.Array, hidden: jax.Array, given: jax.Array) -> tuple[jax.Array, None]:
    return activation(given + hidden), None

  recur = {"simple": simple, "lstm": LSTM.recur, "gru": GRU.recur}[kind]

  def step(states: Any, inputs: Any) -> tuple[Any, jax.Array]:
    given, valid = inputs
    state, gate = recur(states[0], states[-1] @ params.hidden_kernel, given)
    new = [state] if gate is None else [state, gate * jnp.tanh(state)]
    states = [where_valid(valid, *pair) for pair in zip(new, states, strict=True)]
    return states, states[-1]

  # From x, so that under shard_map the carry varies over devices from the start.
  zeros = jnp.zeros_like(products[:, 0, :features])
  start = [zeros, zeros] if kind == "lstm" else [zeros]
  there = None if mask is None else jnp.moveaxis(mask, 1, 0)[..., None]
  inputs = jnp.moveaxis(products, 1, 0), there
  _, ys = lax.scan(step, start, inputs, reverse=reverse)
  return jnp.moveaxis(ys, 0, 1), state


def channels(kind: str, features: int) -> int:
  """G H: how many numbers come from the input in each step."""
  if kind not in GATES:
    raise ValueError(f"kind={shown(kind)}: it is one of {', '.join(map(repr, GATES))}.")
  return GATES[kind] * features


def _frame_wise(
  how: Options,
  x: Array,
  scale: Array | None,
  bias: Array | None,
  state: RunningStats | None,
  valid: Array | None,
) -> tuple[jax.Array, RunningStats | None]:
  """Every step of x by statistics of its own."""
  axis, (_, steps, features) = (1, 2), x.shape

  def apply(mean: jax.Array, var: jax.Array) -> jax.Array:
    expand = functools.partial(jnp.broadcast_to, shape=(steps, features))
    s, b = (None if a is None else expand(a) for a in (scale, bias))
    return normalize(x, mean, var, s, b, epsilon=how.epsilon, axis=axis, mask=valid)

  if state is not None:
    state = _checks.running_stats(state)
    require_shape("state.mean", state.mean, (len(state.mean), features))
  rows = jnp.arange(steps) if state is None else jnp.minimum(jnp.arange(steps), len(state.mean) - 1)
  if how.use_running_average:
    if state is None:
      raise ValueError("use_running_average=True needs the statistics: pass state.")
    return apply(state.mean[rows], state.var[rows]), state
  batch = moments(x, axis=axis, mask=valid)
  if how.axis_name is not None:
    batch = sync(batch, how.axis_name, how.axis_index_groups)
  y = apply(batch.mean, batch.var)
  return y, None if state is None else _followed(how, state, batch)


def _followed(how: Options, state: RunningStats, batch: Moments) -> RunningStats:
  """The rows after the steps of a batch; the last one after each of the later steps."""
  steps, length = len(batch.mean), len(state.mean)
  batch = batch._replace(count=jnp.broadcast_to(batch.count, (steps, 1)))
  with_row = min(steps, length)
  first = jax.tree.map(lambda leaf: leaf[:with_row], (state, batch))
  rows = update(*first, **how.tracking)
  state = jax.tree.map(lambda old, new: old.at[:with_row].set(new), state, rows)
  if steps <= length:
    return state
  later = jax.tree.map(lambda leaf: leaf[length:], batch)

  def follow(last: RunningStats, batch: Moments) -> tuple[RunningStats, None]:
    new = update(last, batch, **how.tracking)
    return jax.tree.map(lambda old, new: new.astype(old.dtype), last, new), None

  last, _ = lax.scan(follow, jax.tree.map(lambda leaf: leaf[-1], state), later)
  return jax.tree.map(lambda rows, row: rows.at[-1].set(row), state, last)
