"""A trained network is changed, and its running statistics no longer fit: recalibrated, they do.

  python -m examples.recalibrate

Prints the test accuracy on handwritten digits after each change, before and after
`jaxbn.surgery.recalibrate` on the training images.
"""

import functools
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
STEPS, BATCH, RATE = 100, 128, 3e-2
AVERAGED = 50  # of the last steps
PARTS = 8  # in which the images go through the network


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
  checkpoints = [variables for variables, _ in steps][: -AVERAGED - 1 : -1]
  last, params = checkpoints[0], [variables["params"] for variables in checkpoints]
  mean = jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *params)
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), last["params"])
  return [
    Change("as trained", model, last),
    Change(f"mean of the weights of {len(params)} steps", model, last | {"params": mean}),
    Change(
      "weights and computation in bfloat16",
      model.clone(dtype=jnp.bfloat16),
      last | {"params": half},
    ),
    Change("images with a border of 4", model, last, bordered),
  ]


def bordered(images: np.ndarray) -> np.ndarray:
  return np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))


def main() -> dict[str, tuple[float, float]]:
  dataset = data.load("digits")
  train, test = (
    np.array_split(classifier.scaled(images), PARTS)
    for images in (dataset.train_images, dataset.test_images)
  )
  found = {}
  print(f"{'accuracy of':<40} before   after")
  for name, model, variables, images in changes(dataset):
    predict = jax.jit(functools.partial(model.apply, train=False))
    new = recalibrate(model, variables, [images(part) for part in train], train=False)
    tests = [images(part) for part in test]
    before, after = (
      classifier.accuracy(predict, given, tests, dataset.test_labels) for given in (variables, new)
    )
    print(f"{name:<40} {before:6.2%}  {after:6.2%}")
    found[name] = before, after
  return found


if __name__ == "__main__":
  main()
