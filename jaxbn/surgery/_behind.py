"""A network in which a norm stands behind each of some layers, for Linen and NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn.linen import BatchNorm as LinenBatchNorm
from jaxbn.nnx import BatchNorm as NnxBatchNorm
from jaxbn.surgery import _linen, _nnx
from jaxbn.surgery._abstract import shapes_of_variables
from jaxbn.surgery._layer import Layer
from jaxbn.surgery._trees import get

IN_LINEN = nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum
IN_NNX = nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral, nnx.Einsum
NAME = "norm"


def in_linen(model: Any, layers: list[Layer], norm: Callable[..., Any] | None) -> Any:
  make = norm or LinenBatchNorm
  paths = {layer.path for layer in layers}

  def around(call: _linen.Call) -> Any:
    y = call.run()
    if "/".join(call.layer.path) not in paths:
      return y
    training = call.layer.is_mutable_collection("batch_stats")
    scope = call.layer.scope.push(NAME, reuse=True)
    return make(use_running_average=not training, parent=scope)(y).astype(y.dtype)

  return _linen.intercepted(model, around, IN_LINEN)


def completed(model: Any, variables: Any, args: Any, arguments: Any) -> Any:
  """The variables, and those of the norms as they start."""
  shapes = shapes_of_variables(model, args, arguments)

  def value(path: Any, a: Any) -> Any:
    there = get(variables, tuple(key.key for key in path))
    return jnp.full(a.shape, path[-1].key in ("scale", "var"), a.dtype) if there is None else there

  return jax.tree_util.tree_map_with_path(value, shapes)


class _Normalized(nnx.Module):
  """A layer and a norm behind it: a mixin."""

  norm: Any

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    y = super().__call__(*args, **kwargs)
    return self.norm(y).astype(y.dtype)


def in_nnx(model: Any, layers: list[Layer], norm: Callable[..., Any] | None) -> Any:
  make = norm or NnxBatchNorm
  copy = nnx.clone(model)
  found = {layer.path: layer for layer in layers}
  for path, node, kind in _nnx.layers(copy, IN_NNX):
    layer = found.get("/".join(map(str, path)))
    if layer is not None:
      made = make(layer.output.shape[-1], use_running_average=True, rngs=nnx.Rngs(0))
      cls: Any = type(node)
      node.__class__ = _nnx.with_mixin(cls, kind, _Normalized)
      setattr(node, NAME, made)
  return copy


def output(model: Any, variables: Any, args: Any, arguments: Any, training: bool = False) -> Any:
  if isinstance(model, nn.Module):
    if not training:
      return model.apply(variables, *args, **arguments)
    return model.apply(variables, *args, mutable=["batch_stats"], **arguments)[0]
  model = nnx.clone(model)
  for _, node in nnx.iter_graph(model):
    if isinstance(node, _Normalized):
      node.norm.use_running_average = not training
  return model(*args, **arguments)
