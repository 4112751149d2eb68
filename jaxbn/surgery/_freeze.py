"""Freeze: batch norms evaluate, while the rest trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from jaxbn.surgery import _linen, _nnx
from jaxbn.surgery._foreign import Foreign, bound
from jaxbn.surgery._layer import Layer, nothing, of_call, of_node

Where = Callable[[str, Layer], bool]


def freeze(
  model: Any,
  *,
  where: Where | None = None,
  foreign: Mapping[type, Foreign] | None = None,
  copy: bool = True,
) -> Any:
  """A network whose batch norms normalize by their running statistics, and leave them as they are.

  Whatever mode they are asked for: `train=True`, and in NNX `model.train()` too, is for the rest,
  such as dropout. Wanted where batches are small or of other data than those it was trained on, as
  in fine-tuning for detection. Scale and bias go on learning: `param_labels` names them for an
  optimizer that shall not. The network that is given trains on as before.

  Args:
    model: a module of Flax Linen or NNX.
    where: whether a layer is frozen, as a function of its path and its description (`Layer`);
      default, all.
    foreign: batch norms that are not Flax's, by their class, and how to read them.
    copy: of an NNX module, False changes the one that is given.

  Returns:
    A module, of a subclass of its own in Linen, with the same variables.

  Raises:
    ValueError: nothing was frozen: of NNX now, of Linen when the result was called.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.surgery
  >>> model = nn.BatchNorm(use_running_average=False)
  >>> x = jnp.array([[1.0], [3.0]])
  >>> frozen = jaxbn.surgery.freeze(model)
  >>> print(frozen.apply(model.init(jax.random.key(0), x), x).ravel())
  [0.999995 2.999985]
  """
  readings = dict(foreign or {})
  if isinstance(model, nn.Module):
    if not copy:
      raise ValueError("copy=False is for NNX: a Linen module is never changed. Use the result.")
    return _in_linen(model, where, readings)
  return _in_nnx(nnx.clone(model) if copy else model, where, readings)


def _in_linen(model: nn.Module, where: Where | None, foreign: dict[type, Foreign]) -> Any:
  frozen: set[str] = set()
  refused: set[str] = set()

  def around(call: _linen.Call) -> Any:
    reading = foreign.get(call.kind)
    layer = of_call(call, reading)
    if where is not None and not where(layer.path, layer):
      refused.add(layer.path)
      return call.run()
    frozen.add(layer.path)
    if reading is None:
      options = _linen.options(call.layer, call.kind) | {"use_running_average": True}
      return call.run_instead(call.kind, options, use_running_average=None)
    initializing = call.layer.is_initializing()
    return call.run() if initializing else call.run_foreign(reading, evaluating=True)

  def finished(others: set[str]) -> None:
    if not frozen:
      raise ValueError(nothing("frozen", model, others, refused))

  return _linen.intercepted(model, around, (*_linen.BATCH_NORMS, *foreign), finished)


class _Frozen(nnx.Module):
  surgery_frozen: Any  # the class whose call this is, and how it is read

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    kind, reading = self.surgery_frozen
    if reading:
      return _nnx.run_foreign(self, kind, reading, args, kwargs, evaluating=True)
    call = bound(functools.partial(kind.__call__, self), *args, **kwargs)
    return super().__call__(**call | {"use_running_average": True})


def _in_nnx(model: Any, where: Where | None, foreign: dict[type, Foreign]) -> Any:
  frozen, refused = 0, []
  for path, node, kind in _nnx.layers(model, (*_nnx.BATCH_NORMS, *foreign)):
    reading = foreign.get(kind)
    layer = of_node(path, node, kind, reading)
    if where is None or where(layer.path, layer):
      node.surgery_frozen = kind, reading
      cls: Any = type(node)
      node.__class__ = _nnx.with_mixin(cls, kind, _Frozen)
      frozen += 1
    else:
      refused.append(layer.path)
  if not frozen:
    raise ValueError(nothing("frozen", model, _nnx.classes(model), refused))
  return model
