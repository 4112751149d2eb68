"""Flax Linen: the calls of some layers, intercepted; and a module all of whose calls are."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jaxbn.linen._common import mended
from jaxbn.surgery._foreign import Foreign, bound, run

BATCH_NORMS = (nn.BatchNorm,)  # ours are of its class too

# A context of JAX's, so that what jit has traced without an interceptor is not used under it.
_intercepted = jax.make_user_context(None)


class Call(NamedTuple):
  """One call of a layer: of a Flax layer's own `__call__`, whatever a subclass makes around it."""

  layer: Any  # bound
  arguments: dict[str, Any]  # by their names
  kind: type  # the class whose `__call__` this is
  run: Callable[[], Any]  # the call as it is
  made: list[Any]  # layers that run instead of others, now

  def places(self) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Of each of the layer's variables by name its place and its value."""
    return {
      name: ((collection, *self.layer.path, name), value)
      for collection, leaves in self.layer.variables.items()
      for name, value in leaves.items()
    }

  def run_instead(self, make: Callable[..., Any], options: dict[str, Any], **changed: Any) -> Any:
    """Calls another layer with the variables of this one, and these arguments changed."""
    given = {name: v for name, v in (self.arguments | changed).items() if v is not None}
    # Made where it belongs: else Flax would take it for a part of the layer.
    layer = make(**options, parent=self.layer.scope)
    self.made.append(layer)
    try:
      return mended(type(layer).__call__)(layer, **given)
    finally:
      self.made.pop()

  def run_foreign(self, reading: Foreign, **options: Any) -> Any:
    """The call of a layer that is not Flax's, by ours."""
    places = self.places()

    def get(name: str) -> Any:
      return places[name][1] if name in places else None

    def put(name: str, value: jax.Array) -> None:
      self.layer.put_variable(places[name][0][0], name, value)

    return run(reading, self.layer, self.arguments, get, put, **options)


def options(layer: Any, kind: type) -> dict[str, Any]:
  """The constructor's arguments of a layer, as one of this kind."""
  fields = [f.name for f in dataclasses.fields(kind) if f.init and f.name not in ("parent", "name")]
  return {name: getattr(layer, name) for name in fields}


def is_library(thing: Any) -> bool:
  """Whether a class or a function is Flax's or ours, and not a user's."""
  return thing.__module__.partition(".")[0] in ("flax", "jaxbn") and "surgery" not in vars(thing)


def library_class(cls: type) -> type:
  """The class of Flax's or ours that a class is, or is derived of; else itself."""
  return next((c for c in cls.__mro__ if is_library(c) and c.__name__ != "Module"), cls)


Around = Callable[[Call], Any]


@contextlib.contextmanager
def intercepting(
  around: Around,
  kinds: Collection[type] = BATCH_NORMS,
  others: set[str] | None = None,
  nested: bool = False,
) -> Iterator[None]:
  """Within it, calls of layers of these kinds are what `around` makes of them.

  Not of those that `around` makes; nor of others within such a layer, unless `nested`. A kind's
  `__call__` is what counts: of a subclass that calls it, not the subclass's own. The names of all
  other classes that are called go into `others`.
  """
  others = set() if others is None else others
  interceptor = _interceptor(around, tuple(kinds), others, nested)
  with _intercepted(around), nn.intercept_methods(interceptor):
    yield


def _interceptor(
  around: Around, kinds: tuple[type, ...], others: set[str], nested: bool
) -> Callable[..., Any]:
  inside = contextvars.ContextVar("inside", default=False)
  made: list[Any] = []

  def intercept(
    next_function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    layer: Any = context.module
    if inside.get() or context.method_name != "__call__" or not isinstance(layer, kinds):
      others.add(type(layer).__name__)
      return next_function(*args, **kwargs)
    wanted = next(c for c in type(layer).__mro__ if c in kinds)
    function: Any = context.orig_method
    if any(layer is own for own in made):
      return next_function(*args, **kwargs)
    if is_library(function.func) != is_library(inspect.unwrap(wanted.__call__)):
      return next_function(*args, **kwargs)  # a subclass's, which may call the one that is meant
    kind = library_class(type(layer)) if is_library(wanted) else wanted
    arguments = bound(function, *args, **kwargs)
    token = inside.set(not nested)
    try:
      return around(Call(layer, arguments, kind, lambda: next_function(*args, **kwargs), made))
    finally:
      inside.reset(token)

  return intercept


def intercepted(
  model: nn.Module,
  around: Around,
  kinds: Collection[type] = BATCH_NORMS,
  finished: Callable[[set[str]], None] = lambda others: None,
  **members: Any,
) -> Any:
  """The same module, of a class of its own, whose methods run under `intercepting`.

  So it is whether it is applied, initialized or bound, or a part of another module. `finished` is
  called after each `__call__`, with the classes that were called; members are of the class.
  """
  cls: Any = type(model)
  others: set[str] = set()
  active = contextvars.ContextVar("active", default=False)

  @contextlib.contextmanager
  def once() -> Iterator[None]:
    token = active.set(True)
    try:
      with intercepting(around, kinds, others):
        yield
    finally:
      active.reset(token)

  def under(name: str, method: Callable[..., Any]) -> Any:
    def function(self: Any, *args: Any, **kwargs: Any) -> Any:
      with contextlib.nullcontext() if active.get() else once():
        result = method(self, *args, **kwargs)
      if name == "__call__":
        finished(others)
      return result

    function.__name__, function.__doc__ = name, method.__doc__
    about = {"__signature__": inspect.signature(method), "surgery": True}
    vars(function).update(about)
    return nn.nowrap(function)

  methods = {name: under(name, getattr(cls, name)) for name in _methods(cls)}
  about = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
  same = type(cls)(cls.__name__, (cls,), {**about, **methods, "surgery": True, **members})
  fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init}
  return same(**fields)


def _methods(cls: Any) -> list[str]:
  """The methods of a class, and those of every module that run a function of it."""
  others = {*dir(nn.Module), "setup", *(f.name for f in dataclasses.fields(cls))}

  def is_method(name: str) -> bool:
    function = inspect.getattr_static(cls, name, None)
    wrapped = not hasattr(function, "nowrap") or hasattr(function, "surgery")
    return inspect.isfunction(function) and wrapped

  names = {name for name in dir(cls) if not name.startswith("__")} - others | {"__call__"}
  return [*filter(is_method, sorted(names)), "apply", "init", "init_with_output", "lazy_init"]
