"""A network trained on clean images meets corrupted ones: what adaptation without labels regains.

  python -m examples.adapt [--data=fashion_mnist]

Prints the test accuracy under noise, blur and low contrast.
"""

import argparse
import functools
from typing import Any

import jax
import numpy as np
import optax

from examples import classifier, data
from examples.models import VGG
from jaxbn.linen import prediction_time
from jaxbn.surgery import adapt, minimize_entropy

WIDTHS, BLOCKS = (16, 32), (1, 1)
STEPS, BATCH, RATE = 600, 128, 1e-2
TESTED, PART = 2000, 200  # at most so many images, and how many of them are predicted together
PRIOR = 16.0  # images that the statistics of the clean ones count for
ENTROPY_RATE = 1e-3  # of one pass: as published


def noise(images: np.ndarray) -> np.ndarray:
  drawn = np.random.default_rng(0).normal(0, 0.4, images.shape)
  return np.clip(images + drawn, 0, 1).astype(np.float32)


def blur(images: np.ndarray) -> np.ndarray:
  """Every pixel the mean of itself and its neighbors, in both directions."""
  for axis in (1, 2):
    images = (np.roll(images, 1, axis) + images + np.roll(images, -1, axis)) / 3
  return images


def contrast(images: np.ndarray) -> np.ndarray:
  mean = images.mean((1, 2, 3), keepdims=True)
  return mean + 0.2 * (images - mean)


CORRUPTIONS = {"none": lambda images: images, "noise": noise, "blur": blur, "contrast": contrast}


def trained(dataset: Any) -> tuple[VGG, Any]:
  model = VGG(classes=len(dataset.class_names), widths=WIDTHS, blocks=BLOCKS)
  # To a rate of 0, so that the running statistics are those of the last weights.
  optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
  variables = classifier.initialize(model, dataset.train_images)
  step = classifier.training_step(model, optimizer)
  opt_state = optimizer.init(variables["params"])
  for new, _ in classifier.training(step, variables, opt_state, dataset, STEPS, BATCH):
    variables = new
  return model, variables


def main(name: str = "digits") -> dict[str, list[float]]:
  dataset = data.load(name)
  model, variables = trained(dataset)
  images, labels = classifier.scaled(dataset.test_images[:TESTED]), dataset.test_labels[:TESTED]
  apply = functools.partial(model.apply, train=False)
  as_trained, by_batch = jax.jit(apply), jax.jit(prediction_time(apply, PRIOR))
  found = {}
  print("corruption  as trained    adapt  prediction time  entropy")
  for corruption, corrupt in CORRUPTIONS.items():
    batches = np.array_split(corrupt(images), max(len(images) // PART, 1))
    mixed = adapt(model, variables, batches, prior=PRIOR, train=False)
    optimizer = optax.adam(ENTROPY_RATE)
    certain, _ = minimize_entropy(model, variables, batches, optimizer, train=False)
    own = adapt(model, certain, batches, train=False)
    found[corruption] = [
      classifier.accuracy(predict, given, batches, labels)
      for predict, given in (
        *((as_trained, variables), (as_trained, mixed)),
        *((by_batch, variables), (as_trained, own)),
      )
    ]
    none, prior, batch, entropy = found[corruption]
    print(f"{corruption:<10}  {none:10.2%}  {prior:7.2%}  {batch:15.2%}  {entropy:7.2%}")
  return found


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", default="digits", choices=("digits", "mnist", "fashion_mnist"))
  main(parser.parse_args().data)
