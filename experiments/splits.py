"""Data sets as the experiments need them: with images held out, and which make a batch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from examples import data

VALIDATION_SHARE = 0.2


class Split(NamedTuple):
  """Images, standardized by the training set's mean and deviation, and their labels."""

  images: np.ndarray
  labels: np.ndarray


@functools.cache
def splits(dataset: str = "digits") -> dict[str, Split]:
  """Training, validation and test."""
  found = data.load(dataset)
  train, test = (a.astype(np.float32) for a in (found.train_images, found.test_images))
  order = np.random.default_rng(0).permutation(len(train))
  held_out = round(VALIDATION_SHARE * len(train))
  mean, std = train.mean(), train.std()

  def split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split((images - mean) / std, labels)

  return {
    "train": split(train[order[held_out:]], found.train_labels[order[held_out:]]),
    "validation": split(train[order[:held_out]], found.train_labels[order[:held_out]]),
    "test": split(test, found.test_labels),
  }


def batches(two_classes: bool, labels: np.ndarray, size: int, steps: int, seed: int) -> np.ndarray:
  """Indices of the examples, (steps, size): of two classes in each batch, or drawn evenly."""
  rng = np.random.default_rng(seed)
  if not two_classes:
    epochs = -(-steps * size // len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
    return order[: steps * size].reshape(steps, size)
  members = [np.flatnonzero(labels == label) for label in np.unique(labels)]

  def pair() -> np.ndarray:
    classes = rng.choice(len(members), 2, replace=False)
    return np.concatenate([rng.choice(members[c], size // 2, replace=False) for c in classes])

  return np.stack([pair() for _ in range(steps)])
