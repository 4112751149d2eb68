"""Classifiers trained by stochastic gradient descent, each at its own best learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.results import Row
from experiments.splits import batches, splits
from experiments.training import Carry, Recipe, best, descend

Look = Callable[[Any], dict[str, jax.Array]]  # variables, to what is kept of them


def recipe(
  model: nn.Module,
  dataset: str,
  momentum: float = 0.0,
  look: Look = lambda variables: {},
  clip: optax.GradientTransformation | None = None,
) -> Recipe:
  """Descent on the cross-entropy of a model that is called as model(images, training).

  `clip`, which keeps no state, is applied to the gradient before its momentum. Looks at the
  accuracy on validation and test images in evaluation, and at what `look` gives.
  """
  of = {name: jax.tree.map(jnp.asarray, split) for name, split in splits(dataset).items()}
  train = of["train"]

  def start(key: jax.Array) -> Any:
    at_init, at_dropout = jax.random.split(key)
    variables = model.init(at_init, train.images[:2], False)
    return variables, jax.tree.map(jnp.zeros_like, variables["params"]), at_dropout

  def step(carry: Any, rate: jax.Array, batch: jax.Array) -> Any:
    variables, velocity, key = carry
    key, at_dropout = jax.random.split(key)
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Any) -> tuple[jax.Array, Any]:
      logits, changed = model.apply(
        {"params": params, **state},
        train.images[batch],
        True,
        mutable=list(state),
        rngs={"dropout": at_dropout},
      )
      each = optax.softmax_cross_entropy_with_integer_labels(logits, train.labels[batch])
      return each.mean(), changed

    gradient, changed = jax.grad(loss, has_aux=True)(variables["params"])
    if clip is not None:
      params = variables["params"]
      gradient, _ = clip.update(gradient, clip.init(params), params)
    velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
    params = jax.tree.map(lambda p, v: p - rate * v, variables["params"], velocity)
    return {"params": params, **changed}, velocity, key

  def seen(carry: Any) -> dict[str, jax.Array]:
    variables = carry[0]

    def accuracy(name: str) -> jax.Array:
      logits: Any = model.apply(variables, of[name].images, False)
      right = jnp.argmax(logits, -1) == of[name].labels
      return jnp.where(jnp.isfinite(logits).all(), right.mean(), jnp.nan)

    return {"validation": accuracy("validation"), "test": accuracy("test"), **look(variables)}

  return Recipe(start, step, seen)


class Training(NamedTuple):
  """How networks are trained, as `tuned` needs it.

  Attributes:
    rates: that are tried.
    tuning_steps: at each of them.
    steps: at the best of them.
    every: the steps between looks, which divides both.
    dataset, batch_size, seeds: for all alike.
  """

  rates: tuple[float, ...]
  tuning_steps: int
  steps: int
  every: int
  dataset: str = "fashion_mnist"
  batch_size: int = 60
  seeds: int = 3


def tuned(
  recipe: Recipe,
  plan: Any,
  side: str,
  examples: int | None = None,
  started: Carry | None = None,
  two_classes: bool = False,
  **what: Any,
) -> list[Row]:
  """Chooses the rate on images held out, and trains at it.

  Args:
    recipe: of `recipe`.
    plan: has what a `Training` has.
    side: who is trained.
    examples: how many of the training images, the first; default all.
    started: as in `descend`, where training goes on from something.
    two_classes: whether each batch is of two classes.
    **what: else that stands in each row.

  Returns:
    A row of kind "grid" for each rate, with the validation accuracies of the seeds in the end; and
    one of kind "run" for each seed at the best rate, with what was seen, look by look.
  """
  said = ", ".join(map(str, (side, *what.values())))
  every_order = orders(plan, examples, two_classes)
  few = every_order[:, : plan.tuning_steps]
  _, seen = descend(recipe, plan.rates, few, plan.tuning_steps, f"{said}: learning rates", started)
  last = seen["validation"][-1]
  rate, head = plan.rates[best(last)], {"side": side, **what}
  rows = grid(plan.rates, last, **head)
  _, seen = descend(recipe, [rate], every_order, plan.every, said, started)
  for seed in range(plan.seeds):
    of_seed = {name: kept(values[:, 0, seed]) for name, values in seen.items()}
    rows.append({"kind": "run", **head, "rate": rate, "seed": seed, "every": plan.every, **of_seed})
  return rows


def grid(rates: Sequence[float], validation: np.ndarray, **head: Any) -> list[Row]:
  """The rows of rates that were tried, with the accuracies of the seeds on images held out."""
  return [
    {"kind": "grid", **head, "rate": rate, "validation": kept(of_seeds)}
    for rate, of_seeds in zip(rates, validation, strict=True)
  ]


def orders(plan: Any, examples: int | None = None, two_classes: bool = False) -> np.ndarray:
  """Which of the training images, or of the first `examples`, make each batch of each seed."""
  labels = splits(plan.dataset)["train"].labels[:examples]
  sizes = plan.batch_size, plan.steps
  return np.stack([batches(two_classes, labels, *sizes, seed) for seed in range(plan.seeds)])


def kept(values: np.ndarray) -> Any:
  """To five digits, as lists; what is not finite becomes None."""
  if np.ndim(values):
    return [kept(value) for value in values]
  return float(f"{values:.5g}") if np.isfinite(values) else None
