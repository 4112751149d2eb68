"""The VGGs of experiments/inserted.py: trained, with batch norm inserted, trained on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn.linen
from benchmarks.results import Row
from examples.models import VGG
from experiments.classification import recipe, tuned
from experiments.splits import batches, splits
from experiments.training import best, descend
from jaxbn.surgery import insert

PLAIN, INSERTED, RESET = "without", "inserted", "inserted, scale 1 and bias 0"
MOMENTUM = 0.9  # of the gradients


class Plan(NamedTuple):
  """What is run: the VGG's first training, and how it is trained on."""

  dataset: str = "fashion_mnist"
  patch: int = 2
  widths: tuple[int, ...] = (8, 16)
  blocks: tuple[int, ...] = (2, 2)
  batch_size: int = 64
  first_steps: int = 600
  first_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
  steps: int = 600
  tuning_steps: int = 300
  every: int = 150
  seeds: int = 3
  rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def measure(plan: Plan) -> list[Row]:
  """The same trained networks go on as they are, with norms, and with norms that are not set."""
  train = splits(plan.dataset)["train"]
  plain = VGG(10, plan.widths, plan.blocks, patch=plan.patch, norm="none")
  variables, keys, rows = trained(plain, plan)
  parts = np.array_split(train.images, 16)
  norm = functools.partial(jaxbn.linen.BatchNorm, momentum=0.9)
  each = [
    insert(plain, at(variables, seed), parts, norm=norm, train=False) for seed in range(plan.seeds)
  ]
  rows += [
    {"kind": "inserted", "seed": s, "evaluation": i.evaluation, "training": i.training}
    for s, i in enumerate(each)
  ]
  normed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(i.variables for i in each))
  sides = {
    PLAIN: (plain, variables),
    INSERTED: (each[0].model, normed),
    RESET: (each[0].model, {**normed, "params": unset(normed["params"])}),
  }
  for side, (model, variables) in sides.items():
    started = variables, jax.tree.map(jnp.zeros_like, variables["params"]), keys
    made = recipe(model, plan.dataset, MOMENTUM)
    rows += tuned(made, plan, side, started=started)
  return rows


def trained(plain: VGG, plan: Plan) -> tuple[Any, jax.Array, list[Row]]:
  """VGGs at the best rate, leaves (seeds, ...), keys for what follows, and the rates' rows."""
  labels = splits(plan.dataset)["train"].labels
  # Batches other than those of training on.
  orders = np.stack([
    batches(False, labels, plan.batch_size, plan.first_steps, 100 + seed)
    for seed in range(plan.seeds)
  ])  # fmt: skip
  made = recipe(plain, plan.dataset, MOMENTUM)
  carry, seen = descend(made, plan.first_rates, orders, plan.first_steps, "first training")
  last = seen["validation"][-1]
  variables, _, keys = at(carry, best(last))
  rows: list[Row] = [
    {"kind": "first", "rate": rate, "validation": np.nan_to_num(of_seeds).round(4).tolist()}
    for rate, of_seeds in zip(plan.first_rates, last, strict=True)
  ]
  return variables, keys, rows


def at(tree: Any, index: int) -> Any:
  return jax.tree.map(lambda leaf: leaf[index], tree)


def unset(params: Any) -> Any:
  """With scale 1 and bias 0 in all norms, as they would be in a new network."""

  def fresh(path: Any, leaf: jax.Array) -> jax.Array:
    names = [entry.key for entry in path]
    if "norm" not in names:
      return leaf
    return jnp.full_like(leaf, 1.0 if names[-1] == "scale" else 0.0)

  return jax.tree.map_with_path(fresh, params)
