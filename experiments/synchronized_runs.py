"""The networks of experiments/synchronized.py, on simulated devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn.linen
from benchmarks.results import Row
from experiments.classification import recipe, tuned
from experiments.networks import Perceptron
from experiments.renorm_runs import limits
from jaxbn.surgery import stats

LOCAL, RENORM, SHARED = "local", "batch renorm, local", "synchronized"


class Plan(NamedTuple):
  """What is run: the examples of a device, and of all devices together."""

  dataset: str = "fashion_mnist"
  widths: tuple[int, ...] = (32, 32, 32)
  elements: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
  batch_size: int = 128
  steps: int = 1000
  tuning_steps: int = 400
  every: int = 200
  seeds: int = 3
  rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)


class Devices(nn.Module):
  """A network trained on several devices, each with its part of a batch.

  Every device has running statistics of its own; in evaluation they count as one, of all data.

  Attributes:
    network: whose norms may be synchronized over the axis "devices".
    devices: how many.
  """

  network: Perceptron
  devices: int

  def __call__(self, images: jax.Array, training: bool) -> jax.Array:
    each = nn.vmap(
      lambda network, images: network(images, training),
      variable_axes={"params": None, "batch_stats": 0},
      split_rngs={"params": False},
      axis_name="devices",
      axis_size=self.devices,
    )
    if self.is_initializing():
      images = jnp.broadcast_to(images, (self.devices, *images.shape))
      return each(self.network, images)[0]
    if training:
      split = images.reshape(self.devices, -1, *images.shape[1:])
      return each(self.network, split).reshape(len(images), -1)
    together = nn.map_variables(
      lambda network, images: network(images, False),
      "batch_stats",
      trans_in_fn=stats.average_replicas,
    )
    logits: jax.Array = together(self.network, images)
    return logits


def network(plan: Plan, side: str, elements: int) -> Devices:
  """What a side trains; unbiased variances, so that evaluation does not depend on `elements`."""
  r_max, d_max = limits(plan.tuning_steps)
  layer: Any = jaxbn.linen.BatchRenorm if side == RENORM else jaxbn.linen.BatchNorm
  own: Mapping[str, Mapping[str, Any]] = {
    LOCAL: {},
    RENORM: {"r_max": r_max, "d_max": d_max},
    SHARED: {"axis_name": "devices"},
  }
  options = {"debias": True, "unbiased": True, **own[side]}
  perceptron = Perceptron(plan.widths, layer=layer, options=options, momentum=0.99)
  return Devices(perceptron, plan.batch_size // elements)


def measure(plan: Plan) -> list[Row]:
  """Synchronized statistics are the same for any number of devices: that is trained once."""
  cases = [(side, elements) for elements in plan.elements for side in (LOCAL, RENORM)]
  rows: list[Row] = []
  for side, elements in [(SHARED, plan.elements[0]), *cases]:
    made = recipe(network(plan, side, elements), plan.dataset)
    rows += tuned(made, plan, side, elements=elements)
  return rows
