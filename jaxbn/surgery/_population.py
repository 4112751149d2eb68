"""The moments of all that each batch norm of a network is given, batch after batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn import _checks
from jaxbn._measure import moments
from jaxbn._share import merge, sync
from jaxbn._types import Moments
from jaxbn.surgery import _linen, _nnx
from jaxbn.surgery._bound_axes import here
from jaxbn.surgery._foreign import Foreign, Read, bound, read, theirs
from jaxbn.surgery._layer import Layer
from jaxbn.surgery._trees import get, put
from jaxbn.variants._examples import examples_axis

# With the moments of each layer, by its path, so far: what the network gives, and those with one
# more batch.
Step = Callable[[Any, dict[str, Moments], jax.Array, Sequence[Any]], tuple[Any, dict[str, Moments]]]
# What was seen of a layer so far, its call, its options and what it gives: what is seen now, and
# what it shall give.
Observe = Callable[[Any, Read, Mapping[str, Any], Any], tuple[Any, Any]]
_NAME = "surgery_moments"


def start(layers: Sequence[Layer]) -> dict[str, Moments]:
  """The moments of nothing: their shapes are those of the statistics in the network."""

  def zeros(layer: Layer) -> Moments:
    # Floating-point counts, for there may be more elements than an integer holds.
    return Moments(*(jnp.zeros(layer.stacked + layer.shape, jnp.float32) for _ in range(3)))

  return {layer.path: zeros(layer) for layer in layers}


def step(
  model: Any,
  layers: Sequence[Layer],
  foreign: Mapping[type, Foreign],
  evaluating: bool,
  arguments: Mapping[str, Any],
) -> Step:
  """One run, of variables, moments so far, the batch's number and the call's arguments.

  Batch norms normalize as in evaluation or as in training, whatever the rest of the network does.
  """
  return observing(model, layers, foreign, evaluating, arguments, _with_call)


def observing(
  model: Any,
  layers: Sequence[Layer],
  foreign: Mapping[type, Foreign],
  evaluating: bool,
  arguments: Mapping[str, Any],
  observe: Observe,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
  """Likewise, of whatever arrays are seen of each layer so far."""
  make = _run_in_linen if isinstance(model, nn.Module) else _run_in_nnx
  run = make(model, foreign, evaluating, arguments, observe)
  places = {}
  for layer in layers:
    mean = layer.variables[theirs(foreign, layer.kind, "mean")]
    places[layer.path] = (*mean[:-1], _NAME)

  def one_more(tree: Any, so_far: dict[str, Moments], index: jax.Array, args: Any) -> Any:
    given = put(tree, {places[path]: value for path, value in so_far.items()})
    y, new = run(given, index, args)
    return y, {path: get(new, places[path]) for path in so_far}

  return one_more


def _run_in_linen(
  model: Any, foreign: Any, evaluating: bool, arguments: Any, observe: Observe
) -> Any:
  def around(call: _linen.Call) -> Any:
    layer, reading = call.layer, foreign.get(call.kind)
    options = reading.options_of(layer) if reading else _linen.options(layer, call.kind)
    (collection, *_), _ = call.places()[theirs(foreign, call.kind, "mean")]
    options = here(options)
    so_far = layer.get_variable(collection, _NAME)
    said = read(reading, layer, call.arguments)
    if reading:
      y = call.run_foreign(reading, evaluating=evaluating, **options)
    else:
      mode = {"use_running_average": evaluating}
      y = call.run_instead(call.kind, options | mode, use_running_average=None)
    if layer.get_variable(collection, _NAME) is so_far:  # else what was called in its place did it
      seen, y = observe(so_far, said, options, y)
      layer.put_variable(collection, _NAME, seen)
    return y

  def run(variables: Any, index: jax.Array, args: Any) -> Any:
    given = dict(arguments)
    if "rngs" in given:
      given["rngs"] = jax.tree.map(lambda key: jax.random.fold_in(key, index), given["rngs"])
    mutable = [collection for collection in variables if collection != "params"]
    with _linen.intercepting(around, (*_linen.BATCH_NORMS, *foreign), nested=True):
      return model.apply(variables, *args, mutable=mutable, **given)

  return run


class _Population(nnx.BatchStat):
  """Moments so far: a BatchStat, so that the axes of nnx.scan and nnx.vmap are those of such."""


class _Measuring(nnx.Module):
  surgery_place: Any
  surgery_measuring: Any

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    _, kind = self.surgery_place
    reading, evaluating, observe = self.surgery_measuring
    call = bound(functools.partial(kind.__call__, self), *args, **kwargs)
    options = here(reading.options_of(self) if reading else _nnx.options(self, kind))
    population = getattr(self, _NAME)
    said = read(reading, self, call)
    if reading:
      mode = {"evaluating": evaluating}
      y = _nnx.run_foreign(self, kind, reading, args, kwargs, **options | mode)
    else:
      with _nnx.here(self):
        y = super().__call__(**call | {"use_running_average": evaluating})
    seen, y = observe(population.get_value(), said, options, y)
    population.set_value(seen)
    return y


def _run_in_nnx(
  model: Any, foreign: Any, evaluating: bool, arguments: Any, observe: Observe
) -> Any:
  copy = nnx.clone(model)
  kinds = (*_nnx.BATCH_NORMS, *foreign)
  for _, layer, kind in _nnx.layers(copy, kinds):
    layer.surgery_measuring = foreign.get(kind), evaluating, observe
    setattr(layer, _NAME, _Population(None))
  _nnx.mix_in(copy, kinds, _Measuring)
  graphdef, template = nnx.split(copy)

  def run(tree: Any, index: jax.Array, args: Any) -> Any:
    state = jax.tree.map(lambda leaf: leaf, template)
    nnx.replace_by_pure_dict(state, tree)
    running = nnx.merge(graphdef, state, copy=True)
    for _, node in nnx.iter_graph(running):
      if isinstance(node, nnx.RngStream):
        node.key.set_value(jax.random.fold_in(node.key[...], index))
    y = running(*args, **arguments)
    return y, nnx.to_pure_dict(nnx.state(running, _Population))

  return run


def _with_call(
  so_far: Moments, said: Read, options: Mapping[str, Any], y: Any
) -> tuple[Moments, Any]:
  found = of_call(said, options, so_far.mean.shape)
  count = jnp.asarray(found.count, jnp.float32)
  return merge(so_far, found._replace(count=count)), y


def of_call(said: Read, options: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
  """The moments of what one call is given, all of the shape of the layer's statistics."""
  given = dict(said.given)
  domains = given.pop("domains", None)
  if given.get("mask") is not None:
    given["mask"] = jnp.asarray(given["mask"], bool)

  def measured(mask: Any) -> Moments:
    found = moments(said.x, axis=options.get("axis", -1), **given | {"mask": mask})
    if options.get("axis_name") is not None:
      found = sync(found, options["axis_name"], options.get("axis_index_groups"))
    return Moments(*(jnp.broadcast_to(v, found.mean.shape) for v in found))

  if domains is None:
    found = measured(given["mask"])
  else:  # one pass for each
    axes = _checks.split_axes(jnp.ndim(said.x), options["axis"])
    others = [a for a in range(jnp.ndim(said.x)) if a != examples_axis(said.x, axes)]
    own = jnp.expand_dims(jnp.broadcast_to(domains, said.x.shape[axes.reduced[0]]), others)
    each = []
    for domain in range(options["num_domains"]):
      mask = own == domain
      each.append(measured(mask if given["mask"] is None else mask & given["mask"]))
    found = jax.tree.map(lambda *rows: jnp.stack(rows), *each)
  return Moments(*(jnp.reshape(v, shape) for v in found))
