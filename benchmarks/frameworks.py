"""Batch normalization as seven libraries offer it, behind one interface.

Each adapter builds a library's own layer, as its users would, for channels-last NumPy arrays of one
shape and dtype: epsilon 1e-5, momentum 0.99 (PyTorch writes 0.01), scale and bias in float32, and a
result of the input's dtype, which in half precision takes a word to every library but PyTorch. What
JAX runs is compiled once, by `jax.jit`; PyTorch runs as it comes, eagerly.

Every library is optional: `missing` says in one sentence which one is not there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5
MOMENTUM = 0.99
TWICE = "flax.linen twice"
DEVICES, AXIS = 4, "devices"  # of SHARED
DISTRIBUTIONS = {"haiku": "dm-haiku"}  # where it is installed by another name than imported
Array = np.ndarray
Shape = tuple[int, ...]
# (parameters, state, x, train) -> (y, new state): what every library's layer becomes in JAX.
Apply = Callable[[Any, Any, Any, bool], tuple[Any, Any]]


class Layer(NamedTuple):
  """One library's layer, for inputs of one shape and dtype, in its own kind of array.

  y is among the results of `gradients` because in a network the next layer reads it; nothing may
  leave it out.
  """

  evaluate: Callable[[Any], Any]  # x to y, by the running statistics
  train: Callable[[Any], Any]  # x to (y, new statistics), without what a derivative would need
  gradients: Callable[[Any, Any], Any]  # (x, dy) to (y, of (x, scale, bias), new statistics)
  put: Callable[[Array], Any]  # a NumPy array to the library's, in the library's layout
  get: Callable[[Any], Array]  # y, or the gradient of x, back to NumPy
  wait: Callable[[Any], Any]  # returns when its argument has been computed


def missing(name: str) -> str | None:
  """Why a framework of FRAMEWORKS is left out, in a sentence; None where it is there."""
  module = re.split("[ .]", name)[0]
  if importlib.util.find_spec(module) is not None:
    return None
  return f"{name} is left out: {DISTRIBUTIONS.get(module, module)} is not installed."


def cores() -> int:
  """The processors that this process may use, which is how many threads JAX takes."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _jaxbn(
  shape: Shape, dtype: Any, axis_name: str | None = None, stateless: bool = False
) -> Layer:
  """Without running statistics in training, bfloat16 has a pivot, too."""
  import jaxbn

  options = {"momentum": MOMENTUM, "epsilon": EPSILON, "dtype": dtype, "axis_name": axis_name}

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    scale, bias = parameters
    given = None if train and stateless else state
    y, new = jaxbn.batch_norm(x, scale, bias, given, use_running_average=not train, **options)
    return y, state if stateless else new

  parameters = jnp.ones(shape[-1]), jnp.zeros(shape[-1])
  return _jax_layer(apply, parameters, jaxbn.init(shape[-1]), axis_name)


def _linen(package: str, shape: Shape, dtype: Any, **options: Any) -> Layer:
  module = importlib.import_module(package).BatchNorm
  layer = module(momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype, **options)
  empty = jnp.zeros((2, *shape[1:]), dtype)
  variables = layer.init(jax.random.key(0), empty, use_running_average=True)

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    variables = {"params": parameters, "batch_stats": state}
    y, new = layer.apply(variables, x, use_running_average=not train, mutable=["batch_stats"])
    return y, new["batch_stats"]

  axis_name = options.get("axis_name")
  return _jax_layer(apply, variables["params"], variables["batch_stats"], axis_name)


def _nnx(package: str, shape: Shape, dtype: Any) -> Layer:
  """By split and merge under `jax.jit`: what `nnx.jit` does, without what it costs each call."""
  from flax import nnx

  module = importlib.import_module(package).BatchNorm
  layer = module(shape[-1], momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype, rngs=nnx.Rngs(0))
  split: Any = nnx.split(layer, nnx.Param, nnx.BatchStat)
  definition, parameters, state = split

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    layer = nnx.merge(definition, parameters, state, copy=True)  # or vjp could not update it
    y = layer(x, use_running_average=not train)
    return y, nnx.state(layer, nnx.BatchStat)

  return _jax_layer(apply, parameters, state)


