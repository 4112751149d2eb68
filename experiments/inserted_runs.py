"""The VGGs of experiments/inserted.py: trained, with batch norm inserted, trained on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks.results import Row
from examples import classifier, data, insert
from examples.data import Dataset
from examples.models import VGG
from experiments.classification import grid, kept
from experiments.splits import VALIDATION_SHARE
from experiments.training import best
from jaxbn.linen import BatchNorm
from jaxbn.surgery import Inserted
from jaxbn.surgery import insert as insert_norms

PLAIN, INSERTED, RESET = "without", "inserted", "inserted, scale 1 and bias 0"


class Plan(NamedTuple):
  """What is run; steps, batches and the first rate are those of examples/insert.py."""

  dataset: str = "digits"
  widths: tuple[int, ...] = insert.WIDTHS
  blocks: tuple[int, ...] = insert.BLOCKS
  seeds: int = 3
  rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)


class Side(NamedTuple):
  """A network to train on, from variables of each seed."""

  model: Any
  variables: list[Any]


def measure(plan: Plan) -> list[Row]:
  """The same trained networks go on as they are, with norms, and with norms that are not set."""
  to_choose, to_report = datasets(plan.dataset)
  model = VGG(10, plan.widths, plan.blocks, norm="none")
  train = insert.trainer(model, to_choose)
  trained = [
    train(first(model, to_choose, seed), insert.BEFORE, seed)[0] for seed in range(plan.seeds)
  ]
  each = [with_norms(model, variables, to_choose) for variables in trained]
  sides = {
    PLAIN: Side(model, trained),
    INSERTED: Side(each[0].model, [new.variables for new in each]),
    RESET: Side(each[0].model, [unset(new.variables) for new in each]),
  }
  rows: list[Row] = [
    {"kind": "inserted", "seed": seed, "evaluation": new.evaluation, "training": new.training}
    for seed, new in enumerate(each)
  ]
  for name, side in sides.items():
    rows += tuned(name, side, plan, insert.trainer(side.model, to_choose), to_report)
  return rows


def tuned(name: str, side: Side, plan: Plan, train: Any, to_report: Dataset) -> list[Row]:
  """As `classification.tuned`: the rates on images held out, and each seed at the best of them."""
  # Batches other than those of the first training.
  seeds = [plan.seeds + seed for seed in range(plan.seeds)]
  accuracies = np.array([
    [train(v, rate, s)[1].accuracies[-1] for v, s in zip(side.variables, seeds, strict=True)]
    for rate in track(plan.rates, f"{name}: learning rates")
  ])  # fmt: skip
  rate = plan.rates[best(accuracies)]
  rows = grid(plan.rates, accuracies, side=name)
  final = insert.trainer(side.model, to_report)
  for seed, (variables, order) in enumerate(zip(side.variables, seeds, strict=True)):
    tests = kept(np.array(final(variables, rate, order)[1].accuracies))
    head = {"kind": "run", "side": name, "rate": rate, "seed": seed}
    rows.append({**head, "every": insert.TEST_EVERY, "test": tests})
  return rows


def datasets(name: str) -> tuple[Dataset, Dataset]:
  """Training images beside those that are held out of them, and beside the test's."""
  whole = data.load(name)
  order = np.random.default_rng(0).permutation(len(whole.train_images))
  held_out, rest = np.split(order, [round(VALIDATION_SHARE * len(order))])
  images, labels = whole.train_images, whole.train_labels
  to_report = whole._replace(train_images=images[rest], train_labels=labels[rest])
  return (
    to_report._replace(test_images=images[held_out], test_labels=labels[held_out]),
    to_report,
  )


def first(model: VGG, dataset: Dataset, seed: int) -> Any:
  init = jax.jit(model.init, static_argnames="train")
  return init(jax.random.key(seed), classifier.scaled(dataset.train_images[:1]), train=False)


def with_norms(model: VGG, variables: Any, dataset: Dataset) -> Inserted:
  parts = np.array_split(classifier.scaled(dataset.train_images), 8)
  norm = functools.partial(BatchNorm, momentum=0.9)
  return insert_norms(model, variables, [jnp.asarray(p) for p in parts], norm=norm, train=False)


def unset(variables: Any) -> Any:
  """With scale 1 and bias 0 in all inserted norms, as they would be in a new network."""

  def fresh(path: Any, leaf: jax.Array) -> jax.Array:
    names = [entry.key for entry in path]
    if "norm" not in names:
      return leaf
    return jnp.full_like(leaf, 1.0 if names[-1] == "scale" else 0.0)

  return {**variables, "params": jax.tree.map_with_path(fresh, variables["params"])}
