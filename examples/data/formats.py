"""Reading IDX and CIFAR-10 binary files, which may be truncated, swapped or hostile.

Every size is checked against what was published before that many bytes are read;
nothing is unpickled, and no archive is extracted to the disk.

Sources: http://yann.lecun.com/exdb/mnist/ (IDX) and
https://www.cs.toronto.edu/~kriz/cifar.html (the binary version).
"""

import contextlib
import gzip
import io
import math
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

CLASSES = 10

# The third byte, 8, stands for unsigned bytes and the fourth counts the dimensions.
IDX_MAGICS = {0x801: "labels", 0x803: "images"}

CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_TRAIN_FILES = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
CIFAR_TEST_FILE = "test_batch.bin"
CIFAR_IMAGE_SHAPE = (3, 32, 32)
CIFAR_RECORDS = 10_000  # in each file
CIFAR_FILE_BYTES = CIFAR_RECORDS * (1 + math.prod(CIFAR_IMAGE_SHAPE))
# The six files, a list of the class names, a page of HTML, and tar's headers and padding.
CIFAR_TAR_MAX_BYTES = 6 * CIFAR_FILE_BYTES + 2**20


def read_idx(path: Path, item_shape: tuple[int, ...], max_items: int) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, plain or gzipped.

  Args:
    path: the file; its first bytes, not its name, tell whether it is gzipped.
    item_shape: the shape of one item: `(28, 28)` for images, `()` for labels.
    max_items: the most items that the file may claim to hold.

  Returns:
    uint8 of shape `(items, *item_shape)`, read-only.

  Raises:
    ValueError: the magic number, the dimensions or the count are not as expected, or
      the file is damaged, shorter or longer than its header says.
  """
  with _opened(path) as stream:
    (magic,) = struct.unpack(">I", _read(stream, path, 4))
    _check_magic(path, magic, expected=0x801 + len(item_shape))
    shape = struct.unpack(f">{1 + len(item_shape)}I", _read(stream, path, 4 + 4 * len(item_shape)))
    _check_shape(path, shape, item_shape, max_items)
    content = _read(stream, path, math.prod(shape))
    _check_end(stream, path)
  return np.frombuffer(content, np.uint8).reshape(shape)


def read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Reads the binary version of CIFAR-10.

  Args:
    path: `cifar-10-binary.tar.gz` or the folder `cifar-10-batches-bin` unpacked from it.

  Returns:
    Training images `(50000, 32, 32, 3)` and labels `(50000,)`, then test images
    `(10000, 32, 32, 3)` and labels `(10000,)`, all uint8.

  Raises:
    ValueError: a file has not the published size, a label is not one of the ten
      classes, or the archive is damaged or lacks a file.
    FileNotFoundError: the folder lacks a file.
  """
  if path.is_dir():
    train = [_read_cifar_file(path / name) for name in CIFAR_TRAIN_FILES]
    test = _read_cifar_file(path / CIFAR_TEST_FILE)
  else:
    with _opened_tar(path) as read_member:
      train = [read_member(name) for name in CIFAR_TRAIN_FILES]
      test = read_member(CIFAR_TEST_FILE)
  train_images, train_labels = _decode_cifar(
    [(path / name, content) for name, content in zip(CIFAR_TRAIN_FILES, train, strict=True)]
  )
  return train_images, train_labels, *_decode_cifar([(path / CIFAR_TEST_FILE, test)])


