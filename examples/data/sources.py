"""Which data sets there are, where their files lie, and what they hold."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples.data import fetch, formats

IDX_IMAGE_SHAPE = (28, 28)
IDX_TRAIN_EXAMPLES = 60_000
IDX_TEST_EXAMPLES = 10_000

# Where a package of the system keeps a data set, looked at after data/<name>.
SYSTEM_FOLDERS = {
  "fashion_mnist": (Path("/usr/share/datasets/fashion-mnist"),),  # Debian: dataset-fashion-mnist
}

DIGITS_TEST_SHARE = 0.2
DIGITS_SPLIT_SEED = 0
DIGITS_MAX_VALUE = 16

CLASS_NAMES = {
  "digits": tuple("0123456789"),
  "mnist": tuple("0123456789"),
  "fashion_mnist": (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
  ),
  "cifar10": (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
  ),
}


# Training images and labels, then test images and labels.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Dataset(NamedTuple):
  """A data set of labelled images, all of it in host memory."""

  name: str
  train_images: np.ndarray  # (N, H, W, C) uint8
  train_labels: np.ndarray  # (N,) int32
  test_images: np.ndarray  # (M, H, W, C) uint8
  test_labels: np.ndarray  # (M,) int32
  class_names: tuple[str, ...]


def load(name: str, directory: str | None = None, *, download: bool = True) -> Dataset:
  """Loads a data set.

  | name | images | training, test | files |
  | --- | --- | --- | --- |
  | digits | 8x8x1 | 1437, 360 | none: scikit-learn ships it |
  | mnist | 28x28x1 | 60000, 10000 | four IDX files, gzipped or not |
  | fashion_mnist | 28x28x1 | 60000, 10000 | the same, of the same names |
  | cifar10 | 32x32x3 | 50000, 10000 | cifar-10-binary.tar.gz or cifar-10-batches-bin/ |

  scikit-learn's digits have no published split, so every class is split 80 to 20 with a
  fixed seed, the same for every run; their values 0..16 are scaled to 0..255. Files of
  the IDX format may hold fewer examples than published, never more.

  Args:
    name: one of the names above.
    directory: where the files lie, and where missing ones are downloaded to; it has to exist. By
      default `data/<name>` under the current directory and then, for fashion_mnist, the folder
      of Debian's package `dataset-fashion-mnist`; the first that holds every file is used.
    download: whether to download missing files (into `data/<name>` by default).

  Returns:
    A `Dataset`; its arrays may be read-only.

  Raises:
    ValueError: the name is unknown; a directory is given for digits; a file is damaged,
      truncated, mislabelled or of another kind.
    FileNotFoundError: files are missing, and were not or could not be downloaded; all are named.
  """
  if name not in CLASS_NAMES:
    (nearest,) = difflib.get_close_matches(str(name), CLASS_NAMES, n=1, cutoff=0)
    raise ValueError(
      f"There is no data set {name!r}: did you mean {nearest!r}? "
      f"The names are {', '.join(CLASS_NAMES)}."
    )
  if name == "digits":
    if directory is not None:
      raise ValueError(
        f"The data set digits comes with scikit-learn and is read from no directory, but "
        f"directory={directory!r} was given; leave it out or choose another data set."
      )
    arrays = _load_digits()
  else:
    paths = _locate(name, directory, download)
    arrays = formats.read_cifar10(*paths) if name == "cifar10" else _read_idx_files(*paths)
  train_images, train_labels, test_images, test_labels = arrays
  return Dataset(
    name=name,
    train_images=train_images,
    train_labels=train_labels.astype(np.int32),
    test_images=test_images,
    test_labels=test_labels.astype(np.int32),
    class_names=CLASS_NAMES[name],
  )


def _load_digits() -> Arrays:
  digits = load_digits()
  images = np.rint(digits.images * (255 / DIGITS_MAX_VALUE)).astype(np.uint8)[..., None]
  train_images, test_images, train_labels, test_labels = train_test_split(
    images,
    digits.target,
    test_size=DIGITS_TEST_SHARE,
    stratify=digits.target,
    random_state=DIGITS_SPLIT_SEED,
  )
  return train_images, train_labels, test_images, test_labels


def _read_idx_files(
  train_images: Path, train_labels: Path, test_images: Path, test_labels: Path
) -> Arrays:
  return (
    *_read_idx_pair(train_images, train_labels, IDX_TRAIN_EXAMPLES),
    *_read_idx_pair(test_images, test_labels, IDX_TEST_EXAMPLES),
  )


def _read_idx_pair(
  images_path: Path, labels_path: Path, max_examples: int
) -> tuple[np.ndarray, np.ndarray]:
  images = formats.read_idx(images_path, IDX_IMAGE_SHAPE, max_examples)
  labels = formats.read_idx(labels_path, (), max_examples)
  if len(images) != len(labels):
    raise ValueError(
      f"{images_path} holds {len(images)} images but {labels_path} {len(labels)} labels: "
      "the two files do not belong together."
    )
  formats.check_labels(labels_path, labels)
  return images[..., None], labels


def _locate(name: str, directory: str | None, download: bool) -> list[Path]:
  """The files of a data set, from the first folder that holds all of them, or downloaded."""
  if directory is None:
    folders = [Path("data") / name, *SYSTEM_FOLDERS.get(name, ())]
  else:
    folders = [Path(directory).expanduser()]
  files = fetch.PUBLISHED[name]
  for folder in folders:
    found = [path for file in files if (path := _find(file, folder))]
    if len(found) == len(files):
      return found
  missing = [file for file in files if not _find(file, folders[0])]
  reason = "download=False forbids fetching"
  if directory is not None and not folders[0].is_dir():  # more likely misspelled than meant
    reason = "there is no such folder"
  elif download:
    reason = _download(name, missing, folders[0])
  still = [file for file in missing if not _find(file, folders[0])]
  if still:
    raise FileNotFoundError(_how_to_get(name, still, folders, reason))
  return [path for file in files if (path := _find(file, folders[0]))]


def _find(file: fetch.PublishedFile, folder: Path) -> Path | None:
  candidates = (folder / file.name, folder / file.unpacked)
  return next((path for path in candidates if path.exists()), None)


def _download(name: str, files: Sequence[fetch.PublishedFile], folder: Path) -> str:
  """Downloads into `folder` until one fails; says why."""
  try:
    for file in files:
      fetch.download(file, fetch.MIRRORS[name], folder)
  except fetch.DownloadError as error:
    return f"downloading failed ({error})"
  return ""


def _how_to_get(
  name: str, files: Sequence[fetch.PublishedFile], folders: Sequence[Path], reason: str
) -> str:
  needed = ", ".join(f"{file.name} (or {file.unpacked})" for file in files)
  be, them = ("is", "it") if len(files) == 1 else ("are", "them")
  return (
    f"{name} needs {needed}, which {be} not in {' or '.join(map(str, folders))}, and {reason}: "
    f"fetch {them} from {fetch.MIRRORS[name][0]} on a machine with a network and put {them} in "
    f"{folders[0]}, or name the folder that has all files."
  )
