"""What every function refuses: a sentence naming the argument, what was given and the mend."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn._names import shown
from jaxbn._types import Axes, Moments, RunningStats


def concrete(value: Any) -> bool:
  """Whether a value can be looked at now, that is, no transformation is tracing it."""
  return not isinstance(value, jax.core.Tracer)


def inexact(x: Any, name: str = "x") -> jax.Array:
  """x as an array, if its elements are real or complex floating-point numbers."""
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise TypeError(
      f"{name} has dtype {x.dtype}; batch normalization needs a floating-point or complex dtype: "
      f"convert it first, for instance {name}.astype(jnp.float32)."
    )
  return x


def split_axes(ndim: int, axis: int | Sequence[int]) -> Axes:
  """The channel axes as asked for by `axis` (negative counts from the end), and the others."""
  given: Sequence[Any] = (axis,) if np.ndim(axis) == 0 else tuple(axis)  # type: ignore[arg-type]
  features = []
  for a in given:
    try:
      if isinstance(a, bool):
        raise TypeError
      a = operator.index(a)
    except TypeError:
      raise TypeError(
        f"axis={shown(axis)}: the channels' axes are integers, one or several."
      ) from None
    if not -ndim <= a < ndim:
      allowed = f"each must be at least {-ndim} and less than {ndim}" if ndim else "it has none"
      raise ValueError(f"axis={shown(axis)} is out of range for x with {ndim} axes: {allowed}.")
    features.append(a % ndim)
  if len(set(features)) != len(features):
    raise ValueError(
      f"axis={shown(axis)} names one axis of x (which has {ndim}) twice: name it once."
    )
  return Axes(tuple(sorted(features)), tuple([i for i in range(ndim) if i not in features]))


def widen(value: jax.Array, x: jax.Array) -> jax.Array:
  """value with as many axes as x, new ones in front: what NumPy does by itself where it may."""
  return jnp.expand_dims(value, tuple(range(x.ndim - value.ndim)))


def channel_shape(shape: Any) -> tuple[int, ...]:
  """A shape from an integer or a sequence of them."""
  try:
    return tuple(operator.index(n) for n in ((shape,) if np.ndim(shape) == 0 else shape))
  except TypeError:
    raise TypeError(
      f"shape={shown(shape)}: an integer or a sequence of integers is needed, such as x.shape[-1]."
    ) from None


def nonempty(x: jax.Array, axes: Axes) -> None:
  """Refuses a batch without elements: it has no statistics."""
  if 0 in [x.shape[a] for a in axes.reduced]:
    raise ValueError(
      f"x of shape {x.shape} is an empty batch: it has no element to take statistics of. "
      "Skip it, or pad it and mask the padding."
    )


def channels(
  name: str, value: Any, x: jax.Array, axes: Axes, or_per_example: bool = False
) -> jax.Array:
  """A per-channel value as an array, if its shape is that of x's channels.

  Or one that broadcasts against x with as many axes as x.
  """
  value, shape = jnp.asarray(value), axes.shape(x)
  if value.shape == shape or (or_per_example and fits(value.shape, x)):
    return value
  raise ValueError(
    f"{name} has shape {value.shape}, but x of shape {x.shape} has channels of shape {shape} "
    f"on axis {axes.features}: pass {name} of that shape, or name the channels' axis"
    + other_axis(x, value.shape)
    + f" Has pmap put an axis of devices in front of {name}? Take it back with out_axes=None."
    * (value.ndim > 0 and value.shape[1:] == shape)
    + f" Where it differs between examples, give it {x.ndim} axes, each 1 or x's." * or_per_example
  )


def other_axis(x: jax.Array, shape: tuple[int, ...]) -> str:
  """The end of a sentence that asks for the channels' axis: which it may be."""
  found = [a for a in range(x.ndim) if shape == (x.shape[a],)]
  return f": axis={found[0]} has {shape[0]}." if len(found) == 1 else "."


def fits(shape: tuple[int, ...], x: jax.Array) -> bool:
  """Whether a shape has as many axes as x, each of size 1 or x's."""
  return len(shape) == x.ndim and all(m in (1, n) for m, n in zip(shape, x.shape, strict=True))


def same_shape(name: str, value: Any, x: jax.Array) -> jax.Array:
  """A floating-point value per element as an array, if its shape is x's."""
  value = inexact(value, name)
  if value.shape != x.shape:
    raise ValueError(
      f"{name} has shape {value.shape}, but x has {x.shape}: it is added to every element, so its "
      f"shape must be x's: broadcast or project it first."
    )
  return value


def broadcastable(name: str, value: Any, x: jax.Array) -> jax.Array:
  """A mask or weights as an array with x's number of axes, if it broadcasts against x."""
  value = jnp.asarray(value)
  aligned = (1,) * (x.ndim - value.ndim) + value.shape
  if not fits(aligned, x):
    hint = ""
    if value.ndim < x.ndim and value.shape == x.shape[: value.ndim]:
      new_axes = ", None" * (x.ndim - value.ndim)
      hint = f" It has the leading axes of x: pass {name}[...{new_axes}]."
    raise ValueError(
      f"{name} of shape {value.shape} does not broadcast against x of shape {x.shape}: "
      f"NumPy's rules align the last axes, and each must be 1 or x's.{hint}"
    )
  return value.reshape(aligned)


