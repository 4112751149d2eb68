"""Conditional batch normalization: scale and bias of each example's class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._arguments import valid_elements
from jaxbn._batch_norm import batch_norm
from jaxbn._names import by_our_names, shown
from jaxbn._types import Array, Options, RunningStats
from jaxbn.variants._examples import indices, row_of_each, table

__all__ = ["conditional_batch_norm"]


def __dir__() -> list[str]:
  return __all__


@by_our_names
def conditional_batch_norm(
  x: Array,
  scales: Array | None,
  biases: Array | None,
  state: RunningStats | None = None,
  *,
  labels: Array,
  use_running_average: bool,
  **options: Unpack[Options],
) -> tuple[jax.Array, RunningStats | None]:
  r"""Batch normalization with a scale and a bias for each class.

      y_i = (x_i - mean) / sqrt(var + epsilon) * scales[labels_i] + biases[labels_i]

  (conditional instance normalization, Dumoulin, Shlens & Kudlur 2017, "A learned representation for
  artistic style", with the batch's statistics: de Vries et al. 2017, "Modulating early
  visual processing by language"; Miyato & Koyama 2018, "cGANs with projection discriminator"). The
  mean and the variance, and the running ones, are those of all classes together: where each class
  or source shall have its own, see `jaxbn.variants.domain`.

  Where scale and bias come from a network instead of a table (de Vries et al.; FiLM), pass them to
  `jaxbn.batch_norm` itself, with as many axes as x: scale[:, None, None, :] for images.

  Args:
    x: real or complex array, with its examples along the first axis that is not a channel's.
    scales: (classes, channels), or None for 1.
    biases: (classes, channels), or None for 0.
    state: as in `batch_norm`.
    labels: each example's class, integers of shape (N,), or one for all. One that is out of range
      is refused where its value can be seen, and makes that example NaN where it cannot, under jit;
      that of an example that is masked as a whole is not looked at.
    use_running_average: False in training, True in evaluation; a Python bool.
    options: as in `batch_norm`.

  Returns:
    (y, new_state), as `batch_norm`.

  Raises:
    TypeError: labels that are not integers.
    ValueError: neither scales nor biases; tables of other shapes; labels not of shape (N,) or out
      of range; and what `batch_norm` refuses.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants.conditional import conditional_batch_norm
  >>> x = jnp.array([[1.0], [3.0], [1.0], [3.0]])
  >>> scales, biases = jnp.array([[1.0], [10.0]]), jnp.array([[0.0], [5.0]])
  >>> labels = jnp.array([0, 0, 1, 1])
  >>> y, _ = conditional_batch_norm(x, scales, biases, labels=labels, use_running_average=False)
  >>> y.ravel().round(2)
  Array([-1.,  1., -5., 15.], dtype=float32)
  """
  axis, mask, weights = options.get("axis", -1), options.get("mask"), options.get("weights")
  scale, bias = of_class(x, scales, biases, labels, axis, mask, weights)
  return batch_norm(x, scale, bias, state, use_running_average=use_running_average, **options)


def of_class(
  x: Array,
  scales: Array | None,
  biases: Array | None,
  labels: Array,
  axis: int | Sequence[int],
  mask: Array | None,
  weights: Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
  """Each example's scale and bias, with as many axes as x."""
  x = _checks.inexact(x)
  axes = _checks.split_axes(x.ndim, axis)
  tables = {"scales": scales, "biases": biases}
  classes = [jnp.shape(t)[:1] for t in tables.values() if t is not None]
  if () in classes or not classes:
    given = ", ".join(f"{n}={shown(t)}" for n, t in tables.items())
    raise ValueError(f"{given}: pass a table of shape (classes, channels) for one at least.")
  rows = classes[0][0]
  checked = [None if t is None else table(n, t, rows, x, axes) for n, t in tables.items()]
  valid, _ = valid_elements(x, mask, weights)
  index = indices("labels", labels, rows, x, axes, valid)
  scale, bias = (None if t is None else row_of_each(t, index, x, axes) for t in checked)
  return scale, bias
