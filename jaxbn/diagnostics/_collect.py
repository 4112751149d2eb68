"""Collect: what is known of a network, from its variables, some batches and what is said of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from jaxbn._types import RunningStats
from jaxbn.diagnostics import _observe
from jaxbn.diagnostics._facts import Facts, LayerFacts
from jaxbn.surgery._find import find
from jaxbn.surgery._layer import Layer
from jaxbn.surgery._network import Network
from jaxbn.surgery._spread import Spread, how_far, rows
from jaxbn.surgery._trees import Place, get, put

# By these names a call is told its mode; what else there is has to be said.
_FLAGS = ("train", "training", "is_training", "deterministic", "use_running_average")
_VARIABLES = ("mean", "var", "scale", "bias")
# What runs once need not run fast: to compile a ResNet-18's derivative takes half the time so.
_QUICK = {"xla_backend_optimization_level": 0}


class Run(NamedTuple):
  """What is said of a run: see `diagnose`."""

  training: Mapping[str, Any] | None
  steps: int | None
  batch_size: int | None
  loss: Callable[[Any, Any], Any] | None
  valid: Callable[[Any], Any] | None
  earlier: Any
  replicas: Any
  decay_mask: Any
  optimizer: Any
  gradients: bool


class Batch(NamedTuple):
  """What the network was shown, on the host."""

  rows: int
  training: dict[str, _observe.Seen]
  evaluation: dict[str, _observe.Seen]


class Programs:
  """What was compiled for a network, for other values of its variables."""

  def __init__(self) -> None:
    self.known: dict[Any, Any] = {}

  def __call__(self, network: Network, make: Callable[..., Any], *also: Any, **options: Any) -> Any:
    """`jax.jit` of `make(model, layers, foreign, arguments, *also)`, once for each `also`."""
    model = network.model
    # The mode of an NNX module is in its graph.
    key = make, also, None if isinstance(model, nn.Module) else nnx.graphdef(model)
    if key not in self.known:
      made = make(model, network.layers, network.foreign, network.arguments, *also)
      self.known[key] = jax.jit(made, **options)
    return self.known[key]


def collect(
  network: Network,
  batches: Any,
  run: Run,
  spread: Spread,
  progress: Callable[[str], None],
  programs: Programs,
) -> Facts:
  """Goes through the batches once; of the first, gradients are taken and the padding is changed."""
  seen: list[Batch] = []
  shown = functools.partial(_placed, spread)
  flow, padded, trains = None, {}, {}
  for batch, args in network.each(batches):
    if not seen:
      _observe.refuse_complex(network.layers)
      look = programs(network, _observe.look)
      tree = _in_full_precision(network)
      trains = _modes(network, args, run.training)
      if run.valid is not None:
        padded, _ = look(*shown(tree, 0, _other_padding(args, run.valid(batch))))
      if run.gradients:
        tree_there, _, args_there = shown(tree, 0, args)
        differentiate = programs(
          network, _observe.flow, tuple(parameters(network)), run.loss, compiler_options=_QUICK
        )
        flow = jax.tree.map(np.asarray, differentiate(tree_there, args_there, batch))
    training, evaluation = look(*shown(tree, len(seen), args))
    seen.append(Batch(rows(args), *jax.tree.map(np.asarray, (training, evaluation))))
    progress(f"diagnose, {how_far(len(seen), batches)}")
  return _facts(network, run, seen, flow, jax.tree.map(np.asarray, padded), trains)


def _placed(spread: Spread, tree: Any, index: int, args: Any) -> Any:
  tree, _, index, args = spread(tree, (), np.int32(index), args)
  return tree, index, args


def _in_full_precision(network: Network) -> Any:
  """Its variables, with statistics that a batch's can be put into without loss."""
  places = [network.place(layer, name) for layer in network.layers for name in ("mean", "var")]
  values = {place: get(network.tree, place) for place in places}
  wide = {p: v.astype(jnp.promote_types(v.dtype, jnp.float32)) for p, v in values.items()}
  return put(network.tree, wide)


def _modes(network: Network, args: Any, training: Mapping[str, Any] | None) -> dict[str, Any]:
  """Of each layer by its path whether it normalizes by the batch in training, if that is known."""
  arguments, model = dict(network.arguments), network.model
  in_linen = isinstance(model, nn.Module)
  if training is None:
    flipped = {k: not v for k, v in arguments.items() if k in _FLAGS and isinstance(v, bool)}
    if not flipped and in_linen:
      return {}
    training = flipped
  if in_linen and not training:  # it is trained by the call that was looked at
    layers = network.layers
  else:
    arguments |= training
    if in_linen:
      given = {"variables": network.variables, "rngs": {"dropout": jax.random.key(0)}}
      arguments = given | arguments
    else:
      model = nnx.clone(model)
      model.train()
    layers = find(model, *args, foreign=network.foreign, **arguments)
  modes = {layer.path: layer.evaluating for layer in layers}
  return {path: None if mode is None else not mode for path, mode in modes.items()}


def _other_padding(args: Any, valid: Any) -> Any:
  """The arguments with elements that exist in the place of those that do not."""
  valid = np.asarray(valid, bool)

  def fill(a: Any) -> Any:
    a = np.asarray(a)
    if a.dtype == bool or a.shape[: valid.ndim] != valid.shape or not valid.any():
      return a
    a, rng = a.copy(), np.random.default_rng(0)
    a[~valid] = a[valid][rng.integers(valid.sum(), size=(~valid).sum())]
    return a

  return jax.tree.map(fill, args)


