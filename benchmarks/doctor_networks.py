"""Small networks trained on scikit-learn's digits, of five architectures, for Linen and NNX."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

ARCHITECTURES = ("mlp", "vgg", "resnet", "densenet", "preactivation")
Tree = dict[str, Any]


class Spec(NamedTuple):
  """A network; a number of a layer says which of its batch norms has a peculiarity."""

  architecture: str = "mlp"
  depth: int = 3
  width: int = 16
  momentum: float = 0.9
  biased: int | None = None  # the layer before it has a bias
  frozen: int | None = None  # its constructor says that it evaluates
  twice: int | None = None  # it is called on two kinds of data


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
  """Images in a fixed random order, standardized, and their classes."""
  images, classes = load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(images))
  images = (images - images.mean()) / images.std()
  return images[order].astype(np.float32), classes[order]


def forward(spec: Spec, x: Any, unit: Any, norm: Any, head: Any) -> Any:
  """Both kinds of network, made of numbered units and norms."""
  if spec.architecture != "mlp":
    x = x.reshape(-1, 8, 8, 1)
  if spec.architecture in ("resnet", "preactivation"):
    x = unit(spec.depth, x)  # the stem
  for i in range(spec.depth):
    if spec.architecture == "preactivation":
      x = x + unit(i, nn.relu(norm(i, x)))
      continue
    before = unit(i, x)
    h = norm(i, before)
    if spec.twice == i:
      h = 0.5 * (h + norm(i, 2 * before + 1))
    h = nn.relu(h)
    if spec.architecture == "densenet":
      x = jnp.concatenate([x, h], -1)
    else:
      x = x + h if spec.architecture == "resnet" else h
  return head(x if x.ndim == 2 else x.mean((1, 2)))


class LinenNet(nn.Module):
  spec: Spec

  @nn.compact
  def __call__(self, x: Any, train: bool) -> Any:
    spec, norms = self.spec, {}

    def unit(i: int, x: Any) -> Any:
      options: Tree = {"use_bias": spec.biased == i, "name": f"unit_{i}"}
      flat = spec.architecture == "mlp"
      layer = nn.Dense(spec.width, **options) if flat else nn.Conv(spec.width, (3, 3), **options)
      return layer(x)

    def norm(i: int, x: Any) -> Any:
      if i not in norms:
        norms[i] = nn.BatchNorm(momentum=spec.momentum, name=f"norm_{i}")
      return norms[i](x, use_running_average=not train or spec.frozen == i)

    return forward(spec, x, unit, norm, nn.Dense(10, name="head"))


class NnxNet(nnx.Module):
  def __init__(self, spec: Spec, seed: int):
    rngs, flat = nnx.Rngs(seed), spec.architecture == "mlp"
    wide = [spec.width] * (spec.depth + 1)
    wide[0] = 64 if flat else spec.width if spec.architecture in ("resnet", "preactivation") else 1
    wide[-1] = 1 if wide[0] == spec.width else spec.width  # of the stem
    if spec.architecture == "densenet":
      wide = [1 + i * spec.width for i in range(spec.depth + 1)]

    def unit(i: int) -> Any:
      options: Tree = {"use_bias": spec.biased == i, "rngs": rngs}
      if flat:
        return nnx.Linear(wide[i], spec.width, **options)
      return nnx.Conv(wide[i], spec.width, (3, 3), **options)

    def norm(i: int) -> Any:
      options: Tree = {"use_running_average": True} if spec.frozen == i else {}
      return nnx.BatchNorm(spec.width, momentum=spec.momentum, rngs=rngs, **options)

    self.spec = spec
    self.units = nnx.List([unit(i) for i in range(spec.depth + 1)])
    self.norms = nnx.List([norm(i) for i in range(spec.depth)])
    last = wide[-1] if spec.architecture == "densenet" else spec.width
    self.head = nnx.Linear(last, 10, rngs=rngs)

  def __call__(self, x: Any) -> Any:
    def norm(i: int, x: Any) -> Any:
      # As a constructor freezes it: `train()` sets the flag of all layers.
      frozen = {"use_running_average": True} if self.spec.frozen == i else {}
      return self.norms[i](x, **frozen)

    return forward(self.spec, x, lambda i, x: self.units[i](x), norm, self.head)


class Trained(NamedTuple):
  """A network after training, and what `diagnose` is to be called with."""

  model: Any
  variables: Any
  batches: list[Any]
  arguments: dict[str, Any]
  accuracy: float

  def path(self, i: int) -> str:
    return f"norm_{i}" if isinstance(self.model, nn.Module) else f"norms/{i}"

  def unit(self, i: int) -> str:
    return f"unit_{i}" if isinstance(self.model, nn.Module) else f"units/{i}"


def train(
  spec: Spec, kind: str, *, seed: int = 0, steps: int = 200, batch: int = 64, tracks: bool = True
) -> Trained:
  """With Adam; not `tracks` throws the new running statistics away."""
  images, classes = digits()
  rows = np.random.default_rng(seed).integers(len(images), size=(steps + 8, batch))
  if kind == "linen":
    model: Any = LinenNet(spec)
    whole = dict(model.init(jax.random.key(seed), images[:2], train=False))
    params, stats = whole["params"], whole["batch_stats"]
  else:
    split: Any = nnx.split(NnxNet(spec, seed), nnx.Param, ...)
    graph, params, stats = split

  def apply(params: Any, stats: Any, x: Any) -> Any:
    if kind == "linen":
      variables = {"params": params, "batch_stats": stats}
      y, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
      return y, new["batch_stats"]
    network = nnx.merge(graph, params, stats, copy=True)
    network.train()
    y = network(x)
    parts: Any = nnx.split(network, nnx.Param, ...)
    return y, parts[2]

  params, stats = fit(apply, params, stats, images[rows[:-8]], classes[rows[:-8]], tracks)
  batches = list(images[rows[-8:]])
  if kind == "linen":
    variables = {"params": params, "batch_stats": stats}
    accuracy = np.mean(model.apply(variables, images, train=False).argmax(-1) == classes)
    return Trained(model, variables, batches, {"train": False}, float(accuracy))
  model = nnx.merge(graph, params, stats)
  model.eval()
  return Trained(model, None, batches, {}, float(np.mean(model(images).argmax(-1) == classes)))


def fit(apply: Any, params: Any, stats: Any, xs: Any, ys: Any, tracks: bool) -> Any:
  optimizer = optax.adam(3e-3)

  def loss(params: Any, stats: Any, x: Any, y: Any) -> Any:
    logits, new = apply(params, stats, x)
    mean = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return mean, new

  def step(carry: Any, batch: Any) -> Any:
    params, stats, state = carry
    gradients, new = jax.grad(loss, has_aux=True)(params, stats, *batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), new if tracks else stats, state

  # Not as a scan: on a CPU, XLA's convolutions are slow in one.
  run = jax.jit(step)
  carry = params, stats, optimizer.init(params)
  for x, y in zip(xs, ys, strict=True):
    carry = run(carry, (x, y))
  params, stats, _ = carry
  return params, stats