def boolean_mask(mask: Any, x: jax.Array) -> jax.Array:
  """The mask, aligned with x, if it is boolean."""
  mask = jnp.asarray(mask)
  if mask.dtype != jnp.bool_:
    raise TypeError(
      f"mask has dtype {mask.dtype}; a mask is boolean: pass mask != 0, "
      "or pass it as weights if its values are to count."
    )
  return broadcastable("mask", mask, x)


def nonnegative_weights(weights: Any, x: jax.Array) -> jax.Array:
  """The weights, aligned with x: real, and not negative where that can be seen."""
  if jnp.iscomplexobj(weights):
    dtype = jnp.asarray(weights).dtype
    raise TypeError(f"weights have dtype {dtype}; they are real numbers, not negative.")
  # In NumPy: inside jit, operations of JAX are traced even where their arguments are known.
  seen = np.asarray(weights) if concrete(weights) else np.zeros(())
  if not np.all(np.isfinite(seen) & (seen >= 0)):
    raise ValueError(
      "weights hold a negative or a non-finite number; each is how often its element counts, "
      "0 to leave it out: pass finite weights >= 0."
    )
  return broadcastable("weights", weights, x)


def scalar(name: str, value: Any) -> None:
  """Refuses what is not one real number."""
  if isinstance(value, bool) or not isinstance(
    value, int | float | np.generic | np.ndarray | jax.Array
  ):
    raise TypeError(f"{name}={shown(value)} is not a number.")
  if np.ndim(value) != 0:
    raise ValueError(f"{name} has shape {np.shape(value)}; it is one number, a scalar.")
  if jnp.iscomplexobj(value):
    raise TypeError(f"{name}={shown(value)} is complex; a real number is needed.")


def in_range(name: str, value: Any, most: float) -> bool:
  """Whether a number, where it can be seen, lies from 0 to the most there is."""
  if type(value) is not float:
    scalar(name, value)
    value = float(value) if concrete(value) else 0.0
  return 0 <= value <= most


def epsilon_in_range(epsilon: Any) -> None:
  """Refuses an epsilon that is negative or not finite."""
  if not in_range("epsilon", epsilon, sys.float_info.max):
    raise ValueError(
      f"epsilon={shown(epsilon)} is out of range: it is added to the variance and must be finite "
      "and not negative; 1e-5 is usual, and 0 makes constant channels NaN."
    )


def momentum_in_range(momentum: Any, debias: bool) -> None:
  """Refuses a momentum outside [0, 1], and what `debias` cannot do."""
  static_bool("debias", debias)
  if momentum is None and debias:
    raise ValueError(
      "debias=True with momentum=None: a cumulative average has no bias to remove: "
      "leave debias out, or give a momentum below 1."
    )
  if momentum is not None and not in_range("momentum", momentum, 1.0):
    raise ValueError(
      f"momentum={shown(momentum)} is out of range: it is the share of the old value that is kept, "
      "from 0 to 1 (0.99 is usual; PyTorch's momentum is 1 minus it), or None for a cumulative "
      "average."
    )
  if debias and concrete(momentum) and float(momentum) == 1:
    raise ValueError(
      "debias=True with momentum=1.0: statistics that never change cannot be debiased: "
      "give a momentum below 1."
    )


def static_bool(name: str, value: Any) -> bool:
  """A flag that decides what is traced, so that it must be known when tracing: True, False, 1 or 0.

  As a number or an array of any library: that is what a config, or a reduction over flags, gives.
  """
  if value is True or value is False:
    return value
  if concrete(value) and isinstance(value, int | np.generic | np.ndarray | jax.Array):
    flag = np.asarray(value)
    if flag.shape == () and flag.dtype.kind in "biu" and flag in (0, 1):
      return bool(flag)
  raise TypeError(
    f"{name}={shown(value)}: a Python bool is needed, for it decides which program is traced: "
    f"pass {name}=True or False, mark it static under jit, or choose with jax.lax.cond outside."
  )


def axis_names(axis_name: Any) -> tuple[Any, ...]:
  """The names that an axis_name holds, one or several."""
  return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def axis_size(axis_name: Any) -> int:
  """The size of a bound axis (of several: the product); refuses names that are not bound."""
  if axis_name is None:
    raise ValueError("axis_name is None: name the axis whose members share their moments.")
  size = 1
  for name in axis_names(axis_name):
    try:
      size *= lax.axis_size(name)
    except NameError:
      bound = ", ".join(map(repr, _bound_axis_names())) or "none"
      raise ValueError(
        f"axis_name={axis_name!r} is not bound here (bound: {bound}): call inside jax.pmap, "
        f"jax.vmap or jax.shard_map with the axis {name!r}, or leave axis_name out; under jit with "
        "sharded arrays the statistics are those of the whole batch without it."
      ) from None
  return size