def _haiku(shape: Shape, dtype: Any, axis_name: str | None = None) -> Layer:
  """In half precision by the policy of Haiku's ImageNet example: all but the result in float32."""
  import haiku as hk
  import jmp

  policy = jmp.Policy(jnp.float32, jnp.float32, dtype)

  def transformed(axis_name: str | None) -> Any:
    def normalize(x: Any, train: bool) -> Any:
      with hk.mixed_precision.push_policy(hk.BatchNorm, policy):
        layer = hk.BatchNorm(True, True, MOMENTUM, eps=EPSILON, cross_replica_axis=axis_name)
        return layer(x, train)

    return hk.transform_with_state(normalize)

  parameters, state = transformed(None).init(None, jnp.zeros((2, *shape[1:]), dtype), True)
  layer = transformed(axis_name)

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    return layer.apply(parameters, state, None, x, train)

  return _jax_layer(apply, parameters, state, axis_name)


def _equinox(shape: Shape, dtype: Any, axis_name: str | None = None) -> Layer:
  import equinox as eqx

  make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
  axes = "batch" if axis_name is None else ("batch", axis_name)
  layer, state = make(shape[-1], axes, eps=EPSILON, momentum=MOMENTUM, mode="batch")
  parameters, static = eqx.partition(layer, eqx.is_inexact_array)

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    layer = eqx.nn.inference_mode(eqx.combine(parameters, static), not train)
    over_batch = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    y, new_state = over_batch(x.astype(jnp.float32), state)
    return y.astype(dtype), new_state

  def put(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))

  return _jax_layer(apply, parameters, state, axis_name, put, lambda y: np.moveaxis(y, 1, -1))


def _keras(shape: Shape, dtype: Any) -> Layer:
  os.environ["KERAS_BACKEND"] = "jax"
  import keras

  name = np.dtype(dtype).name
  policy = name if name == "float32" else f"mixed_{name}"
  layer = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=policy)
  layer.build(shape)

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    return layer.stateless_call(parameters, state, x, training=train)

  parameters = [variable.value for variable in layer.trainable_variables]
  return _jax_layer(apply, parameters, [v.value for v in layer.non_trainable_variables])


def _torch_shared(shape: Shape, dtype: Any, axis_name: str) -> Layer:
  """What SyncBatchNorm does where it runs: a GPU's kernels, which refuse a CPU, by their formulas.

  Each device's mean and 1 / sqrt(var + epsilon) are gathered, and merged one after the other
  (batch_norm_gather_stats_with_counts, in ATen's Normalization.cuh).
  """

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    scale, bias = parameters
    mean = jnp.mean(x, 0)
    r = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), 0) + EPSILON)
    means, rs = jax.lax.all_gather((mean, r), axis_name)
    n, mean, squares = 0, jnp.zeros_like(mean), jnp.zeros_like(mean)
    for one, r in zip(means, rs, strict=True):
      distance = mean - one
      squares += (1 / jnp.square(r) - EPSILON) * len(x)
      squares += jnp.square(distance) * len(x) * n / (n + len(x))
      mean = (n * mean + len(x) * one) / (n + len(x))
      n += len(x)
    return (x - mean) * jax.lax.rsqrt(squares / n + EPSILON) * scale + bias, state

  parameters = jnp.ones(shape[-1]), jnp.zeros(shape[-1])
  return _jax_layer(apply, parameters, jnp.zeros(()), axis_name)


