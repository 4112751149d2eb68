"""Batch normalization as seven libraries offer it, behind one interface.

Each adapter builds a library's own layer, as its users would, for channels-last NumPy arrays of one
shape and dtype: epsilon 1e-5, momentum 0.99 (PyTorch writes 0.01), scale and bias in float32, and a
result of the input's dtype, which in half precision takes a word to every library but PyTorch. What
JAX runs is compiled once, by `jax.jit`; PyTorch runs as it comes, eagerly.

Every library is optional: `missing` says in one sentence which one is not there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5
MOMENTUM = 0.99
DEVICES, AXIS = 4, "devices"  # of SHARED
Array = np.ndarray
# (parameters, state, x, train) -> (y, new state): what every library's layer becomes in JAX.
Apply = Callable[[Any, Any, Any, bool], tuple[Any, Any]]


@dataclass(frozen=True)
class Layer:
  """One library's layer, for inputs of one shape and dtype, in its own kind of array.

  Attributes:
    evaluate: x to y, by the running statistics.
    train: x to (y, new statistics), without what a derivative would need.
    gradients: (x, cotangent) to (y, gradients of x, scale and bias, new statistics). y is among the
      results because in a network the next layer reads it; nothing may leave it out.
    put: a NumPy array to the library's, in the library's layout.
    get: y, or the gradient of x, back to NumPy in float32 or the dtype it has.
    wait: returns when its argument has been computed.
  """

  evaluate: Callable[[Any], Any]
  train: Callable[[Any], Any]
  gradients: Callable[[Any, Any], Any]
  put: Callable[[Array], Any]
  get: Callable[[Any], Array]
  wait: Callable[[Any], Any]


@dataclass(frozen=True)
class Framework:
  """How to build a library's layer, and what has to be installed for it.

  Attributes:
    build: shape and dtype (a NumPy one) to a Layer.
    module: the library, as it is imported.
    distribution: as it is installed.
    note: what it cannot do, or does its own way, in a sentence; empty where there is nothing.
  """

  build: Callable[[tuple[int, ...], Any], Layer]
  module: str
  distribution: str
  note: str = ""


def missing(name: str) -> str | None:
  """Why a framework of FRAMEWORKS is left out, in a sentence; None where it is there."""
  framework = FRAMEWORKS[name]
  if importlib.util.find_spec(framework.module) is not None:
    return None
  return f"{name} is left out: {framework.distribution} is not installed."


def cores() -> int:
  """The processors that this process may use, which is how many threads JAX takes."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _jaxbn(shape: tuple[int, ...], dtype: Any, axis_name: str | None = None) -> Layer:
  import jaxbn

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    scale, bias = parameters
    return jaxbn.batch_norm(
      x,
      scale,
      bias,
      state,
      use_running_average=not train,
      momentum=MOMENTUM,
      epsilon=EPSILON,
      dtype=dtype,
      axis_name=axis_name,
    )

  parameters = jnp.ones(shape[-1]), jnp.zeros(shape[-1])
  return _jax_layer(apply, parameters, jaxbn.init(shape[-1]), axis_name)


def _jaxbn_stateless(shape: tuple[int, ...], dtype: Any) -> Layer:
  """Without running statistics: bfloat16 then has a pivot, too. In evaluation, those of nothing."""
  import jaxbn

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    scale, bias = parameters
    statistics = None if train else state
    y, _ = jaxbn.batch_norm(
      x, scale, bias, statistics, use_running_average=not train, epsilon=EPSILON, dtype=dtype
    )
    return y, state

  parameters = jnp.ones(shape[-1]), jnp.zeros(shape[-1])
  return _jax_layer(apply, parameters, jaxbn.init(shape[-1]))


def _jaxbn_linen(shape: tuple[int, ...], dtype: Any) -> Layer:
  import jaxbn.linen

  return _linen_layer(jaxbn.linen.BatchNorm, shape, dtype)


def _jaxbn_nnx(shape: tuple[int, ...], dtype: Any) -> Layer:
  import jaxbn.nnx

  return _nnx_layer(jaxbn.nnx.BatchNorm, shape, dtype)


def _flax_linen(shape: tuple[int, ...], dtype: Any, axis_name: str | None = None) -> Layer:
  import flax.linen

  return _linen_layer(flax.linen.BatchNorm, shape, dtype, axis_name=axis_name)


def _flax_two_pass(shape: tuple[int, ...], dtype: Any) -> Layer:
  import flax.linen

  return _linen_layer(flax.linen.BatchNorm, shape, dtype, use_fast_variance=False)


def _flax_nnx(shape: tuple[int, ...], dtype: Any) -> Layer:
  from flax import nnx

  return _nnx_layer(nnx.BatchNorm, shape, dtype)


