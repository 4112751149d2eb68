"""Flax NNX: the layers of a graph, and classes that do more at a call."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxbn.nnx._common import write
from jaxbn.surgery import _bound_axes
from jaxbn.surgery._foreign import Foreign, bound, run
from jaxbn.surgery._linen import is_library, library_class

BATCH_NORMS = (nnx.BatchNorm,)  # ours are of its class too


def layers(
  model: Any, kinds: Iterable[type] = BATCH_NORMS
) -> list[tuple[tuple[Any, ...], Any, type]]:
  """The layers of these kinds, each once: path, layer, and the class whose `__call__` counts."""
  kinds = tuple(kinds)
  found = []
  for path, node in nnx.iter_graph(model):
    if isinstance(node, kinds):
      wanted = next(c for c in type(node).__mro__ if c in kinds)
      found.append((path, node, library_class(type(node)) if is_library(wanted) else wanted))
  return found


def classes(model: Any) -> set[str]:
  return {type(module).__name__ for _, module in nnx.iter_modules(model)}


def options(layer: Any, kind: Any) -> dict[str, Any]:
  """The arguments of the constructor that a layer keeps."""
  names: set[str] = set()
  for cls in kind.__mro__:
    parameters = inspect.signature(cls.__init__).parameters.values()
    names |= {p.name for p in parameters}
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):  # else the rest is for the base
      break
  names -= {"num_features"}
  return {name: value for name, value in vars(layer).items() if name in names}


def places(layer: Any, path: tuple[Any, ...]) -> dict[str, Any]:
  """Of each variable by name its place and its value."""
  own = {name: v for name, v in vars(layer).items() if isinstance(v, nnx.Variable)}
  return {name: ((*path, name), v[...]) for name, v in own.items()}


def mix_in(model: Any, kinds: Iterable[type], mixin: type) -> None:
  """Puts a mixin's `__call__` around that of each layer, which knows its place and its kind."""
  for path, layer, kind in layers(model, kinds):
    layer.surgery_place = path, kind
    cls: Any = type(layer)
    layer.__class__ = with_mixin(cls, kind, mixin)


@functools.cache  # so that jit knows the class again
def with_mixin(cls: Any, kind: Any, mixin: Any) -> type:
  """A class like this, in which a mixin's methods come before those of the kind.

  What a user's class makes around the kind's `__call__` stays around it. A mixin may itself be of
  the kind.
  """
  about = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "surgery": True}
  if not issubclass(mixin, kind):
    mixin = type(kind)(kind.__name__, (mixin, kind), about)
  return mixin if cls is kind else type(cls)(cls.__name__, (cls, mixin), about)


class ByOurs(nnx.Module):
  """A batch norm that is not Flax's, whose calls ours runs: a mixin."""

  surgery_foreign: Any  # how it is read, its class, and further options

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    reading, kind, options = self.surgery_foreign
    return run_foreign(self, kind, reading, args, kwargs, **dict(options))


def run_foreign(
  layer: Any, kind: Any, reading: Foreign, args: Any, kwargs: Any, **options: Any
) -> Any:
  """The call of a layer that is not Flax's, by ours."""

  def get(name: str) -> Any:
    variable = getattr(layer, name, None)
    return None if variable is None else variable[...]

  def put(name: str, value: Any) -> None:
    write(layer, getattr(layer, name), value)

  arguments = bound(functools.partial(kind.__call__, layer), *args, **kwargs)
  return run(reading, layer, arguments, get, put, **options)


def become(layer: Any, kind: Any, new: Any) -> None:
  """Makes of a layer one like a new one, with the variables that it has."""
  own = vars(layer)
  for name, value in vars(new).items():
    if name.startswith("_pytree__"):
      continue
    if not isinstance(value, nnx.Variable):
      if not isinstance(own.get(name), nnx.Variable):
        setattr(layer, name, value)
    elif own.get(name) is None:
      # In a stack of layers each has one.
      stacked = layer.mean.shape[:-1] if layer.mean.size != math.prod(new.mean.shape) else ()
      start = jnp.broadcast_to(value[...], (*stacked, *value.shape))
      setattr(layer, name, type(value)(start))
  classes: Any = type(layer), kind, type(new)
  layer.__class__ = with_mixin(*classes)


@contextlib.contextmanager
def here(layer: Any) -> Iterator[None]:
  """Within it, a layer has no axis that is not bound here."""
  before = {v: getattr(layer, v) for v in ("axis_name", "axis_index_groups") if hasattr(layer, v)}
  now = _bound_axes.here(before)
  for name in before:
    setattr(layer, name, now[name])
  try:
    yield
  finally:
    for name, value in before.items():
      setattr(layer, name, value)