def parameters(network: Network, tree: Any = None) -> dict[Place, Any]:
  """All that is trained, by its place."""
  tree = network.tree if tree is None else tree
  if isinstance(network.model, nn.Module):
    return {("params", *place): v for place, v in flatten_dict(dict(tree["params"])).items()}
  places = flatten_dict(nnx.to_pure_dict(nnx.state(network.model, nnx.Param)))
  return {place: get(tree, place) for place in places}


def _decayed(network: Network, mask: Any, optimizer: Any) -> list[Place] | None:
  """The places of the parameters that are decayed, if that is said."""
  if mask is None and optimizer is None:
    return None
  in_linen = isinstance(network.model, nn.Module)
  params = (
    network.tree["params"] if in_linen else (nnx.to_pure_dict(nnx.state(network.model, nnx.Param)))
  )
  if optimizer is not None:  # what it does to ones whose gradient is 0
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(ones), ones)
    tree = jax.tree.map(lambda u: bool(np.any(u)), updates)
  else:
    mask = mask(params) if callable(mask) else mask
    tree = jax.tree.map(lambda on, below: jax.tree.map(lambda _: bool(on), below), mask, params)
  flat = flatten_dict(dict(tree))
  return [("params", *place) if in_linen else place for place, on in flat.items() if on]


def _facts(
  network: Network, run: Run, seen: Sequence[Batch], flow: Any, padded: Any, trains: Any
) -> Facts:
  own = {place for layer in network.layers for place in layer.variables.values()}
  kernels = {
    place: (*place[:-1], "kernel")
    for place in parameters(network)
    if place[-1] == "bias" and place not in own
  }
  kernels = {b: k for b, k in kernels.items() if get(network.tree, k) is not None}
  dtypes = [v.dtype for v in parameters(network).values()]
  dtypes += [getattr(layer.input, "dtype", np.dtype(np.float32)) for layer in network.layers]
  earlier = None if run.earlier is None else _tree_of(run.earlier)
  return Facts(
    layers=[
      _layer_facts(network, run, layer, seen, flow, padded, trains.get(layer.path), earlier)
      for layer in network.layers
    ],
    kernels=kernels,
    flow=flow,
    unit=max(float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact)),
    decayed=_decayed(network, run.decay_mask, run.optimizer),
    rows=[batch.rows for batch in seen],
    steps=run.steps,
    batch_size=run.batch_size,
    moved=None if earlier is None else _moved(network, earlier),
  )


def _tree_of(variables: Any) -> Any:
  """Variables of Linen as they are, and those of an NNX module."""
  is_module = isinstance(variables, nnx.Module)
  return nnx.to_pure_dict(nnx.state(variables)) if is_module else variables


def _moved(network: Network, earlier: Any) -> bool:
  now, then = parameters(network), parameters(network, earlier)
  return any(np.any(np.asarray(now[p]) != np.asarray(then[p])) for p in now)


def _layer_facts(
  network: Network,
  run: Run,
  layer: Layer,
  seen: Sequence[Batch],
  flow: Any,
  padded: Any,
  trains: bool | None,
  earlier: Any,
) -> LayerFacts:
  place = {name: network.place(layer, name) for name in _VARIABLES}

  def value(name: str, tree: Any = None, leading: tuple[int, ...] = ()) -> Any:
    found = None
    if place[name] is not None:
      found = get(network.tree if tree is None else tree, place[name])
    return None if found is None else np.asarray(found, np.float64).reshape(*leading, -1)

  def stats(tree: Any, leading: tuple[int, ...] = ()) -> RunningStats | None:
    if tree is None or get(tree, place["mean"]) is None:
      return None
    return RunningStats(value("mean", tree, leading), value("var", tree, leading))

  scale = value("scale")
  if scale is not None and layer.kind in network.foreign:
    scale = scale + network.foreign[layer.kind].scale_offset
  replicas = _replicas(network, place)
  if run.replicas is not None:
    number = len(get(run.replicas, place["mean"]))
    replicas = stats(_tree_of(run.replicas), (number,))
  running = stats(network.tree)
  assert running is not None
  return LayerFacts(
    layer=layer,
    running=running,
    dtype=np.dtype(get(network.tree, place["mean"]).dtype),
    scale=scale,
    bias=value("bias"),
    training=[_flat(layer, b.training[layer.path]) for b in seen],
    evaluation=[_flat(layer, b.evaluation[layer.path]) for b in seen],
    trains=trains,
    earlier=stats(earlier),
    replicas=replicas,
    gradient=None if flow is None else flow.at[layer.path].astype(np.float64).reshape(-1),
    other_padding=_flat(layer, padded[layer.path]).given if padded else None,
  )


def _replicas(network: Network, place: Mapping[str, Any]) -> RunningStats | None:
  """What each device holds of arrays that are said to be the same on all."""
  both = []
  for name in ("mean", "var"):
    array = get(network.tree, place[name])
    if not isinstance(array, jax.Array) or not array.is_fully_replicated:
      return None
    both.append([np.asarray(s.data, np.float64).reshape(-1) for s in array.addressable_shards])
  stacked: Any = [np.stack(copies) for copies in both]
  return RunningStats(*stacked) if len(both[0]) > 1 else None


def _flat(layer: Layer, seen: _observe.Seen) -> _observe.Seen:
  """Its channels along one axis, the last."""
  channels = math.prod(layer.stacked + layer.shape)

  def moments(given: Any) -> Any:
    return type(given)(*(np.asarray(v).reshape(channels) for v in given))

  def sample(rows: Any) -> np.ndarray:
    return np.asarray(_observe.by_channel(layer, rows), np.float64)

  flat = {name: getattr(seen, name).reshape(channels) for name in ("calls", "smallest", "largest")}
  flat |= {name: moments(getattr(seen, name)) for name in ("given", "first", "last")}
  return seen._replace(**flat, x=sample(seen.x), y=sample(seen.y))