def _linen_layer(module: Any, shape: tuple[int, ...], dtype: Any, **options: Any) -> Layer:
  layer = module(momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype, **options)
  empty = jnp.zeros((2, *shape[1:]), dtype)
  variables = layer.init(jax.random.key(0), empty, use_running_average=True)

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    variables = {"params": parameters, "batch_stats": state}
    if not train:
      return layer.apply(variables, x, use_running_average=True), state
    y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    return y, updates["batch_stats"]

  return _jax_layer(apply, variables["params"], variables["batch_stats"], layer.axis_name)


def _nnx_layer(module: Any, shape: tuple[int, ...], dtype: Any) -> Layer:
  """By split and merge under `jax.jit`: what `nnx.jit` does, without what it costs each call."""
  from flax import nnx

  layer = module(shape[-1], momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype, rngs=nnx.Rngs(0))
  split: Any = nnx.split(layer, nnx.Param, nnx.BatchStat)
  definition, parameters, state = split

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    layer = nnx.merge(definition, parameters, state, copy=True)  # or vjp could not update it
    y = layer(x, use_running_average=not train)
    return y, nnx.state(layer, nnx.BatchStat)

  return _jax_layer(apply, parameters, state)


def _haiku(shape: tuple[int, ...], dtype: Any, axis_name: str | None = None) -> Layer:
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


def _equinox(shape: tuple[int, ...], dtype: Any, axis_name: str | None = None) -> Layer:
  import equinox as eqx

  layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
    shape[-1],
    "batch" if axis_name is None else ("batch", axis_name),
    eps=EPSILON,
    momentum=MOMENTUM,
    mode="batch",
  )
  parameters, static = eqx.partition(layer, eqx.is_inexact_array)

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    layer = eqx.nn.inference_mode(eqx.combine(parameters, static), not train)
    over_batch = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    y, new_state = over_batch(x.astype(jnp.float32), state)
    return y.astype(dtype), new_state

  return _jax_layer(
    apply,
    parameters,
    state,
    axis_name,
    put=lambda x: np.ascontiguousarray(np.moveaxis(x, -1, 1)),
    get=lambda y: np.moveaxis(y, 1, -1),
  )


def _keras(shape: tuple[int, ...], dtype: Any) -> Layer:
  os.environ["KERAS_BACKEND"] = "jax"
  import keras

  name = np.dtype(dtype).name
  layer = keras.layers.BatchNormalization(
    momentum=MOMENTUM,
    epsilon=EPSILON,
    dtype=name if name == "float32" else f"mixed_{name}",
  )
  layer.build(shape)

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    return layer.stateless_call(parameters, state, x, training=train)

  parameters = [variable.value for variable in layer.trainable_variables]
  return _jax_layer(apply, parameters, [v.value for v in layer.non_trainable_variables])


def _torch_shared(shape: tuple[int, ...], dtype: Any) -> Layer:
  """What SyncBatchNorm does where it runs: a GPU's kernels, which refuse a CPU, by their formulas.

  Each device's mean and 1 / sqrt(var + epsilon) are gathered, and merged one after the other
  (batch_norm_gather_stats_with_counts, in ATen's Normalization.cuh).
  """

  def apply(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    scale, bias = parameters
    mean = jnp.mean(x, 0)
    r = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), 0) + EPSILON)
    means, rs = jax.lax.all_gather((mean, r), AXIS)
    n, mean, squares = 0, jnp.zeros_like(mean), jnp.zeros_like(mean)
    for one, r in zip(means, rs, strict=True):
      distance = mean - one
      squares += (1 / jnp.square(r) - EPSILON) * len(x)
      squares += jnp.square(distance) * len(x) * n / (n + len(x))
      mean = (n * mean + len(x) * one) / (n + len(x))
      n += len(x)
    return (x - mean) * jax.lax.rsqrt(squares / n + EPSILON) * scale + bias, state

  return _jax_layer(apply, (jnp.ones(shape[-1]), jnp.zeros(shape[-1])), jnp.zeros(()), AXIS)


def _jax_layer(
  apply: Apply,
  parameters: Any,
  state: Any,
  axis_name: str | None = None,
  *,
  put: Callable[[Array], Array] = lambda x: x,
  get: Callable[[Array], Array] = lambda y: y,
) -> Layer:
  """What the libraries in JAX have in common; put and get change the layout where it differs.

  With an axis_name, the batch is cut over so many DEVICES, as vmap has them.
  """
  if axis_name is not None:
    apply = _over_devices(apply, axis_name)

  def forward(train: bool) -> Callable[..., Any]:
    return jax.jit(lambda parameters, state, x: apply(parameters, state, x, train))

  @jax.jit
  def gradients(parameters: Any, state: Any, x: Any, cotangent: Any) -> Any:
    def of(parameters: Any, x: Any) -> tuple[Any, Any]:
      return apply(parameters, state, x, True)

    y, pullback, new_state = jax.vjp(of, parameters, x, has_aux=True)
    of_parameters, of_x = pullback(cotangent)
    return y, (of_x, of_parameters), new_state

  evaluate, train = forward(False), forward(True)
  return Layer(
    evaluate=lambda x: evaluate(parameters, state, x)[0],
    train=lambda x: train(parameters, state, x),
    gradients=lambda x, cotangent: gradients(parameters, state, x, cotangent),
    put=lambda x: jnp.asarray(put(x)),
    get=lambda y: get(np.asarray(y)),
    wait=jax.block_until_ready,
  )


