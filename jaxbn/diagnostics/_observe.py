"""What one batch shows of each batch norm: two runs of the network, and one derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._share import merge
from jaxbn._types import Moments
from jaxbn.surgery._foreign import Read
from jaxbn.surgery._layer import Layer
from jaxbn.surgery._population import observing, of_call, start
from jaxbn.surgery._trees import get, put

SAMPLED = 256  # elements per channel: a percentile is known to 3 of a hundred


class Seen(NamedTuple):
  """What was seen of a layer in one batch; everything by channel.

  Attributes:
    given: the moments of its input, over all its calls.
    first: those of its first call.
    last: those of its last call.
    calls: how often it was called.
    smallest: the smallest element that it gave.
    largest: the largest.
    x: some elements of its last input, the same ones in every run: (elements, channels...).
    y: of them, what it gave.
  """

  given: Moments
  first: Moments
  last: Moments
  calls: Any
  smallest: Any
  largest: Any
  x: Any
  y: Any


def refuse_complex(layers: Sequence[Layer]) -> None:
  for layer in layers:
    dtype = getattr(layer.input, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
      raise TypeError(
        f"{layer} is given {dtype.name}, but the doctor looks at real numbers alone: complex ones "
        "have no percentiles. jaxbn.surgery.recalibrate takes such a network, and "
        "jaxbn.surgery.stats.compare shows how far its statistics were from the right ones."
      )


def nothing_seen(layer: Layer) -> Seen:
  none = start([layer])[layer.path]
  shape = none.mean.shape
  one = jnp.zeros((*layer.stacked, SAMPLED, *layer.shape), jnp.float32)
  infinite = jnp.full(shape, jnp.inf)
  return Seen(none, none, none, jnp.zeros(shape), infinite, -infinite, one, one)


def watch(so_far: Seen, said: Read, options: Mapping[str, Any], y: Any) -> tuple[Seen, Any]:
  """With one more call."""
  shape = so_far.given.mean.shape
  now = Moments(*(jnp.asarray(v, jnp.float32) for v in of_call(said, options, shape)))
  rows = jnp.asarray(elements(_first(y), options, shape), jnp.float32)
  is_first = so_far.calls == 0
  first = Moments(*(jnp.where(is_first, n, f) for n, f in zip(now, so_far.first, strict=True)))
  seen = Seen(
    given=merge(so_far.given, now),
    first=first,
    last=now,
    calls=so_far.calls + 1,
    smallest=jnp.minimum(so_far.smallest, rows.min(0)),
    largest=jnp.maximum(so_far.largest, rows.max(0)),
    x=some(jnp.asarray(elements(said.x, options, shape), jnp.float32)),
    y=some(rows),
  )
  return seen, y


def elements(x: Any, options: Mapping[str, Any], shape: tuple[int, ...]) -> jax.Array:
  """All elements of each channel, along a first axis."""
  axes = _checks.split_axes(x.ndim, options.get("axis", -1))
  rows = jnp.transpose(x, (*axes.reduced, *axes.features))
  return rows.reshape(-1, *shape)


def some(rows: jax.Array) -> jax.Array:
  """SAMPLED of them, the same ones in every run."""
  return rows[np.linspace(0, len(rows) - 1, SAMPLED).astype(int)]


def by_channel(layer: Layer, rows: Any) -> Any:
  """Of (stacked..., SAMPLED, shape...) all channels along one axis, the last."""
  at = len(layer.stacked)
  others = [axis for axis in range(rows.ndim) if axis != at]
  return rows.transpose(at, *others).reshape(SAMPLED, -1)


def _first(y: Any) -> Any:
  return jax.tree.leaves(y)[0]


Look = Callable[[Any, Any, Sequence[Any]], tuple[dict[str, Seen], dict[str, Seen]]]


def look(model: Any, layers: Sequence[Layer], foreign: Any, arguments: Mapping[str, Any]) -> Look:
  """A function of variables, the batch's number and its arguments: in training, in evaluation."""
  runs = [observing(model, layers, foreign, mode, arguments, watch) for mode in (False, True)]

  def both(tree: Any, index: Any, args: Any) -> Any:
    empty = {layer.path: nothing_seen(layer) for layer in layers}
    return tuple(run(tree, empty, index, args)[1] for run in runs)

  return both


class Flow(NamedTuple):
  """The derivative of a loss, or of a random sum of the outputs, in training mode.

  Attributes:
    at: of each layer by its path the squared norm of the gradient at its output, by channel.
    params: the norm of the gradient of each parameter, by its place.
  """

  at: Mapping[str, Any]
  params: Mapping[tuple[Any, ...], Any]


def flow(
  model: Any,
  layers: Sequence[Layer],
  foreign: Any,
  arguments: Mapping[str, Any],
  params: Sequence[tuple[Any, ...]],
  loss: Callable[[Any, Any], Any] | None,
) -> Callable[..., Flow]:
  """A function of variables, the batch's arguments and the batch itself, which the loss is given.

  Each layer has a probe, a variable that changes nothing and whose gradient is that squared norm.
  """

  def pass_on(probe: Any, said: Read, options: Mapping[str, Any], y: Any) -> tuple[Any, Any]:
    (first, *others), tree = jax.tree.flatten(y)
    measured = _measured(first, probe, _features(first, options))
    return probe, jax.tree.unflatten(tree, [measured, *others])

  run = observing(model, layers, foreign, False, arguments, pass_on)

  def differentiate(tree: Any, args: Any, batch: Any) -> Flow:
    def objective(probes: Any, values: Any) -> Any:
      output, _ = run(put(tree, values), probes, np.int32(0), args)
      return random_sum(output) if loss is None else loss(output, batch)

    probes = {layer.path: jnp.zeros((*layer.stacked, *layer.shape)) for layer in layers}
    values = {place: get(tree, place) for place in params}
    at, gradients = jax.grad(objective, (0, 1))(probes, values)
    return Flow(at, {place: jnp.linalg.norm(jnp.ravel(g)) for place, g in gradients.items()})

  return differentiate


def _features(y: Any, options: Mapping[str, Any]) -> tuple[int, ...]:
  return _checks.split_axes(y.ndim, options.get("axis", -1)).features


def random_sum(output: Any) -> jax.Array:
  """The outputs, each times a fixed random sign: a loss where none is known."""
  total: Any = 0.0
  for i, leaf in enumerate(jax.tree.leaves(output)):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      signs = np.random.default_rng(i).choice([-1.0, 1.0], math.prod(leaf.shape))
      total += jnp.vdot(jnp.asarray(signs.reshape(leaf.shape), leaf.dtype), leaf)
  return jnp.asarray(total, jnp.float32)


def _measured(y: Any, probe: Any, features: tuple[int, ...]) -> Any:
  """y; the gradient of the probe is the squared norm of that of y, by channel."""

  @jax.custom_vjp
  def same(y: Any, probe: Any) -> Any:
    return y

  def backward(_: Any, g: Any) -> Any:
    axes = tuple(a for a in range(g.ndim) if a not in features)
    square = jnp.sum(jnp.square(g.astype(jnp.float32)), axes)
    return g, square.reshape(jnp.shape(probe))

  same.defvjp(lambda y, probe: (y, None), backward)
  return same(y, probe)