def check_labels(path: Path, labels: np.ndarray) -> None:
  """Raises ValueError unless every label is one of the ten classes."""
  wrong = np.flatnonzero(labels >= CLASSES)
  if wrong.size:
    raise ValueError(
      f"{path} is mislabelled: label {labels[wrong[0]]} at position {wrong[0]} is none of "
      f"0 to {CLASSES - 1}; the file is damaged or of another data set."
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
  """Opens a file, through gzip where it is gzipped; damage met while reading is a ValueError."""
  with open(path, "rb") as file:
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    try:
      with gzip.open(file) if gzipped else contextlib.nullcontext(file) as stream:
        yield stream  # type: ignore[misc]  # GzipFile reads like any BinaryIO
    except EOFError as error:
      raise ValueError(
        f"{path} is truncated: its gzip stream stops before its end; fetch the file again."
      ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(f"{path} is damaged ({error}); fetch the file again.") from error


def _read(stream: BinaryIO, path: Path, size: int) -> bytes:
  content = stream.read(size)
  if len(content) < size:
    raise ValueError(
      f"{path} is truncated: {size} more bytes were expected where only {len(content)} "
      "are left; fetch the file again."
    )
  return content


def _check_end(stream: BinaryIO, path: Path) -> None:
  # Reading past the last byte is also what makes gzip verify its checksum.
  if stream.read(1):
    raise ValueError(
      f"{path} is longer than the format allows: bytes follow its last item; fetch the file again."
    )


def _check_magic(path: Path, magic: int, expected: int) -> None:
  if magic == expected:
    return
  found = f"{IDX_MAGICS[magic]}: are the files swapped?" if magic in IDX_MAGICS else "no IDX file."
  raise ValueError(
    f"{path} should hold {IDX_MAGICS[expected]} (IDX magic number {expected:#010x}) but starts "
    f"with {magic:#010x}, which marks {found}"
  )


def _check_shape(
  path: Path, shape: tuple[int, ...], item_shape: tuple[int, ...], max_items: int
) -> None:
  if shape[1:] != item_shape:
    found, expected = ("x".join(map(str, dims)) for dims in (shape[1:], item_shape))
    raise ValueError(
      f"{path} holds images of {found} pixels where {expected} were expected; "
      "it is damaged or of another data set."
    )
  if not 0 < shape[0] <= max_items:
    raise ValueError(
      f"{path} claims {shape[0]} items where 1 to {max_items} were expected; "
      "it is damaged or of another data set."
    )


def _read_cifar_file(path: Path) -> bytes:
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is missing, one of the six files of {CIFAR_FOLDER}; "
      "unpack cifar-10-binary.tar.gz again, or leave it packed."
    )
  with _opened(path) as stream:
    content = _read(stream, path, CIFAR_FILE_BYTES)
    _check_end(stream, path)
  return content


@contextlib.contextmanager
def _opened_tar(path: Path) -> Iterator[Callable[[str], bytes]]:
  """Yields a function that reads one of the CIFAR-10 files from the archive by its name."""
  # Unpacking into a bounded buffer first bounds whatever tarfile may read, headers included.
  with _opened(path) as stream:
    unpacked = stream.read(CIFAR_TAR_MAX_BYTES + 1)
  if len(unpacked) > CIFAR_TAR_MAX_BYTES:
    raise ValueError(
      f"{path} unpacks to more than the {CIFAR_TAR_MAX_BYTES} bytes expected of CIFAR-10's "
      "binary version; fetch the file again."
    )
  try:
    with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
      yield lambda name: _read_member(archive, path, f"{CIFAR_FOLDER}/{name}")
  except tarfile.TarError as error:
    raise ValueError(f"{path} is no intact tar archive ({error}); fetch the file again.") from error


def _read_member(archive: tarfile.TarFile, path: Path, name: str) -> bytes:
  try:
    member = archive.getmember(name)
  except KeyError:
    raise ValueError(
      f"{path} lacks the member {name}; fetch cifar-10-binary.tar.gz, "
      "not the Python or Matlab version, again."
    ) from None
  file = archive.extractfile(member) if member.isreg() else None
  if file is None or member.size != CIFAR_FILE_BYTES:
    raise ValueError(
      f"{path} holds {name} as something else than a file of {CIFAR_FILE_BYTES} bytes "
      f"(it has {member.size}); fetch the file again."
    )
  return file.read()


def _decode_cifar(files: list[tuple[Path, bytes]]) -> tuple[np.ndarray, np.ndarray]:
  """Images (N, 32, 32, 3) and labels (N,) from records of a label and three colour planes."""
  images = np.empty((len(files), CIFAR_RECORDS, 32, 32, 3), np.uint8)
  labels = np.empty((len(files), CIFAR_RECORDS), np.uint8)
  for k, (path, content) in enumerate(files):
    records = np.frombuffer(content, np.uint8).reshape(CIFAR_RECORDS, -1)
    labels[k] = records[:, 0]
    images[k] = records[:, 1:].reshape(-1, *CIFAR_IMAGE_SHAPE).transpose(0, 2, 3, 1)
    check_labels(path, labels[k])
  return images.reshape(-1, 32, 32, 3), labels.reshape(-1)
