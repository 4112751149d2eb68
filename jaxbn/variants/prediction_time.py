"""Prediction-time batch normalization: the statistics of what is predicted, or partly so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._batch_norm import batch_norm
from jaxbn._names import by_our_names, shown
from jaxbn._types import Array, Chosen, Moments, Numeric, RunningStats

__all__ = ["interpolate", "prediction_time_batch_norm"]


def __dir__() -> list[str]:
  return __all__


# Nothing is tracked, so that the number of updates so far, which some ways to track ask for, may be
# unknown here.
NOT_TRACKED: dict[str, Any] = {"momentum": 0.99, "debias": False}


@by_our_names
def prediction_time_batch_norm(
  x: Array,
  scale: Array | None,
  bias: Array | None,
  state: RunningStats,
  *,
  prior: Numeric = 0.0,
  **options: Any,
) -> jax.Array:
  r"""Evaluation by the statistics of the batch that is predicted; nothing is tracked.

  With n examples in the batch, and the running statistics counting for N pseudo-examples:

      mean = N / (N + n) running_mean + n / (N + n) batch_mean
      var  = N / (N + n) running_var  + n / (N + n) batch_var

  (Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
  adaptation"). N = 0 is prediction-time batch normalization (Nado et al. 2020, "Evaluating
  prediction-time batch normalization for robustness under covariate shift"), N = inf the usual
  evaluation. Under a shift of the inputs this recovers much of what is lost; without one it costs a
  little, the more the smaller the batch, and what is predicted for an example depends on those
  beside it: a batch of one class misleads it.

  Args:
    x: real or complex array, with its examples along the first axis that is not a channel's.
    scale, bias, state: as in `batch_norm`; the state is needed.
    prior: N, at least 0, may be infinite; 16 or so for small batches.
    options: as in `batch_norm`, beside `use_running_average` and `choose`: masks, axis_name and
      others. With them n are the valid examples of all devices.

  Returns:
    y, of x's shape.

  Raises:
    TypeError: a state of another type; a prior that is not a number.
    ValueError: a negative prior; and what `batch_norm` refuses.

  >>> import jax.numpy as jnp, jaxbn
  >>> from jaxbn.variants.prediction_time import prediction_time_batch_norm
  >>> x = jnp.array([[9.0], [11.0]])  # shifted by 10 from what it was trained with
  >>> y = prediction_time_batch_norm(x, None, None, jaxbn.init(1))
  >>> y.ravel().round(2)
  Array([-1.,  1.], dtype=float32)
  """
  state = _checks.running_stats(state)
  choose = interpolate(prior, elements_per_example(x, options.get("axis", -1)))
  _checks.momentum_in_range(options.get("momentum", 0.99), options.get("debias", False))
  options |= NOT_TRACKED
  return batch_norm(x, scale, bias, state, use_running_average=False, choose=choose, **options)[0]


def interpolate(
  prior: Numeric, elements: Numeric = 1
) -> Callable[[Moments, RunningStats | None], Chosen]:
  """The same choice of statistics by itself, for `batch_norm(choose=)`.

  Args:
    prior: the pseudo-examples that the running statistics count for, as above.
    elements: how many elements of a channel an example has: height times width of an image.

  Returns:
    A function of the batch's moments and the state.

  Raises:
    TypeError: a prior that is not a number.
    ValueError: a negative prior.

  >>> import jax.numpy as jnp, jaxbn
  >>> from jaxbn.variants.prediction_time import interpolate
  >>> batch = jaxbn.moments(jnp.array([[9.0], [11.0]]))
  >>> interpolate(prior=2.0)(batch, jaxbn.init(1)).mean
  Array([5.], dtype=float32)
  """
  _checks.scalar("prior", prior)
  if _checks.concrete(prior) and not float(prior) >= 0:
    raise ValueError(
      f"prior={shown(prior)} is out of range: it is a number of examples, 0 for the batch's "
      "statistics alone, jnp.inf for the running ones."
    )

  def choose(batch: Moments, state: RunningStats | None) -> Chosen:
    state = _checks.running_stats(state)
    n = jnp.asarray(batch.count, batch.var.dtype)
    total = n + prior * elements
    share = n / jnp.where(total > 0, total, 1)

    def between(source: Array, own: jax.Array) -> jax.Array:
      # A batch that does not count, whether there is none or the prior is infinite, may be NaN.
      return (1 - share) * source + share * jnp.where(share > 0, own, 0)

    return Chosen(between(state.mean, batch.mean), between(state.var, batch.var))

  return choose


def elements_per_example(x: Array, axis: Any) -> int:
  """How many elements each channel of an example has."""
  x = _checks.inexact(x)
  return math.prod(x.shape[a] for a in _checks.split_axes(x.ndim, axis).reduced[1:])
