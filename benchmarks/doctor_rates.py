"""How often the doctor is right: faults planted in trained networks, and networks without.

  make doctor-rates                  five architectures, Linen and NNX, every fault: minutes
  make doctor-rates ARGS="mlp vgg"   some of them

A hit: the fault that was planted is the first that the doctor names, and the layer is the one that
has it. A false alarm: a healthy network of which it says anything.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxbn
from benchmarks.doctor_networks import ARCHITECTURES, NnxNet, Spec, Trained, train
from jaxbn.diagnostics import Doctor, Finding
from jaxbn.surgery._trees import get, put, tree_of, with_tree

KINDS = ("linen", "nnx")
# How each healthy network was trained: seed, steps, batch.
HEALTHY = ((1, 60, 64), (2, 300, 32), (3, 200, 128))
Planted = tuple[Trained, str, dict[str, Any]]  # the network, the layer, what is said besides


def changed(net: Trained, **leaves: tuple[int, Callable[[Any], Any]]) -> Trained:
  """With other values in some variables of a batch norm, or the kernel before it."""
  tree = tree_of(net.model, net.variables)
  values = {}
  for name, (i, change) in leaves.items():
    owner = net.unit(i) if name == "kernel" else net.path(i)
    place: tuple[Any, ...] = tuple(int(k) if k.isdigit() else k for k in owner.split("/"))
    if net.variables is not None:
      place = ("batch_stats" if name in ("mean", "var") else "params", *place)
    values[(*place, name)] = change(get(tree, (*place, name)))
  new = with_tree(net.model, put(tree, values))
  return net._replace(variables=new) if net.variables is not None else net._replace(model=new)


def recalibrated(net: Trained, batches: list[Any]) -> Any:
  return jaxbn.surgery.recalibrate(
    net.model, net.variables, batches, devices=jax.devices()[:1], **net.arguments
  )


def simple(change: Any, follow: bool = False) -> Callable[..., Planted]:
  """A fault of the variables of the middle layer, which running statistics follow or not."""

  def plant(healthy: Trained, spec: Spec, kind: str) -> Planted:
    net = changed(healthy, **{name: (1, f) for name, f in change.items()})
    if follow:
      new = recalibrated(net, net.batches)
      net = net._replace(variables=new) if kind == "linen" else net._replace(model=new)
    return net, net.path(1), {}

  return plant


def retrained(
  at: int, told: dict[str, Any] | None = None, **changes: Any
) -> Callable[..., Planted]:
  """A fault with which the network was trained."""

  def plant(healthy: Trained, spec: Spec, kind: str) -> Planted:
    options = {k: v for k, v in changes.items() if k not in Spec._fields}
    fields = {k: v for k, v in changes.items() if k in Spec._fields}
    net = train(spec._replace(**fields), kind, **options)
    return net, net.path(at), told or {}

  return plant


def other_domain(healthy: Trained, spec: Spec, kind: str) -> Planted:
  """Pixels as they are in the file, which somebody forgot to standardize."""
  raw, mean = load_digits().data.std(), load_digits().data.mean()
  return healthy._replace(batches=[raw * x + mean for x in healthy.batches]), healthy.path(0), {}


def inverted_flag(healthy: Trained, spec: Spec, kind: str) -> Planted:
  if kind == "linen":
    return healthy._replace(arguments={"train": True}), healthy.path(0), {}
  model = nnx.clone(healthy.model)
  model.train()
  return healthy._replace(model=model), healthy.path(0), {}


def not_mutable(healthy: Trained, spec: Spec, kind: str) -> Planted:
  def more(tree: Any) -> Any:
    return jax.tree.map(lambda p: p * 1.01, tree)

  then = changed(healthy, scale=(0, more))
  return healthy, healthy.path(0), {"earlier": then.variables or then.model}


def frozen(healthy: Trained, spec: Spec, kind: str) -> Planted:
  net = train(spec._replace(frozen=1), kind)
  return net, net.path(1), {}


def cancelled_bias(healthy: Trained, spec: Spec, kind: str) -> Planted:
  # With pre-activation, no batch norm follows but the next: a sum is between.
  net = train(spec._replace(biased=1), kind)
  return net, f"{net.unit(1)}/bias", {}


def weight_decay(healthy: Trained, spec: Spec, kind: str) -> Planted:
  return healthy, healthy.path(0), {"optimizer": optax.adamw(1e-3)}


def padding(healthy: Trained, spec: Spec, kind: str) -> Planted:
  valid = np.arange(64) < 48
  batches = [np.where(valid[:, None], x, 0) for x in healthy.batches]
  return healthy._replace(batches=batches), healthy.path(0), {"valid": lambda x: valid}


def last_batch_of_one(healthy: Trained, spec: Spec, kind: str) -> Planted:
  batches = [*healthy.batches, healthy.batches[0][:1]]
  return healthy._replace(batches=batches), healthy.path(0), {}


def replicas_differ(healthy: Trained, spec: Spec, kind: str) -> Planted:
  """Each has the statistics of its own batches, as after training without axis_name."""

  def own(x: Any) -> Any:
    new = recalibrated(healthy, [x])
    return new if kind == "linen" else tree_of(new, None)

  stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), *map(own, healthy.batches[:2]))
  return healthy, healthy.path(0), {"replicas": stacked}


def gradient_growth(healthy: Trained, spec: Spec, kind: str) -> Planted:
  net = train(Spec("mlp", depth=48, width=24), kind, steps=30)
  return net, "", {}


def few(channels: int, value: Any) -> Callable[[Any], Any]:
  return lambda a: jnp.asarray(a).at[..., :channels].set(value)


PLANTS: dict[str, Callable[..., Planted]] = {
  "nan": simple({"mean": few(1, jnp.nan)}),
  "never-updated": simple({"mean": jnp.zeros_like, "var": jnp.ones_like}),
  "not-mutable": not_mutable,
  "momentum-too-slow": retrained(0, {"steps": 200}, momentum=0.999),
  "other-domain": other_domain,
  "pytorch-momentum": retrained(0, momentum=0.1),
  "inverted-flag": inverted_flag,
  "frozen": frozen,
  "called-twice": retrained(1, twice=1),
  "noisy-statistics": retrained(0, batch=4),
  "dead-channels": simple({"scale": few(3, 0.0)}, follow=True),
  "exploding-scale": simple({"scale": few(1, 300.0)}, follow=True),
  "cancelled-bias": cancelled_bias,
  "weight-decay": weight_decay,
  "epsilon-dominates": simple({"kernel": lambda k: k * 1e-4}, follow=True),
  "half-precision": simple(
    {"mean": lambda m: m.astype(jnp.bfloat16), "var": lambda v: v.astype(jnp.bfloat16)}
  ),
  "padding": padding,
  "last-batch-of-one": last_batch_of_one,
  "replicas-differ": replicas_differ,
  "gradient-growth": gradient_growth,
}
# Four images have 256 pixels, which are not few; a deep network is one of its own; pre-activation
# has a sum between a kernel and the next batch norm.
_NOT_OF_IMAGES = {"noisy-statistics", "gradient-growth"}
NOT_THERE = {name: _NOT_OF_IMAGES for name in ARCHITECTURES if name != "mlp"}
NOT_THERE["preactivation"] = _NOT_OF_IMAGES | {
  "cancelled-bias",
  "epsilon-dominates",
  "called-twice",
}


@functools.cache
def doctor(model: Any, arguments: tuple[tuple[str, Any], ...]) -> Doctor:
  """One for each program: what it compiled serves all networks that differ in their variables."""
  return Doctor(model, devices=jax.devices()[:1], **dict(arguments))


@functools.cache
def template(spec: Spec) -> Any:
  return NnxNet(spec, 0)


def diagnosed(net: Trained, **told: Any) -> list[Finding]:
  in_linen = isinstance(net.model, nn.Module)
  model = net.model if in_linen else template(net.model.spec)
  variables = net.variables if in_linen else net.model
  found = doctor(model, tuple(net.arguments.items())).diagnose(variables, net.batches, **told)
  return list(found.findings)


class Rates(NamedTuple):
  """What was counted."""

  planted: int = 0
  hits: int = 0
  healthy: int = 0
  alarms: int = 0

  def __str__(self) -> str:
    return (
      f"{self.hits} of {self.planted} planted faults named first with their layer "
      f"({self.hits / max(self.planted, 1):.1%}); {self.alarms} of {self.healthy} healthy networks "
      f"accused ({self.alarms / max(self.healthy, 1):.1%})"
    )

  def plus(self, other: Rates) -> Rates:
    return Rates(*(a + b for a, b in zip(self, other, strict=True)))


def rates(architecture: str, kind: str) -> Rates:
  """Of one architecture: says each miss and each false alarm."""
  spec, result = Spec(architecture), Rates()
  for seed, steps, batch in HEALTHY:
    net = train(spec, kind, seed=seed, steps=steps, batch=batch)
    found = diagnosed(net)
    result = result.plus(Rates(healthy=1, alarms=bool(found)))
    if found:
      print(f"false alarm: {architecture} {kind}, {net.accuracy:.1%}: {found[0]}")
  net = train(spec, kind)
  for fault, plant in PLANTS.items():
    if fault in NOT_THERE.get(architecture, ()):
      continue
    sick, layer, told = plant(net, spec, kind)
    first = next(iter(diagnosed(sick, **told)), None)
    hit = first is not None and first.fault == fault and layer in ("", first.layer)
    result = result.plus(Rates(planted=1, hits=hit))
    if not hit:
      print(f"missed: {fault} at {layer} in {architecture} {kind}; first is {first}")
  return result


def main(architectures: list[str]) -> None:
  total, start = Rates(), time.time()
  with tempfile.TemporaryDirectory() as folder:
    # Programs so small take far longer to compile than to run, and many are alike.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for architecture in architectures:
      for kind in KINDS:
        found = rates(architecture, kind)
        total = total.plus(found)
        print(f"{architecture} {kind}, {time.time() - start:.0f} s: {found}", flush=True)
        doctor.cache_clear()
  print(f"{total}.")


if __name__ == "__main__":
  unknown = set(sys.argv[1:]) - set(ARCHITECTURES)
  if unknown:
    sys.exit(f"error: {', '.join(unknown)}: architectures are {', '.join(ARCHITECTURES)}")
  main(sys.argv[1:] or list(ARCHITECTURES))