def _over_devices(apply: Apply, axis_name: str) -> Apply:
  def over_devices(parameters: Any, state: Any, x: Any, train: bool) -> tuple[Any, Any]:
    parts = x.reshape(DEVICES, -1, *x.shape[1:])
    y, state = jax.vmap(
      lambda x: apply(parameters, state, x, train), axis_name=axis_name, out_axes=(0, None)
    )(parts)
    return y.reshape(x.shape), state

  return over_devices


def _torch(shape: tuple[int, ...], dtype: Any) -> Layer:
  """On tensors that are channels-last in memory, which is what the others get, without a copy."""

  def put(x: Any) -> Any:
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x

  def get(y: Any) -> Any:
    return y.permute(0, 2, 3, 1) if y.ndim == 4 else y

  return _torch_layer(shape, dtype, put, get)


def _torch_channels_first(shape: tuple[int, ...], dtype: Any) -> Layer:
  """On tensors that are channels-first in memory; a matrix becomes one long example."""

  def put(x: Any) -> Any:
    return (x.permute(0, 3, 1, 2) if x.ndim == 4 else x.T[None]).contiguous()

  def get(y: Any) -> Any:
    return y.permute(0, 2, 3, 1) if y.ndim == 4 else y[0].T

  return _torch_layer(shape, dtype, put, get)


def _torch_layer(
  shape: tuple[int, ...], dtype: Any, layout: Callable[[Any], Any], undo: Callable[[Any], Any]
) -> Layer:
  import torch

  torch.set_num_threads(cores())
  kind = {2: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(shape)]
  layer = kind(shape[-1], eps=EPSILON, momentum=1 - MOMENTUM)
  evaluating = kind(shape[-1], eps=EPSILON).eval()

  def put(x: Array) -> Any:
    return layout(torch.from_numpy(x.astype(np.float32)).to(getattr(torch, np.dtype(dtype).name)))

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

  return Layer(
    evaluate,
    train,
    gradients,
    put,
    get=lambda y: undo(y).detach().float().numpy(),
    wait=lambda result: result,
  )


# jaxbn's ways in first, then the others.
FRAMEWORKS = {
  "jaxbn": Framework(_jaxbn, "jaxbn", "jaxbn"),
  "jaxbn without state": Framework(_jaxbn_stateless, "jaxbn", "jaxbn"),
  "jaxbn.linen": Framework(_jaxbn_linen, "jaxbn", "jaxbn"),
  "jaxbn.nnx": Framework(_jaxbn_nnx, "jaxbn", "jaxbn"),
  "flax.linen": Framework(_flax_linen, "flax", "flax"),
  "flax.linen two-pass": Framework(
    _flax_two_pass, "flax", "flax", "flax.linen two-pass is use_fast_variance=False."
  ),
  "flax.nnx": Framework(_flax_nnx, "flax", "flax"),
  "haiku": Framework(
    _haiku,
    "haiku",
    "dm-haiku",
    "Haiku has no dtype of its own: its policy keeps all but the result in float32.",
  ),
  "equinox": Framework(
    _equinox,
    "equinox",
    "equinox",
    "Equinox takes channels first, so it is given channels first, and has no dtype of its own: "
    "half-precision input is widened before it and its result rounded after it.",
  ),
  "keras": Framework(_keras, "keras", "keras", "Keras runs on its JAX backend."),
  "torch": Framework(
    _torch,
    "torch",
    "torch",
    "PyTorch runs eagerly, on channels-last memory, with as many threads as JAX.",
  ),
  "torch channels-first": Framework(
    _torch_channels_first,
    "torch",
    "torch",
    "PyTorch is the more exact where memory is channels-first, and is measured there as well.",
  ),
}


def _shared(build: Callable[..., Layer]) -> Callable[[tuple[int, ...], Any], Layer]:
  return lambda shape, dtype: build(shape, dtype, AXIS)


# With statistics that devices share: the same layers, by the option that each has for it.
SHARED = {
  "jaxbn": Framework(_shared(_jaxbn), "jaxbn", "jaxbn"),
  "flax.linen": Framework(_shared(_flax_linen), "flax", "flax"),
  "haiku": Framework(_shared(_haiku), "haiku", "dm-haiku"),
  "equinox": Framework(_shared(_equinox), "equinox", "equinox"),
  "torch SyncBatchNorm": Framework(
    _torch_shared, "jax", "jax", "PyTorch's SyncBatchNorm refuses CPUs, and is here by its formula."
  ),
}
