"""A trained network is changed, and its running statistics no longer fit: recalibrated, they do.

  python -m examples.recalibrate [--data=fashion_mnist]

Prints the test accuracy after each change, before and after `jaxbn.surgery.recalibrate` on some of
the training images. Weights are averaged over steps that lie apart, at a constant rate, as by
Izmailov et al. 2018 ("Averaging weights leads to wider optima and better generalization"), who
recalibrate, too.
"""

import argparse
import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import classifier, data
from examples.models import VGG
from jaxbn.surgery import recalibrate

WIDTHS, BLOCKS = (16, 32), (2, 2)
STEPS, BATCH, RATE = 300, 128, 1e-2
AVERAGED, EVERY = 20, 10  # so many of the last steps, so far apart
SEEN, TESTED, PARTS = 4000, 2000, 8  # at most so many images, and in how many batches


class Change(NamedTuple):
  """What becomes of a trained network, and of the images that it is given."""

  name: str
  model: Any
  variables: Any
  images: Callable[[np.ndarray], Any] = lambda images: images


def changes(dataset: Any) -> list[Change]:
  """The network as it was trained, and what else is made of it."""
  model = VGG(classes=10, widths=WIDTHS, blocks=BLOCKS)
  optimizer = optax.adam(RATE)
  start = classifier.initialize(model, dataset.train_images)
  step = classifier.training_step(model, optimizer)
  steps = classifier.training(step, start, optimizer.init(start["params"]), dataset, STEPS, BATCH)
  checkpoints: deque[Any] = deque(maxlen=(AVERAGED - 1) * EVERY + 1)
  checkpoints.extend(variables for variables, _ in steps)
  averaged = list(checkpoints)[::-EVERY]
  last, params = averaged[0], [variables["params"] for variables in averaged]
  mean = jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *params)
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), last["params"])
  return [
    Change("as trained", model, last),
    Change(f"mean of weights, every {EVERY}th of {STEPS} steps", model, last | {"params": mean}),
    Change(
      "weights and computation in bfloat16",
      model.clone(dtype=jnp.bfloat16),
      last | {"params": half},
    ),
    Change("images with a border of 4", model, last, bordered),
  ]


def bordered(images: np.ndarray) -> np.ndarray:
  return np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))


def main(name: str = "digits") -> dict[str, tuple[float, float]]:
  dataset = data.load(name)
  train, test = (
    np.array_split(classifier.scaled(images), PARTS)
    for images in (dataset.train_images[:SEEN], dataset.test_images[:TESTED])
  )
  labels = dataset.test_labels[:TESTED]
  found = {}
  print(f"{'accuracy of':<40} before   after")
  for name, model, variables, images in changes(dataset):
    predict = jax.jit(functools.partial(model.apply, train=False))
    new = recalibrate(model, variables, [images(part) for part in train], train=False)
    tests = [images(part) for part in test]
    before, after = (
      classifier.accuracy(predict, given, tests, labels) for given in (variables, new)
    )
    print(f"{name:<40} {before:6.2%}  {after:6.2%}")
    found[name] = before, after
  return found


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", default="digits", choices=("digits", "mnist", "fashion_mnist"))
  main(parser.parse_args().data)