def _jax_layer(
  apply: Apply,
  parameters: Any,
  state: Any,
  axis_name: str | None = None,
  put: Callable[[Array], Array] = lambda x: x,
  get: Callable[[Array], Array] = lambda y: y,
) -> Layer:
  """What the libraries in JAX have in common; put and get change the layout where it differs.

  With an axis_name, the batch is cut over so many DEVICES, as vmap has them.
  """

  def on_devices(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    if axis_name is None:
      return apply(parameters, state, x, train)
    every = jax.vmap(
      lambda part: apply(parameters, state, part, train), axis_name=axis_name, out_axes=(0, None)
    )
    y, state = every(x.reshape(DEVICES, -1, *x.shape[1:]))
    return y.reshape(x.shape), state

  @jax.jit
  def gradients(parameters: Any, state: Any, x: Any, cotangent: Any) -> Any:
    def of(parameters: Any, x: Any) -> tuple[Any, Any]:
      return on_devices(parameters, state, x, True)

    y, pullback, new_state = jax.vjp(of, parameters, x, has_aux=True)
    of_parameters, of_x = pullback(cotangent)
    return y, (of_x, of_parameters), new_state

  evaluate, train = (jax.jit(partial(on_devices, train=t)) for t in (False, True))
  return Layer(
    evaluate=lambda x: evaluate(parameters, state, x)[0],
    train=lambda x: train(parameters, state, x),
    gradients=lambda x, cotangent: gradients(parameters, state, x, cotangent),
    put=lambda x: jnp.asarray(put(x)),
    get=lambda y: get(np.asarray(y)),
    wait=jax.block_until_ready,
  )


def _torch(shape: Shape, dtype: Any, channels_first: bool = False) -> Layer:
  """On tensors that are channels-last in memory, which is what the others get, without a copy.

  Or on tensors that are channels-first in memory; a matrix becomes one long example.
  """
  import torch

  torch.set_num_threads(cores())
  kind = {2: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(shape)]
  layer = kind(shape[-1], eps=EPSILON, momentum=1 - MOMENTUM)
  evaluating = kind(shape[-1], eps=EPSILON).eval()
  matrix = len(shape) == 2

  def put(x: Array) -> Any:
    given = torch.from_numpy(x.astype(np.float32)).to(getattr(torch, np.dtype(dtype).name))
    if not channels_first:
      return given if matrix else given.permute(0, 3, 1, 2)
    return (given.T[None] if matrix else given.permute(0, 3, 1, 2)).contiguous()

  def get(y: Any) -> Array:
    if not matrix:
      y = y.permute(0, 2, 3, 1)
    elif channels_first:
      y = y[0].T
    return y.detach().float().numpy()

  def evaluate(x: Any) -> Any:
    with torch.inference_mode():
      return evaluating(x)

  def train(x: Any) -> Any:
    with torch.no_grad():
      return layer(x), layer.running_mean, layer.running_var

  def gradients(x: Any, cotangent: Any) -> Any:
    x = x.detach().requires_grad_(True)  # a view: no copy
    y = layer(x)
    of = torch.autograd.grad(y, [x, layer.weight, layer.bias], cotangent)
    return y, of, (layer.running_mean, layer.running_var)

  return Layer(evaluate, train, gradients, put, get, wait=lambda result: result)


# How to build each layer for a shape and a NumPy dtype: jaxbn's ways in first, then the others'. A
# name begins with the module that is imported.
FRAMEWORKS: dict[str, Callable[..., Layer]] = {
  "jaxbn": _jaxbn,
  "jaxbn without state": partial(_jaxbn, stateless=True),
  "jaxbn.linen": partial(_linen, "jaxbn.linen"),
  "jaxbn.nnx": partial(_nnx, "jaxbn.nnx"),
  "flax.linen": partial(_linen, "flax.linen"),
  TWICE: partial(_linen, "flax.linen"),  # beside itself
  "flax.linen two-pass": partial(_linen, "flax.linen", use_fast_variance=False),
  "flax.nnx": partial(_nnx, "flax.nnx"),
  "haiku": _haiku,
  "equinox": _equinox,
  "keras": _keras,
  "torch": _torch,
  "torch channels-first": partial(_torch, channels_first=True),
}
# With statistics that devices share: the same layers, by the option that each has for it.
SHARED = {
  name: partial(FRAMEWORKS.get(name, _torch_shared), axis_name=AXIS)
  for name in ("jaxbn", "flax.linen", "haiku", "equinox", "torch SyncBatchNorm")
}
