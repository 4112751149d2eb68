"""Each example normalized by a fixed reference batch and itself: virtual batch normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._apply import apply
from jaxbn._arguments import check_layer
from jaxbn._batch_norm import batch_norm
from jaxbn._measure import measure
from jaxbn._names import by_our_names
from jaxbn._share import merge, share
from jaxbn._types import Array, Chosen, Moments, RunningStats
from jaxbn.variants._examples import examples_axis

__all__ = ["normalize_reference", "reference_batch_norm"]


def __dir__() -> list[str]:
  return __all__


@by_our_names
def reference_batch_norm(
  x: Array,
  scale: Array | None,
  bias: Array | None,
  reference: Moments,
  *,
  axis: int | Sequence[int] = -1,
  epsilon: float = 1e-5,
  mask: Array | None = None,
  weights: Array | None = None,
  masked_value: float | None = None,
  use_fast_variance: bool = True,
  activation: Callable[[jax.Array], jax.Array] | None = None,
  residual: Array | None = None,
  dtype: Any = None,
) -> jax.Array:
  r"""Normalization of each example by the statistics of a reference batch and of itself.

      m_i = merge(reference, moments(x_i))                  for every example i
      y_i = normalize(x_i, m_i.mean, m_i.var, scale, bias)

  ("Virtual batch normalization": Salimans et al. 2016, section 3.5). With n examples in
  the reference batch, each of as many elements as x_i, that is, of means and of mean squares,
  n / (n + 1) times the reference's and 1 / (n + 1) times the example's. What becomes of an example
  depends on no other of its batch, in training as in evaluation: there are no running statistics,
  nothing to share between devices, and no difference between the two modes.

  The reference batch is the same throughout, but its activations change with the parameters: at
  every step run it through the network too, with `normalize_reference` in the place of each norm.
  Gradients flow through the reference as well; `jax.lax.stop_gradient` it where they shall not.

  This is not `batch_norm(virtual_batch_size=)`, which cuts the batch into groups ("ghost batches").

  Args:
    x: real or complex array, with its examples along the first axis that is not a channel's.
    scale: of the channels' shape, or with as many axes as x, or None for 1.
    bias: likewise, or None for 0.
    reference: moments of the reference batch, of the channels' shape. With count zero, examples are
      normalized by themselves alone.
    axis, epsilon, activation, residual, dtype: as in `normalize`.
    mask, weights: as in `moments`. An example masked as a whole has the reference's statistics.
    masked_value: as in `normalize`.
    use_fast_variance: False takes a second pass over x.

  Returns:
    y, of x's shape.

  Raises:
    TypeError: a reference that is not Moments; and as `batch_norm`.
    ValueError: a reference of another shape; x without an axis of examples; and as `batch_norm`.

  >>> import jax.numpy as jnp, jaxbn
  >>> from jaxbn.variants.reference import reference_batch_norm
  >>> reference = jaxbn.moments(jnp.array([[0.0], [2.0], [4.0]]))
  >>> reference_batch_norm(jnp.array([[2.0], [6.0]]), None, None, reference).round(3)
  Array([[0.   ],
         [1.342]], dtype=float32)
  """
  x = _checks.inexact(x)
  axes = _checks.split_axes(x.ndim, axis)
  examples_axis(x, axes)
  _checks.is_moments(reference)
  mean = _checks.channels("reference.mean", reference.mean, x, axes)
  var = _checks.channels("reference.var", reference.var, x, axes)
  # In the place of the state, for its leaves go to each example's choice in the right shape.
  as_state = RunningStats(mean, var, jnp.broadcast_to(reference.count, mean.shape))
  y, _ = batch_norm(
    x,
    scale,
    bias,
    as_state,
    use_running_average=False,
    virtual_batch_size=1,
    choose=_with_reference,
    axis=axis,
    epsilon=epsilon,
    mask=mask,
    weights=weights,
    masked_value=masked_value,
    use_fast_variance=use_fast_variance,
    activation=activation,
    residual=residual,
    dtype=dtype,
  )
  return y


@by_our_names
def normalize_reference(
  x: Array,
  scale: Array | None,
  bias: Array | None,
  *,
  axis: int | Sequence[int] = -1,
  epsilon: float = 1e-5,
  mask: Array | None = None,
  weights: Array | None = None,
  masked_value: float | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  use_fast_variance: bool = True,
  activation: Callable[[jax.Array], jax.Array] | None = None,
  residual: Array | None = None,
  dtype: Any = None,
) -> tuple[jax.Array, Moments]:
  """Normalization of the reference batch by its own statistics, which it returns as well.

      reference = sync(moments(x)),   y = normalize(x, reference.mean, reference.var, scale, bias)

  Args:
    x: the reference batch, at this layer.
    scale, bias, axis, epsilon, mask, weights, masked_value, use_fast_variance, activation,
      residual, dtype: as in `reference_batch_norm`.
    axis_name, axis_index_groups: as in `sync`, where devices hold parts of the reference batch.

  Returns:
    (y, reference), the latter for `reference_batch_norm`.

  Raises:
    TypeError, ValueError: as `batch_norm`.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants.reference import normalize_reference
  >>> y, reference = normalize_reference(jnp.array([[0.0], [2.0]]), None, None)
  >>> y.ravel().round(2), reference.mean
  (Array([-1.,  1.], dtype=float32), Array([1.], dtype=float32))
  """
  plan, inputs, _ = check_layer(state=None, use_running_average=False, **locals())
  reference = measure(plan, inputs)
  if plan.axis_name is not None:
    reference = share(plan, reference)
  return apply(plan, inputs, Chosen(reference.mean, reference.var)), reference


# The fields of a layer that have the name and the meaning of an argument.
_OPTIONS = ("axis", "epsilon", "use_fast_variance", "activation")


def of_layer(
  layer: Any,
  x: jax.Array,
  scale: Array | None,
  bias: Array | None,
  reference: Moments | None,
  mask: Array | None,
  weights: Array | None,
  **given: Any,
) -> tuple[jax.Array, Moments]:
  """What both kinds of layers do with the reference that they hold; without one x is it."""
  given = {name: getattr(layer, name) for name in _OPTIONS} | given
  given["weights"] = weights
  if mask is not None or weights is not None:
    given["masked_value"] = layer.masked_value
  if mask is not None:
    given["mask"] = jnp.asarray(mask, bool)  # any dtype will do in Flax
  if reference is None:
    y, found = normalize_reference(x, scale, bias, **given)
    count = jnp.broadcast_to(jnp.asarray(found.count, found.var.dtype), found.mean.shape)
    return y, found._replace(count=count)
  return reference_batch_norm(x, scale, bias, reference, **given), reference


def _with_reference(own: Moments, reference: Any) -> Chosen:
  whole = Moments(*(jnp.broadcast_to(v, own.mean.shape) for v in _in_order(reference)))
  both = merge(whole, own)
  return Chosen(both.mean, both.var)


def _in_order(reference: RunningStats) -> tuple[Any, Any, Any]:
  return reference.count, reference.mean, reference.var