def _bound_axis_names() -> list[Any]:
  # For the error message only: a JAX without this function costs no more than the names, and an
  # import on top, with all of jax.extend behind it, would cost every user 30 ms.
  from jax.extend import core as extend_core

  name = "unsafe_get_axis_names_DO_NOT_USE"  # once in jax.core
  names = getattr(extend_core if hasattr(extend_core, name) else jax.core, name, list)
  return list(names())


def sharing(axis_name: Any, axis_index_groups: Any) -> tuple[Any, Any]:
  """axis_name and groups, checked as far as they go together, such that they can be hashed."""
  if axis_index_groups is not None:
    if axis_name is None:
      raise ValueError(
        f"axis_index_groups={shown(axis_index_groups)} are groups of indices along axis_name, "
        "which is None: pass axis_name too."
      )
    axis_index_groups = partition(axis_index_groups, axis_size(axis_name), axis_name)
  return tuple(axis_name) if isinstance(axis_name, list) else axis_name, axis_index_groups


def partition(axis_index_groups: Any, size: int, axis_name: Any) -> tuple[tuple[int, ...], ...]:
  """The groups as tuples, if they hold each index of the axis exactly once."""
  try:
    groups = tuple(tuple(operator.index(i) for i in group) for group in axis_index_groups)
  except TypeError:
    groups = ()
  if sorted(i for group in groups for i in group) != list(range(size)) or not all(groups):
    raise ValueError(
      f"axis_index_groups={shown(axis_index_groups)} do not partition the axis {axis_name!r} of "
      f"size {size}: each index from 0 to {size - 1} must be in exactly one group, "
      "for example [[0, 1], [2, 3]] for size 4."
    )
  return groups


def result_dtype(dtype: Any, mean: Any = None, **arrays: Any) -> Any:
  """The dtype of y: as asked for, or what x, scale, bias and residual promote to."""
  if dtype is None:
    dtype = jnp.result_type(*[jnp.asarray(a) for a in arrays.values() if a is not None])
  elif not jnp.issubdtype(dtype, jnp.inexact):
    raise TypeError(f"dtype={shown(dtype)} is not a floating-point or complex dtype, as y needs.")
  if not jnp.issubdtype(dtype, jnp.complexfloating):
    for name, value in {"mean": mean, **arrays}.items():
      if jnp.iscomplexobj(value):
        raise TypeError(
          f"{name} is {jnp.asarray(value).dtype}, but y has dtype={jnp.dtype(dtype)}, which cannot "
          "hold complex numbers: pass dtype=jnp.complex64, or take the real part first."
        )
  return jnp.dtype(dtype)


def masked_value(value: Any, valid: jax.Array | None) -> None:
  """Refuses a masked_value that is not a number, or that nothing would hold."""
  if valid is None:
    raise ValueError(
      f"masked_value={shown(value)} is what masked positions hold, but there is no mask: "
      "pass mask too, or leave masked_value out."
    )
  scalar("masked_value", value)


def is_moments(value: Any) -> None:
  """Refuses what is not Moments."""
  if not isinstance(value, Moments):
    raise TypeError(
      f"a {type(value).__name__} was given; jaxbn.Moments are needed, such as jaxbn.moments(x)."
    )


def running_stats(state: Any) -> RunningStats:
  """The state, with arrays for lists; refuses what is not RunningStats, and integer statistics."""
  if not isinstance(state, RunningStats):
    raise TypeError(
      f"state is a {type(state).__name__}; a jaxbn.RunningStats is needed: make it with "
      "jaxbn.init(...), or, from Flax's collection, jaxbn.RunningStats(mean=..., var=...)."
    )
  leaves: list[Any] = []
  for name, value in state._asdict().items():
    try:
      leaves.append(None if value is None and name == "count" else jnp.asarray(value))
    except (TypeError, ValueError):
      raise TypeError(
        f"state.{name}={shown(value)} is not an array of one number for each channel: make the "
        "state with jaxbn.init(...)."
      ) from None
  mean, var, count = leaves
  inexact(mean, "state.mean")
  inexact(var, "state.var")
  # The state itself where it can be: evaluation returns it.
  arrays = [isinstance(v, jax.Array | np.ndarray | None) for v in state]
  return state if all(arrays) else RunningStats(mean, var, count)


def has_count(state: RunningStats, momentum: Any, debias: bool) -> None:
  """Refuses a state without a count where it is needed."""
  if (debias or momentum is None) and state.count is None:
    option = "momentum=None" if momentum is None else "debias=True"
    raise ValueError(
      f"{option} needs the number of updates so far, which state lacks (state.count is None): make "
      f"it with jaxbn.init(..., {option}), or add a count to a state that has been trained, for "
      "instance state._replace(count=jnp.full(state.mean.shape, updates, jnp.float32))."
    )
