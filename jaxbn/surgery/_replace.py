"""Replace: every batch norm runs this library's, with the same variables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from jaxbn import linen
from jaxbn import nnx as jaxbn_nnx
from jaxbn.surgery import _linen, _nnx
from jaxbn.surgery._foreign import Foreign, options_of_function
from jaxbn.surgery._layer import Layer, nothing, of_call, of_node

Rule = Callable[[str, Layer], Any]


def replace(
  model: Any,
  rule: Rule | None = None,
  *,
  where: Callable[[str, Layer], bool] | None = None,
  foreign: Mapping[type, Foreign] | None = None,
  copy: bool = True,
  **options: Any,
) -> Any:
  """A network whose batch norms are this library's, with the variables that it has.

  It is initialized, applied, called and saved like the one given: variables and their names are the
  same, and so are outputs and gradients where no option changes them. `replaced` lists what became
  another layer.

  Of a Linen module a subclass is made, whose layers are replaced as they are called, wherever they
  come from (default arguments, `functools.partial`, nn.scan, nn.remat, nn.vmap, subclasses that
  call their base). Of an NNX module the graph is changed. A function that was jitted before, or
  that holds the old module, runs the old one.

  Args:
    model: a module of Flax Linen or NNX.
    rule: what becomes of a layer, as a function of its path and its description (`Layer`): options,
      which come before those below; or a class or partial, such as
      `partial(jaxbn.linen.BatchRenorm, r_max=3.0)`, which is given the layer's own options; or a
      layer; or None: it stays.
    where: whether a layer is replaced, as a function of its path and its description; default, all.
    foreign: batch norms that are not Flax's, by their class, and how to read them.
    copy: of an NNX module, False changes the one that is given.
    **options: of `jaxbn.linen.BatchNorm` or `jaxbn.nnx.BatchNorm` (axis_name, virtual_batch_size,
      activation, unbiased, ...), for all layers; all others are as they were. `debias=True` and
      momentum=None need the leaf `count`: see `jaxbn.surgery.stats.add_count`.

  Returns:
    A module.

  Raises:
    TypeError: an option that there is not; a rule that gives something else.
    ValueError: nothing was replaced: of NNX now, of Linen when the result was called; a leaf
      `count` that is needed and missing.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.surgery
  >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
  >>> synchronized = jaxbn.surgery.replace(model, axis_name="batch")
  >>> variables = synchronized.init(jax.random.key(0), jnp.ones((8, 3)))
  >>> jaxbn.surgery.replaced(synchronized)
  [BatchNorm layers_1]
  """
  is_linen = isinstance(model, nn.Module)
  ours: Any = linen.BatchNorm if is_linen else jaxbn_nnx.BatchNorm
  known = set(inspect.signature(ours.__init__).parameters) - _NOT_OPTIONS
  for name in options.keys() - known:
    raise TypeError(
      f"{name!r} is no option of {ours.__name__}, which has {', '.join(sorted(known))}."
    )
  choose = functools.partial(_chosen, rule, where, ours, options)
  if not is_linen:
    return _in_nnx(nnx.clone(model) if copy else model, choose, dict(foreign or {}))
  if not copy:
    raise ValueError("copy=False is for NNX: a Linen module is never changed. Use the result.")
  return _in_linen(model, choose, dict(foreign or {}))


_NOT_OPTIONS = {"self", "parent", "name", "num_features", "rngs", "scale_metadata", "bias_metadata"}


def _chosen(
  rule: Rule | None, where: Any, ours: Any, options: Mapping[str, Any], layer: Layer
) -> tuple[Any, dict[str, Any]] | None:
  """What makes the new layer, and its options; None if the layer stays."""
  if where is not None and not where(layer.path, layer):
    return None
  made = {} if rule is None else rule(layer.path, layer)
  if made is None:
    return None
  if isinstance(made, Mapping):
    make = layer.kind if issubclass(layer.kind, ours) else ours
    return make, {**layer.options, **options, **made}
  if isinstance(made, nn.Module | nnx.Module):
    return made, {}
  if callable(made):
    return made, {**layer.options, **options}
  raise TypeError(
    f"the rule gave {made!r} for {layer}: it has to give options (a dict), a class or a partial of "
    "one, a layer, or None to leave the layer as it is."
  )


def _in_linen(model: nn.Module, choose: Any, foreign: dict[type, Foreign]) -> Any:
  done: dict[str, Layer] = {}
  refused: set[str] = set()

  def around(call: _linen.Call) -> Any:
    reading = foreign.get(call.kind)
    layer = of_call(call, reading)
    chosen = choose(layer)
    if chosen is None:
      refused.add(layer.path)
      return call.run()
    done[layer.path] = layer
    make, options = chosen
    if reading is None:
      return call.run_instead(make.clone if isinstance(make, nn.Module) else make, options)
    if call.layer.is_initializing():  # their variables are made as they make them
      return call.run()
    return call.run_foreign(reading, **options_of_function(layer, options))

  def finished(others: set[str]) -> None:
    if not done:
      raise ValueError(nothing("replaced", model, others, refused))

  kinds = (*_linen.BATCH_NORMS, *foreign)
  return _linen.intercepted(model, around, kinds, finished, surgery_replaced=done)


def _in_nnx(model: Any, choose: Any, foreign: dict[type, Foreign]) -> Any:
  done, refused = 0, []
  for path, node, kind in _nnx.layers(model, (*_nnx.BATCH_NORMS, *foreign)):
    reading = foreign.get(kind)
    layer = of_node(path, node, kind, reading)
    chosen = choose(layer)
    if chosen is None:
      refused.append(layer.path)
      continue
    make, options = chosen
    if reading:
      options = options_of_function(layer, options)
      node.surgery_foreign = reading, kind, tuple(options.items())
      cls: Any = type(node)
      node.__class__ = _nnx.with_mixin(cls, kind, _nnx.ByOurs)
    else:
      made = isinstance(make, nnx.Module)
      new = make if made else make(node.num_features, rngs=nnx.Rngs(0), **options)
      if hasattr(new, "count") and not hasattr(node, "count"):
        raise ValueError(
          f"{layer} has no leaf count, which debias=True and momentum=None need: add it with "
          "jaxbn.surgery.stats.add_count(model, updates=...) before, or leave the option out."
        )
      _nnx.become(node, kind, new)
    node.surgery_replaced = layer.kind
    done += 1
  if not done:
    raise ValueError(nothing("replaced", model, _nnx.classes(model), refused))
  return model


def replaced(model: Any) -> list[Layer]:
  """The layers that `replace` replaced, as they were before; their number is the list's length.

  Args:
    model: what `replace` gave. A Linen module must have been initialized or applied (abstractly
      will do: `jax.eval_shape`), for its layers are replaced as they are called.

  Returns:
    A list of `Layer`.

  Raises:
    ValueError: a module in which nothing was replaced, or of Linen, was not yet.

  >>> import jaxbn.surgery
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
  >>> jaxbn.surgery.replaced(jaxbn.surgery.replace(model, unbiased=True))
  [BatchNorm layers/0]
  """
  if isinstance(model, nn.Module):
    done = list(getattr(model, "surgery_replaced", {}).values())
  else:
    done = [
      of_node(path, node, node.surgery_replaced)
      for path, node in nnx.iter_graph(model)
      if hasattr(node, "surgery_replaced")
    ]
  if not done:
    raise ValueError(
      f"nothing is replaced in this {type(model).__name__}: give what jaxbn.surgery.replace "
      "returned, and of Linen after it was initialized or applied."
    )
  return done
