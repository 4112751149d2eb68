"""Batches of a data set: endless, shuffled and resumable for training; exact for testing."""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import grain
import numpy as np

from examples.data.sources import Dataset

Batch = dict[str, np.ndarray]
Shard: TypeAlias = grain.sharding.ShardOptions  # (shard_index, shard_count) of every batch

WHOLE = grain.sharding.NoSharding()

MAX_SHIFT = 2  # pixels
PREFETCH_THREADS = 2
PREFETCHED_BATCHES = 8


def train_batches(
  dataset: Dataset, batch_size: int, *, seed: int, augment: str = "none", shard: Shard = WHOLE
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

  With a `shard`, each batch is that one's rows of the batch that all of them share: what is
  random is drawn for all rows, which is cheap, and images are touched for the own ones only. So
  the batches and the state do not depend on how many share them.

  Args:
    dataset: what `load` returned.
    batch_size: examples in a batch over all shards, from 1 to the size of the training set.
    seed: zero or a positive integer.
    augment: "none"; "shift", which moves each image by up to 2 pixels in each direction
      and fills with zeros; or "flip_shift", which also mirrors half of the images.
    shard: which of how many equal parts of every batch is wanted; all of it by default.

  Returns:
    A Grain iterator over `{"image": float32 (b, H, W, C), "label": int32 (b,)}`, where b is
    `batch_size` over the number of shards.

  Raises:
    ValueError: the batch size, the seed or the augmentation is none of the above, or the shards
      cannot be equal.
  """
  examples = len(dataset.train_images)
  own = _rows_of(shard, batch_size)
  if batch_size > examples:
    raise ValueError(
      f"batch_size={batch_size} is larger than the training set of {dataset.name}, which has "
      f"{examples} examples; choose {examples} or less."
    )
  if seed < 0:
    raise ValueError(f"seed={seed} is negative; choose zero or a positive integer.")
  if augment not in AUGMENTATIONS:
    raise ValueError(f"augment={augment!r} is none of {', '.join(AUGMENTATIONS)}.")
  draw, change = AUGMENTATIONS[augment]
  standardize = standardizer(dataset.train_images)

  def make_batch(rows: np.ndarray, rng: np.random.Generator) -> Batch:
    drawn = [values[own] for values in draw(rng, len(rows))]
    return {
      "image": standardize(change(dataset.train_images[rows[own]], *drawn)),
      "label": dataset.train_labels[rows[own]],
    }

  rows = grain.MapDataset.source(_ShuffledRows(examples, batch_size, seed))
  batches = rows.random_map(make_batch, seed=seed)
  options = grain.ReadOptions(PREFETCH_THREADS, PREFETCHED_BATCHES)
  return iter(batches.to_iter_dataset(options))


def test_batches(
  dataset: Dataset,
  batch_size: int,
  shard: Shard = WHOLE,  # noqa: PT028 (this is no test)
) -> Iterator[Batch]:
  """Batches of the test set, every example once and in order.

  Args:
    dataset: what `load` returned.
    batch_size: examples in a batch over all shards, 1 or more.
    shard: which of how many equal parts of every batch is wanted; all of it by default.

  Returns:
    An iterator over `{"image": float32 (b, H, W, C), "label": int32 (b,), "mask": bool (b,)}`,
    where b is `batch_size` over the number of shards, standardized as in `train_batches`. The
    last batch is padded with zeros, where the mask is False: a shard may have nothing else in it.

  Raises:
    ValueError: the batch size is not positive, or the shards cannot be equal.
  """
  return _padded_batches(dataset, batch_size, _rows_of(shard, batch_size))


def _padded_batches(dataset: Dataset, batch_size: int, own: slice) -> Iterator[Batch]:
  standardize = standardizer(dataset.train_images)
  for first in range(0, len(dataset.test_images), batch_size):
    rows = slice(first + own.start, first + own.stop)
    labels = dataset.test_labels[rows]
    batch = {
      "image": standardize(dataset.test_images[rows]),
      "label": labels,
      "mask": np.ones(len(labels), bool),
    }
    yield {key: _pad(values, own.stop - own.start) for key, values in batch.items()}


def _pad(values: np.ndarray, size: int) -> np.ndarray:
  return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1))


def _rows_of(shard: Shard, batch_size: int) -> slice:
  """The rows of a batch that are this shard's."""
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} is not positive; choose 1 or more.")
  size, left = divmod(batch_size, shard.shard_count)
  if left:
    raise ValueError(
      f"batch_size={batch_size} is not a multiple of shard_count={shard.shard_count}; "
      f"choose {batch_size - left or shard.shard_count}."
    )
  return slice(shard.shard_index * size, (shard.shard_index + 1) * size)


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


def standardizer(train_images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
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


class Augmentation(NamedTuple):
  """What is drawn for a batch, and what it does to the images.

  Two steps, since the draws are those of the whole batch, in the same order whoever asks.
  """

  draw: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
  change: Callable[..., np.ndarray]  # of the images, and of what was drawn for them


def _draw_shift(rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
  return tuple(rng.integers(2 * MAX_SHIFT + 1, size=(2, count)))


def _draw_flip_shift(rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
  return *_draw_shift(rng, count), rng.integers(2, size=count, dtype=bool)


def _shift(images: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Moves each image by its own whole number of pixels, filling with zeros."""
  count, height, width, channels = images.shape
  border = (MAX_SHIFT, MAX_SHIFT)
  padded = np.pad(images, ((0, 0), border, border, (0, 0)))
  # A view of every possible crop, (count, vertical offset, horizontal offset, crop); with
  # pixels and channels in one axis, so that whole rows are copied.
  crops = np.lib.stride_tricks.sliding_window_view(
    padded.reshape(*padded.shape[:2], -1), (height, width * channels), axis=(1, 2)
  )
  return crops[np.arange(count), down, right * channels].reshape(images.shape)


def _flip_shift(
  images: np.ndarray, down: np.ndarray, right: np.ndarray, mirrored: np.ndarray
) -> np.ndarray:
  shifted = _shift(images, down, right)
  shifted[mirrored] = shifted[mirrored, :, ::-1]
  return shifted


AUGMENTATIONS = {
  "none": Augmentation(lambda rng, count: (), lambda images: images),
  "shift": Augmentation(_draw_shift, _shift),
  "flip_shift": Augmentation(_draw_flip_shift, _flip_shift),
}
