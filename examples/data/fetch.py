"""Downloading the published files: bounded in size, verified, and never half there."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

CHUNK_BYTES = 2**18
TIMEOUT_SECONDS = 30


class PublishedFile(NamedTuple):
  """A file as its authors publish it."""

  name: str
  size: int  # bytes
  sha256: str
  unpacked: str  # what it is called once gunzip or tar has unpacked it


class DownloadError(Exception):
  """No mirror gave the file; the message holds each mirror's URL and what was wrong with it."""


# Sizes and sums as in TensorFlow Datasets' url_checksums. Fashion-MNIST's were computed
# again, from the contents of Debian's package under the original gzip headers.
PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
  "mnist": (
    PublishedFile(
      "train-images-idx3-ubyte.gz",
      9_912_422,
      "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
      "train-images-idx3-ubyte",
    ),
    PublishedFile(
      "train-labels-idx1-ubyte.gz",
      28_881,
      "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
      "train-labels-idx1-ubyte",
    ),
    PublishedFile(
      "t10k-images-idx3-ubyte.gz",
      1_648_877,
      "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
      "t10k-images-idx3-ubyte",
    ),
    PublishedFile(
      "t10k-labels-idx1-ubyte.gz",
      4_542,
      "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
      "t10k-labels-idx1-ubyte",
    ),
  ),
  "fashion_mnist": (
    PublishedFile(
      "train-images-idx3-ubyte.gz",
      26_421_880,
      "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
      "train-images-idx3-ubyte",
    ),
    PublishedFile(
      "train-labels-idx1-ubyte.gz",
      29_515,
      "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
      "train-labels-idx1-ubyte",
    ),
    PublishedFile(
      "t10k-images-idx3-ubyte.gz",
      4_422_102,
      "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
      "t10k-images-idx3-ubyte",
    ),
    PublishedFile(
      "t10k-labels-idx1-ubyte.gz",
      5_148,
      "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
      "t10k-labels-idx1-ubyte",
    ),
  ),
  "cifar10": (
    PublishedFile(
      "cifar-10-binary.tar.gz",
      170_052_171,
      "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
      "cifar-10-batches-bin",
    ),
  ),
}

MIRRORS: dict[str, tuple[str, ...]] = {
  "mnist": (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
  ),
  "fashion_mnist": (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    # The authors' own address has no https; the checksum is what makes it safe to use.
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
  ),
  "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}


def download(file: PublishedFile, mirrors: Sequence[str], folder: Path) -> Path:
  """Downloads a file from the first mirror that gives it whole, and verifies it.

  Args:
    file: what to fetch, with the size and SHA-256 that it must have.
    mirrors: base URLs, each ending in a slash, tried in order.
    folder: where to put it; made if missing.

  Returns:
    The path of the file, which appears under its name only once it is verified.

  Raises:
    DownloadError: no mirror could be reached or gave the right bytes, or the folder
      cannot be written to.
  """
  reasons = []
  for mirror in mirrors:
    try:
      return _download(file, mirror + file.name, folder)
    except (OSError, http.client.HTTPException, DownloadError) as error:
      reasons.append(f"{mirror}{file.name}: {error}")
  raise DownloadError("; ".join(reasons))


def _download(file: PublishedFile, url: str, folder: Path) -> Path:
  partial = folder / f"{file.name}.{os.getpid()}.part"
  try:
    received, sha256 = _copy(url, partial, file)
    if received != file.size:
      found = f"more than {file.size}" if received > file.size else str(received)
      raise DownloadError(f"gave {found} bytes where {file.size} were expected")
    if sha256 != file.sha256:
      raise DownloadError(f"gave bytes of SHA-256 {sha256} where {file.sha256} was expected")
    return partial.replace(folder / file.name)
  finally:
    partial.unlink(missing_ok=True)


def _copy(url: str, target: Path, file: PublishedFile) -> tuple[int, str]:
  """Copies the URL to the target; stops past the expected size. Returns the size and SHA-256."""
  received, digest = 0, hashlib.sha256()
  with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
    target.parent.mkdir(parents=True, exist_ok=True)  # now that there is something to put there
    with (
      open(target, "wb") as output,
      Progress(console=Console(stderr=True), transient=True) as progress,
    ):
      task = progress.add_task(file.name, total=file.size)
      while received <= file.size and (chunk := response.read(CHUNK_BYTES)):
        output.write(chunk)
        digest.update(chunk)
        received += len(chunk)
        progress.update(task, completed=received)
  return received, digest.hexdigest()
