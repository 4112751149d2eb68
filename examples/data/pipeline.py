"""Batches of a data set: endless, shuffled and resumable for training; exact for testing."""

import functools
import sys
from collections.abc import Callable, Iterator

import grain
import numpy as np

from examples.data.sources import Dataset

Batch = dict[str, np.ndarray]

MAX_SHIFT = 2  # pixels
PREFETCH_THREADS = 2
PREFETCHED_BATCHES = 8


def train_batches(
  dataset: Dataset, batch_size: int, *, seed: int, augment: str = "none"
) -> grain.DatasetIterator[Batch]:
  """Batches of the training set without end, prefetched by threads.

  The batches cut one endless stream in which every epoch is a fresh permutation of the
  training set: an epoch holds each example exactly once, none is dropped, and a batch may
  begin in one epoch and end in the next. Images are standardized: the mean of their
  channel over the whole training set is subtracted and its standard deviation divided by.

  The order depends on the seed, and a batch's augmentation on the seed and the batch's
  number, so setting the state resumes exactly: `get_state()` is `{"next_index": batches
  that the caller has taken}`, plain JSON, whatever the threads have prefetched. It counts
  batches, so resume with the same data set, batch size, seed and augmentation.

  Args:
    dataset: what `load` returned.
    batch_size: examples in a batch, from 1 to the size of the training set.
    seed: zero or a positive integer.
    augment: "none"; "shift", which moves each image by up to 2 pixels in each direction
      and fills with zeros; or "flip_shift", which also mirrors half of the images.

  Returns:
    A Grain iterator over `{"image": float32 (B, H, W, C), "label": int32 (B,)}`.

  Raises:
    ValueError: the batch size, the seed or the augmentation is none of the above.
  """
  examples = len(dataset.train_images)
  _check_batch_size(batch_size)
  if batch_size > examples:
    raise ValueError(
      f"batch_size={batch_size} is larger than the training set of {dataset.name}, which has "
      f"{examples} examples; choose {examples} or less."
    )
  if seed < 0:
    raise ValueError(f"seed={seed} is negative; choose zero or a positive integer.")
  if augment not in AUGMENTATIONS:
    raise ValueError(f"augment={augment!r} is none of {', '.join(AUGMENTATIONS)}.")
  change = AUGMENTATIONS[augment]
  standardize = _standardizer(dataset.train_images)

  def make_batch(rows: np.ndarray, rng: np.random.Generator) -> Batch:
    return {
      "image": standardize(change(dataset.train_images[rows], rng)),
      "label": dataset.train_labels[rows],
    }

  rows = grain.MapDataset.source(_ShuffledRows(examples, batch_size, seed))
  batches = rows.random_map(make_batch, seed=seed)
  options = grain.ReadOptions(PREFETCH_THREADS, PREFETCHED_BATCHES)
  return iter(batches.to_iter_dataset(options))


def test_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
  """Batches of the test set, every example once and in order.

  Args:
    dataset: what `load` returned.
    batch_size: examples in a batch, 1 or more.

  Returns:
    An iterator over `{"image": float32 (B, H, W, C), "label": int32 (B,), "mask": bool
    (B,)}`, standardized as in `train_batches`. The last batch is padded with zeros, where
    the mask is False.

  Raises:
    ValueError: the batch size is not positive.
  """
  _check_batch_size(batch_size)
  return _padded_batches(dataset, batch_size)


def _padded_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
  standardize = _standardizer(dataset.train_images)
  for first in range(0, len(dataset.test_images), batch_size):
    rows = slice(first, first + batch_size)
    labels = dataset.test_labels[rows]
    batch = {
      "image": standardize(dataset.test_images[rows]),
      "label": labels,
      "mask": np.ones(len(labels), bool),
    }
    yield {key: _pad(values, batch_size) for key, values in batch.items()}


def _pad(values: np.ndarray, size: int) -> np.ndarray:
  return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1))


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} is not positive; choose 1 or more.")


class _ShuffledRows:
  """A Grain source: element k holds the row numbers of batch k of the endless stream.

  Serving row numbers a batch at a time keeps Python's cost a batch's, not an example's.
  """

  def __init__(self, examples: int, batch_size: int, seed: int):
    self._examples = examples
    self._batch_size = batch_size
    self._seed = seed

  def __len__(self) -> int:
    return sys.maxsize // self._batch_size

  def __getitem__(self, batch: int) -> np.ndarray:
    epoch, first = divmod(batch * self._batch_size, self._examples)
    rows = _epoch_order(self._examples, self._seed, epoch)[first : first + self._batch_size]
    missing = self._batch_size - len(rows)
    if missing:
      following = _epoch_order(self._examples, self._seed, epoch + 1)[:missing]
      rows = np.concatenate([rows, following])
    return rows


@functools.lru_cache(maxsize=4)  # the epoch under way and the next, for two runs
def _epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(examples)


def _standardizer(train_images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """The map from uint8 images to float32 of mean 0 and standard deviation 1 a channel."""
  image_shape = train_images.shape[1:]
  flat = train_images.reshape(len(train_images), -1)
  # Sums of integers are exact, so the difference of large numbers below loses nothing.
  sums = np.sum(flat, axis=0, dtype=np.int64)
  squares = np.einsum("np,np->p", flat, flat, dtype=np.int64)
  channels = image_shape[-1]
  mean = sums.reshape(-1, channels).sum(0) / flat[:, ::channels].size
  mean_square = squares.reshape(-1, channels).sum(0) / flat[:, ::channels].size
  std = np.sqrt(mean_square - mean**2)
  std[std == 0] = 1  # a constant channel becomes zeros, not NaN
  # At the size of an image: NumPy broadcasts slowly over a last axis of three.
  offset, scale = (np.full(image_shape, v, np.float32) for v in (mean, 1 / std))
  return lambda images: (images - offset) * scale


def _unchanged(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  return images


def _shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Moves each image by its own random whole number of pixels, filling with zeros."""
  count, height, width, channels = images.shape
  border = (MAX_SHIFT, MAX_SHIFT)
  padded = np.pad(images, ((0, 0), border, border, (0, 0)))
  # A view of every possible crop, (count, vertical offset, horizontal offset, crop); with
  # pixels and channels in one axis, so that whole rows are copied.
  crops = np.lib.stride_tricks.sliding_window_view(
    padded.reshape(*padded.shape[:2], -1), (height, width * channels), axis=(1, 2)
  )
  down, right = rng.integers(2 * MAX_SHIFT + 1, size=(2, count))
  return crops[np.arange(count), down, right * channels].reshape(images.shape)


def _flip_and_shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  shifted = _shift(images, rng)
  mirrored = rng.integers(2, size=len(images), dtype=bool)
  shifted[mirrored] = shifted[mirrored, :, ::-1]
  return shifted


AUGMENTATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
  "none": _unchanged,
  "shift": _shift,
  "flip_shift": _flip_and_shift,
}
