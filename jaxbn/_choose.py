"""Choose: which statistics normalize, where it is not simply the batch's or the running ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax

from jaxbn import _checks
from jaxbn._moments import Moments
from jaxbn._normalize import align
from jaxbn._rule import Form, Given, promoting, wide
from jaxbn._running import RunningStats

if TYPE_CHECKING:
  import chex


class Chosen(NamedTuple):
  """What normalizes: z = (x - mean) / sqrt(var + epsilon) * scale + bias.

  Each is of the shape of the channels, or broadcasts against x with as many axes as x. The layer's
  own scale and bias are applied to z.

  Attributes:
    mean: what is subtracted.
    var: real, not negative.
    scale: correction of z, such as r of batch renormalization, or None for 1.
    bias: likewise, such as d of batch renormalization, or None for 0.
  """

  mean: chex.Array
  var: chex.Array
  scale: chex.Array | None = None
  bias: chex.Array | None = None


Choose: TypeAlias = Callable[[Moments, RunningStats | None], Chosen]


def correct(
  choose: Choose, batch: Moments, state: RunningStats | None, form: Form, given: Given
) -> tuple[Given, jax.Array, jax.Array]:
  """What is chosen, with its correction folded into scale and bias."""
  chosen = choose(batch, state)
  if not isinstance(chosen, Chosen):
    raise TypeError(
      f"choose={choose!r} gave a {type(chosen).__name__}; it has to give a jaxbn.Chosen(mean, var)."
    )

  def checked(name: str) -> Any:
    value = getattr(chosen, name)
    if value is None and name in ("scale", "bias"):
      return None
    return _checks.parameter(f"{name} of choose", value, given.x, form.axes)

  mean, var, *correction = map(checked, Chosen._fields)
  # Wide, so that the two parts of a half-precision scale's gradient are added before it is rounded.
  parameters = wide(given.scale), wide(given.bias)
  scale, bias = _fold(*align(form.axes, given.x, *correction, *parameters))
  return given._replace(scale=scale, bias=bias), mean, var.real


@promoting
def _fold(r: Any, d: Any, scale: Any, bias: Any) -> tuple[Any, Any]:
  """The scale and the bias of (z r + d) scale + bias."""
  if d is not None:
    shift = d if scale is None else d * scale
    bias = shift if bias is None else bias + shift
  if r is not None:
    scale = r if scale is None else r * scale
  return scale, bias
