"""Tests of examples/data: real files, a real server, real iterators."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import struct
import tarfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from grain.sharding import ShardOptions
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import data
from examples.data import fetch, formats, sources

IDX_NAMES = [file.unpacked for file in fetch.PUBLISHED["mnist"]]
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = IDX_NAMES
DEBIAN_FASHION = sources.SYSTEM_FOLDERS["fashion_mnist"][0]


# Files and data sets to test with.


def idx_bytes(array, magic=None):
  magic = 0x800 + array.ndim if magic is None else magic
  return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def random_arrays(train=7, test=4, seed=0):
  rng = np.random.default_rng(seed)
  images = [rng.integers(256, size=(n, 28, 28), dtype=np.uint8) for n in (train, test)]
  labels = [rng.integers(10, size=n, dtype=np.uint8) for n in (train, test)]
  return dict(zip(IDX_NAMES, [images[0], labels[0], images[1], labels[1]], strict=True))


def write_idx(folder, arrays, compress=True):
  folder.mkdir(parents=True, exist_ok=True)
  for name, array in arrays.items():
    if compress:
      (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    else:
      (folder / name).write_bytes(idx_bytes(array))


def load_mnist(folder):
  return data.load("mnist", str(folder), download=False)


def numbered_dataset(examples=10, tests=5, shape=(4, 4, 1), seed=0):
  """Random images; each label is its example's number, so that batches can be traced."""
  rng = np.random.default_rng(seed)
  return data.Dataset(
    name="numbered",
    train_images=rng.integers(256, size=(examples, *shape), dtype=np.uint8),
    train_labels=np.arange(examples, dtype=np.int32),
    test_images=rng.integers(256, size=(tests, *shape), dtype=np.uint8),
    test_labels=np.arange(tests, dtype=np.int32),
    class_names=(),
  )


def standardized(images, dataset):
  axes = (0, 1, 2)
  mean = dataset.train_images.mean(axes, dtype=np.float64)
  return (images - mean) / dataset.train_images.std(axes, dtype=np.float64)


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def labels_of(batches):
  return np.concatenate([batch["label"] for batch in batches])


def assert_same_batches(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


# Which data sets there are.


def test_unknown_name():
  message = r"no data set 'fashion': did you mean 'fashion_mnist'.*digits, mnist"
  with pytest.raises(ValueError, match=message):
    data.load("fashion")


def test_digits():
  digits = data.load("digits")
  assert digits.train_images.shape == (1437, 8, 8, 1)
  assert digits.test_images.shape == (360, 8, 8, 1)
  assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
  assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
  assert digits.train_images.min() == 0
  assert digits.train_images.max() == 255
  assert digits.class_names == tuple("0123456789")


def test_digits_split_is_stratified_disjoint_and_fixed():
  digits = data.load("digits")
  counts = np.bincount(digits.train_labels) + np.bincount(digits.test_labels)
  np.testing.assert_allclose(np.bincount(digits.test_labels) / counts, 0.2, atol=0.005)
  train, test = ({image.tobytes() for image in images} for images in (digits[1], digits[3]))
  assert len(train) == 1437
  assert len(test) == 360
  assert not train & test
  # Results are only comparable while everybody tests on the same examples.
  digest = hashlib.sha256(digits.test_images.tobytes() + digits.test_labels.tobytes())
  assert digest.hexdigest()[:16] == "eb33daa4a6fa9662"


def test_digits_refuses_a_directory(tmp_path):
  with pytest.raises(ValueError, match=r"digits comes with scikit-learn.*directory=.*leave it out"):
    data.load("digits", str(tmp_path))


@pytest.mark.skipif(not DEBIAN_FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_debian(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  fashion = data.load("fashion_mnist", download=False)
  assert fashion.train_images.shape == (60_000, 28, 28, 1)
  assert fashion.test_images.shape == (10_000, 28, 28, 1)
  assert np.bincount(fashion.train_labels).tolist() == [6000] * 10
  assert np.bincount(fashion.test_labels).tolist() == [1000] * 10
  # The published statistics of the training set, in units of 255.
  np.testing.assert_allclose(fashion.train_images.mean() / 255, 0.2860, atol=1e-4)
  np.testing.assert_allclose(fashion.train_images[:6000].std() / 255, 0.3530, atol=2e-3)
  assert fashion.class_names[fashion.train_labels[0]] == "Ankle boot"
  assert fashion.train_images.dtype == np.uint8
  assert fashion.train_labels.dtype == np.int32


# IDX files.


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_round_trip(tmp_path, name, compress):
  arrays = random_arrays()
  write_idx(tmp_path, arrays, compress)
  dataset = data.load(name, str(tmp_path), download=False)
  assert dataset.name == name
  assert len(dataset.class_names) == 10
  for loaded, written in zip(dataset[1:5], arrays.values(), strict=True):
    np.testing.assert_array_equal(loaded.reshape(written.shape), written)
  assert dataset.train_images.shape == (7, 28, 28, 1)
  assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32


def test_default_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write_idx(tmp_path / "data" / "mnist", random_arrays())
  assert len(data.load("mnist", download=False).train_images) == 7


def test_own_directory_comes_before_debians(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write_idx(tmp_path / "data" / "fashion_mnist", random_arrays())
  assert len(data.load("fashion_mnist", download=False).train_images) == 7


def test_missing_file(tmp_path):
  write_idx(tmp_path, random_arrays())
  (tmp_path / f"{TEST_LABELS}.gz").unlink()
  message = (
    rf"mnist needs {TEST_LABELS}\.gz \(or {TEST_LABELS}\), which is not in {tmp_path}, and "
    rf"download=False forbids.*fetch it from https://.*put it in {tmp_path}"
  )
  with pytest.raises(FileNotFoundError, match=message):
    load_mnist(tmp_path)


def test_missing_file_names_the_default_directories(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sources.SYSTEM_FOLDERS, "fashion_mnist", (tmp_path / "system",))
  with pytest.raises(FileNotFoundError, match=r"not in data/fashion_mnist or .*/system, and"):
    data.load("fashion_mnist", download=False)


def test_all_missing_files_are_named_and_no_folder_is_made(tmp_path, monkeypatch, server):
  monkeypatch.setitem(fetch.MIRRORS, "mnist", ("http://127.0.0.1:9/",))
  monkeypatch.chdir(tmp_path)
  named = ", ".join(rf"{name}\.gz \(or {name}\)" for name in IDX_NAMES)
  with pytest.raises(FileNotFoundError, match=rf"needs {named}, .* not in data/mnist, and"):
    data.load("mnist")
  with pytest.raises(FileNotFoundError, match=rf"needs {named}, .*/typo, and there is no"):
    data.load("mnist", str(tmp_path / "typo"))
  assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_swapped_files(tmp_path):
  arrays = random_arrays()
  arrays[TRAIN_IMAGES], arrays[TRAIN_LABELS] = arrays[TRAIN_LABELS], arrays[TRAIN_IMAGES]
  write_idx(tmp_path, arrays)
  message = f"{TRAIN_IMAGES}.gz should hold images .*0x00000803.*0x00000801.*labels.*swapped"
  with pytest.raises(ValueError, match=message):
    load_mnist(tmp_path)


def test_no_idx_file(tmp_path):
  write_idx(tmp_path, random_arrays())
  (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(b"<html>Not Found</html>")
  with pytest.raises(ValueError, match="starts with 0x3c68746d, which marks no IDX file"):
    load_mnist(tmp_path)


def test_wrong_dimensions(tmp_path):
  arrays = random_arrays() | {TRAIN_IMAGES: np.zeros((7, 32, 32), np.uint8)}
  write_idx(tmp_path, arrays)
  with pytest.raises(ValueError, match="holds images of 32x32 pixels where 28x28 were expected"):
    load_mnist(tmp_path)


@pytest.mark.parametrize("claimed", [0, 60_001, 2**32 - 1])
def test_wrong_count_in_the_header(tmp_path, claimed):
  write_idx(tmp_path, random_arrays(), compress=False)
  header = struct.pack(">4I", 0x803, claimed, 28, 28)
  (tmp_path / TRAIN_IMAGES).write_bytes(header)
  with pytest.raises(ValueError, match=f"claims {claimed} items where 1 to 60000 were expected"):
    load_mnist(tmp_path)


def test_more_test_examples_than_published(tmp_path):
  write_idx(tmp_path, random_arrays(), compress=False)
  (tmp_path / TEST_LABELS).write_bytes(idx_bytes(np.zeros(10_001, np.uint8)))
  with pytest.raises(ValueError, match="claims 10001 items where 1 to 10000"):
    load_mnist(tmp_path)


def test_counts_differ(tmp_path):
  write_idx(tmp_path, random_arrays() | {TRAIN_LABELS: np.zeros(6, np.uint8)})
  message = f"{TRAIN_IMAGES}.gz holds 7 images but .*{TRAIN_LABELS}.gz 6 labels"
  with pytest.raises(ValueError, match=message):
    load_mnist(tmp_path)


def test_label_out_of_range(tmp_path):
  arrays = random_arrays()
  arrays[TEST_LABELS][2] = 10
  write_idx(tmp_path, arrays)
  message = f"{TEST_LABELS}.gz is mislabelled: label 10 at position 2 is none of 0 to 9"
  with pytest.raises(ValueError, match=message):
    load_mnist(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 15, 16, 17, 500, 16 + 7 * 784 - 1])
def test_truncated_plain_file(tmp_path, length):
  arrays = random_arrays()
  write_idx(tmp_path, arrays, compress=False)
  (tmp_path / TRAIN_IMAGES).write_bytes(idx_bytes(arrays[TRAIN_IMAGES])[:length])
  with pytest.raises(ValueError, match=rf"{TRAIN_IMAGES} is truncated: \d+ more bytes"):
    load_mnist(tmp_path)


@pytest.mark.parametrize("left", [0, 1, 2, 9, 10, 20, 1000, -9, -8, -1])
def test_truncated_gz(tmp_path, left):
  write_idx(tmp_path, random_arrays())
  path = tmp_path / f"{TRAIN_IMAGES}.gz"
  path.write_bytes(path.read_bytes()[:left])
  with pytest.raises(ValueError, match=f"{TRAIN_IMAGES}.gz is truncated: "):
    load_mnist(tmp_path)


def test_damaged_gz(tmp_path):
  write_idx(tmp_path, random_arrays())
  path = tmp_path / f"{TRAIN_IMAGES}.gz"
  content = bytearray(path.read_bytes())
  content[-8] ^= 1  # the checksum, which only a read past the last byte verifies
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"{TRAIN_IMAGES}.gz is damaged .*CRC check failed"):
    load_mnist(tmp_path)


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "plain"])
def test_trailing_bytes(tmp_path, compress):
  arrays = random_arrays()
  write_idx(tmp_path, arrays, compress)
  content = idx_bytes(arrays[TRAIN_IMAGES]) + b"\0"
  path = tmp_path / (f"{TRAIN_IMAGES}.gz" if compress else TRAIN_IMAGES)
  path.write_bytes(gzip.compress(content) if compress else content)
  with pytest.raises(ValueError, match=f"{path} is longer than the format allows"):
    load_mnist(tmp_path)


@settings(max_examples=200, deadline=None)
@given(
  compress=st.booleans(),
  position=st.floats(0, 1, exclude_max=True),
  flip=st.integers(0, 255),
  cut=st.floats(0, 1),
)
def test_any_damage_is_a_value_error(tmp_path_factory, compress, position, flip, cut):
  """Whatever one byte is changed to, and wherever the file is cut, nothing else is raised."""
  array = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
  whole = gzip.compress(idx_bytes(array)) if compress else idx_bytes(array)
  content = bytearray(whole)
  content[int(position * len(whole))] ^= flip
  content = content[: round(cut * len(whole))]
  path = tmp_path_factory.mktemp("damaged") / "images"
  path.write_bytes(content)
  message = ""
  try:
    result = formats.read_idx(path, (28, 28), max_items=3)
  except ValueError as error:
    message = str(error)
  if message:
    assert str(path) in message
  else:
    assert result.shape == array.shape
    assert len(content) == len(whole)


# CIFAR-10.


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
  """The six files at their full size, zero but for 20 random records at both ends."""
  folder = tmp_path_factory.mktemp("cifar") / formats.CIFAR_FOLDER
  folder.mkdir()
  rng = np.random.default_rng(0)
  records = {}
  for name in (*formats.CIFAR_TRAIN_FILES, formats.CIFAR_TEST_FILE):
    ends = rng.integers(256, size=(2, 20, 3073), dtype=np.uint8)
    ends[..., 0] %= 10
    with open(folder / name, "wb") as file:
      file.write(ends[0].tobytes())
      file.seek(formats.CIFAR_FILE_BYTES - 20 * 3073)
      file.write(ends[1].tobytes())
    records[name] = ends
  return folder, records


@pytest.fixture(scope="session")
def cifar_tar(cifar, tmp_path_factory):
  path = tmp_path_factory.mktemp("cifar_tar") / "cifar-10-binary.tar.gz"
  with tarfile.open(path, "w:gz", compresslevel=1) as archive:
    archive.add(cifar[0], formats.CIFAR_FOLDER)
  return path


def assert_cifar(dataset, records):
  assert dataset.train_images.shape == (50_000, 32, 32, 3)
  assert dataset.test_images.shape == (10_000, 32, 32, 3)
  assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
  assert len(dataset.class_names) == 10
  train = dataset.train_images.reshape(5, 10_000, 32, 32, 3)
  train_labels = dataset.train_labels.reshape(5, 10_000)
  files = [*zip(train, train_labels, strict=True), (dataset.test_images, dataset.test_labels)]
  for (images, labels), ends in zip(files, records.values(), strict=True):
    for where, end in ((slice(20), ends[0]), (slice(-20, None), ends[1])):
      np.testing.assert_array_equal(labels[where], end[:, 0])
      for channel in range(3):
        plane = end[:, 1 + 1024 * channel :][:, :1024].reshape(20, 32, 32)
        np.testing.assert_array_equal(images[where][..., channel], plane)


def test_cifar_folder(cifar):
  folder, records = cifar
  assert_cifar(data.load("cifar10", str(folder.parent), download=False), records)


def test_cifar_tar(cifar, cifar_tar):
  assert_cifar(data.load("cifar10", str(cifar_tar.parent), download=False), cifar[1])


def sparse_cifar(folder, sizes=None):
  """The six files, zero throughout, taking no room on the disk; some of another size."""
  path = folder / formats.CIFAR_FOLDER
  path.mkdir()
  for name in (*formats.CIFAR_TRAIN_FILES, formats.CIFAR_TEST_FILE):
    with open(path / name, "wb") as file:
      file.truncate((sizes or {}).get(name, formats.CIFAR_FILE_BYTES))
  return path


@pytest.mark.parametrize("size", [0, 1, 3073, formats.CIFAR_FILE_BYTES - 1])
def test_truncated_cifar_file(tmp_path, size):
  sparse_cifar(tmp_path, {"data_batch_1.bin": size})
  with pytest.raises(ValueError, match=f"data_batch_1.bin is truncated: 30730000 .*only {size} "):
    data.load("cifar10", str(tmp_path), download=False)


def test_too_long_cifar_file(tmp_path):
  sparse_cifar(tmp_path, {"data_batch_1.bin": formats.CIFAR_FILE_BYTES + 1})
  with pytest.raises(ValueError, match=r"data_batch_1.bin is longer than the format allows"):
    data.load("cifar10", str(tmp_path), download=False)


def test_mislabelled_cifar_file(tmp_path):
  path = sparse_cifar(tmp_path) / "data_batch_2.bin"
  with open(path, "r+b") as file:
    file.seek(5 * 3073)
    file.write(b"\x0a")
  with pytest.raises(ValueError, match=r"data_batch_2.bin is mislabelled: label 10 at position 5"):
    data.load("cifar10", str(tmp_path), download=False)


def test_missing_cifar_file(tmp_path):
  (sparse_cifar(tmp_path) / "data_batch_4.bin").unlink()
  with pytest.raises(FileNotFoundError, match=r"data_batch_4.bin is missing, one of the six"):
    data.load("cifar10", str(tmp_path), download=False)


def write_tar(folder, members):
  with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
    for member, content in members:
      archive.addfile(member, io.BytesIO(content))


def tar_member(name, size=0, kind=tarfile.REGTYPE):
  member = tarfile.TarInfo(name)
  member.size, member.type, member.linkname = size, kind, "/etc/hostname"
  return member


@pytest.mark.parametrize(
  ("member", "message"),
  [
    (tar_member("cifar-10-batches-py/data_batch_1"), "lacks the member .*/data_batch_1.bin"),
    (tar_member("../cifar-10-batches-bin/data_batch_1.bin"), "lacks the member"),
    (tar_member("cifar-10-batches-bin/data_batch_1.bin", 5), r"30730000 bytes \(it has 5\)"),
    (tar_member("cifar-10-batches-bin/data_batch_1.bin", 0, tarfile.SYMTYPE), "something else"),
    (tar_member("cifar-10-batches-bin/data_batch_1.bin", 0, tarfile.LNKTYPE), "something else"),
  ],
)
def test_wrong_member_of_the_tar(tmp_path, member, message):
  write_tar(tmp_path, [(member, bytes(member.size))])
  with pytest.raises(ValueError, match=message):
    data.load("cifar10", str(tmp_path), download=False)
  assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_no_tar(tmp_path):
  (tmp_path / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(b"no archive" * 1000))
  with pytest.raises(ValueError, match="is no intact tar archive"):
    data.load("cifar10", str(tmp_path), download=False)


def test_tar_that_unpacks_to_too_much(tmp_path):
  mebibyte = gzip.compress(bytes(2**20))  # gzip's members may follow each other
  content = mebibyte * (formats.CIFAR_TAR_MAX_BYTES // 2**20 + 1)
  (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
  with pytest.raises(ValueError, match="unpacks to more than the 185428576 bytes"):
    data.load("cifar10", str(tmp_path), download=False)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_tar(tmp_path, cifar_tar, share):
  content = cifar_tar.read_bytes()
  (tmp_path / cifar_tar.name).write_bytes(content[: int(share * len(content))])
  with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is (truncated|no intact tar)"):
    data.load("cifar10", str(tmp_path), download=False)


# Downloads.


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves a folder; under /short/ half of each file, under /endless/ 256 MiB."""

  read_to_the_end = False

  def log_message(self, *args):
    pass

  def do_GET(self):
    if not self.path.startswith(("/short/", "/endless/")):
      super().do_GET()
      return
    content = Path(self.directory, self.path.rsplit("/", 1)[1]).read_bytes()
    self.send_response(200)
    if self.path.startswith("/short/"):
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content[: len(content) // 2])
    else:
      self.end_headers()
      with contextlib.suppress(ConnectionError):
        for _ in range(2**12):
          self.wfile.write(bytes(2**16))
        Handler.read_to_the_end = True


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A server of a small MNIST, published as such, and the arrays in it."""
  folder = tmp_path / "served"
  arrays = random_arrays()
  write_idx(folder, arrays)
  published = tuple(
    fetch.PublishedFile(
      path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), name
    )
    for name in IDX_NAMES
    for path in [folder / f"{name}.gz"]
  )
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  monkeypatch.setitem(fetch.PUBLISHED, "mnist", published)

  def make_handler(*args):
    return Handler(*args, directory=str(folder))

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler) as running:
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    base = f"http://127.0.0.1:{running.server_port}/"
    monkeypatch.setitem(fetch.MIRRORS, "mnist", (base,))
    yield base, folder, arrays
    running.shutdown()
    thread.join()


@pytest.fixture
def folder(tmp_path):
  """An empty one, to download into."""
  (tmp_path / "new").mkdir()
  return tmp_path / "new"


def test_download(folder, server):
  dataset = data.load("mnist", str(folder))
  np.testing.assert_array_equal(dataset.train_images[..., 0], server[2][TRAIN_IMAGES])
  assert sorted(path.name for path in folder.iterdir()) == sorted(f"{n}.gz" for n in IDX_NAMES)


def test_download_into_the_default_directory(tmp_path, monkeypatch, server):
  monkeypatch.chdir(tmp_path)
  data.load("mnist")
  assert len(list((tmp_path / "data" / "mnist").iterdir())) == 4


def test_only_missing_files_are_downloaded(tmp_path, server):
  _, served, arrays = server
  folder = tmp_path / "some"
  write_idx(folder, {name: arrays[name] for name in IDX_NAMES[1:]}, compress=False)
  for name in IDX_NAMES[1:]:
    (served / f"{name}.gz").unlink()
  assert len(data.load("mnist", str(folder)).train_images) == 7


def test_next_mirror_is_tried(folder, monkeypatch, server):
  monkeypatch.setitem(fetch.MIRRORS, "mnist", (f"{server[0]}nothing/", server[0]))
  assert len(data.load("mnist", str(folder)).train_images) == 7


@pytest.mark.parametrize(
  ("mirror", "reason"),
  [
    ("nothing/", "HTTP Error 404: File not found"),
    ("short/", r"gave \d+ bytes where \d+ were expected"),
    ("endless/", r"gave more than \d+ bytes where \d+ were expected"),
  ],
)
def test_failed_download(folder, monkeypatch, server, mirror, reason):
  base = server[0] + mirror
  monkeypatch.setitem(fetch.MIRRORS, "mnist", (base,))
  message = (
    rf"mnist needs {TRAIN_IMAGES}\.gz .*not in {folder}, and downloading failed "
    rf"\({base}{TRAIN_IMAGES}\.gz: {reason}\): fetch them from {base} .*put them in {folder}"
  )
  with pytest.raises(FileNotFoundError, match=message):
    data.load("mnist", str(folder))
  assert not list(folder.iterdir())
  assert not Handler.read_to_the_end


def test_download_of_other_content(folder, server):
  path = server[1] / f"{TRAIN_IMAGES}.gz"
  content = bytearray(path.read_bytes())
  content[5] ^= 1  # the time in the header: a valid file, but not the published one
  path.write_bytes(content)
  with pytest.raises(FileNotFoundError, match=r"gave bytes of SHA-256 \w{64} where \w{64} was"):
    data.load("mnist", str(folder))
  assert not list(folder.iterdir())


def test_download_without_a_network(folder, monkeypatch, server):
  monkeypatch.setitem(fetch.MIRRORS, "mnist", ("http://127.0.0.1:9/",))
  with pytest.raises(FileNotFoundError, match=r"downloading failed .*Connection refused"):
    data.load("mnist", str(folder))


def test_download_into_a_file(tmp_path, server):
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(FileNotFoundError, match="there is no such folder"):
    data.load("mnist", str(tmp_path / "file"))


# Batches of the training set.


def test_train_batch_shapes():
  dataset = data.load("digits")
  batch = next(data.train_batches(dataset, 16, seed=0))
  assert batch.keys() == {"image", "label"}
  assert batch["image"].shape == (16, 8, 8, 1)
  assert batch["image"].dtype == np.float32
  assert batch["label"].shape == (16,)
  assert batch["label"].dtype == np.int32


@settings(max_examples=30, deadline=None)
@given(examples=st.integers(1, 20), batch_size=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_every_epoch_holds_every_example_once(examples, batch_size, seed):
  batch_size = min(batch_size, examples)
  epochs = 3
  batches = data.train_batches(numbered_dataset(examples), batch_size, seed=seed)
  labels = labels_of(take(batches, -(-epochs * examples // batch_size)))
  orders = labels[: epochs * examples].reshape(epochs, examples)
  np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(examples), (epochs, 1)))


def test_epochs_and_seeds_differ():
  dataset = numbered_dataset(100)
  orders = [
    tuple(batch["label"])
    for seed in range(3)
    for batch in take(data.train_batches(dataset, 100, seed=seed), 3)
  ]
  assert len(set(orders)) == 9
  assert tuple(range(100)) not in orders


@pytest.mark.parametrize("augment", ["none", "shift", "flip_shift"])
def test_same_seed_same_batches(augment):
  dataset = numbered_dataset()
  first, second = (
    take(data.train_batches(dataset, 3, seed=5, augment=augment), 12) for _ in range(2)
  )
  assert_same_batches(first, second)


@settings(max_examples=25, deadline=None)
@given(
  before=st.integers(0, 25),
  batch_size=st.integers(1, 10),
  augment=st.sampled_from(["none", "shift", "flip_shift"]),
)
def test_resumption_is_exact(before, batch_size, augment):
  def new_iterator():
    return data.train_batches(numbered_dataset(), batch_size, seed=1, augment=augment)

  iterator = new_iterator()
  take(iterator, before)
  state = json.loads(json.dumps(iterator.get_state()))
  resumed = new_iterator()
  take(resumed, 2)  # whatever it prefetched and served before must not matter
  resumed.set_state(state)
  assert_same_batches(take(resumed, 15), take(iterator, 15))


@settings(max_examples=25, deadline=None)
@given(
  shards=st.sampled_from([1, 2, 4]),
  others=st.sampled_from([1, 2, 4]),
  augment=st.sampled_from(["none", "shift", "flip_shift"]),
)
def test_shards_make_up_the_whole_batch_and_resume_each_others_state(shards, others, augment):
  def iterators(count):
    return [
      data.train_batches(
        numbered_dataset(), 8, seed=1, augment=augment, shard=ShardOptions(index, count)
      )
      for index in range(count)
    ]

  def joined(shares):
    return {key: np.concatenate([share[key] for share in shares]) for key in shares[0]}

  whole = take(data.train_batches(numbered_dataset(), 8, seed=1, augment=augment), 6)
  first = iterators(shards)
  assert_same_batches([joined([next(it) for it in first]) for _ in range(3)], whole[:3])
  assert all(it.get_state() == {"next_index": 3} for it in first)
  second = iterators(others)
  for it in second:
    it.set_state(first[0].get_state())
  assert_same_batches([joined([next(it) for it in second]) for _ in range(3)], whole[3:])


class Watched(np.ndarray):
  """Images that note which of them were asked for."""

  asked: ClassVar[list[int]] = []

  def __getitem__(self, rows):
    self.asked.extend(np.atleast_1d(rows).tolist())
    return np.asarray(self)[rows]


def test_a_shard_touches_no_other_images():
  dataset = numbered_dataset(1000)
  watched = dataset._replace(train_images=dataset.train_images.view(Watched))
  batches = data.train_batches(watched, 10, seed=0, shard=ShardOptions(1, 5))
  Watched.asked.clear()  # the mean and the standard deviation are of all images
  own = labels_of(take(batches, 3)).tolist()
  batches.close()
  whole = labels_of(take(data.train_batches(dataset, 10, seed=0), 100)).reshape(100, 10)
  assert own == whole[:3, 2:4].ravel().tolist()
  assert set(own) <= set(Watched.asked) <= set(whole[:, 2:4].ravel().tolist())


def test_shards_that_cannot_be_equal():
  for make in (functools.partial(data.train_batches, seed=0), data.test_batches):
    with pytest.raises(ValueError, match=r"batch_size=7 is not a multiple of shard_count=2; .* 6"):
      make(numbered_dataset(), 7, shard=ShardOptions(0, 2))


@pytest.mark.parametrize("tests", [0, 3, 5, 8, 9])
def test_test_batches_are_split_over_the_shards(tests):
  dataset = numbered_dataset(tests=tests)
  shares = [list(data.test_batches(dataset, 4, ShardOptions(index, 2))) for index in range(2)]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*shares, strict=True)
  ]
  assert_same_batches(joined, list(data.test_batches(dataset, 4)))


def test_state_counts_what_the_caller_took():
  iterator = data.train_batches(numbered_dataset(), 3, seed=0)
  for taken in range(5):
    assert iterator.get_state() == {"next_index": taken}
    next(iterator)
    time.sleep(0.01)  # lets the threads run ahead


def test_batches_belong_to_the_caller():
  """Writing to a batch changes neither the data set nor later batches."""
  dataset = numbered_dataset(4)
  copy = data.Dataset(*(v.copy() if isinstance(v, np.ndarray) else v for v in dataset))
  for batch in take(data.train_batches(dataset, 4, seed=0), 20):
    batch["image"][:] = 0
    batch["label"][:] = 0
  np.testing.assert_array_equal(dataset.train_images, copy.train_images)
  np.testing.assert_array_equal(dataset.train_labels, copy.train_labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_standardized_and_keep_their_labels(channels):
  dataset = numbered_dataset(50, shape=(5, 6, channels))
  batch = next(data.train_batches(dataset, 50, seed=0))
  expected = standardized(dataset.train_images[batch["label"]], dataset)
  np.testing.assert_allclose(batch["image"], expected, atol=1e-5)
  np.testing.assert_allclose(batch["image"].mean((0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(batch["image"].std((0, 1, 2)), 1, atol=1e-5)


def test_channels_have_their_own_statistics():
  dataset = numbered_dataset(50, shape=(5, 6, 2))
  dataset.train_images[..., 1] //= 16
  batch = next(data.train_batches(dataset, 50, seed=0))
  np.testing.assert_allclose(batch["image"].std((0, 1, 2)), [1, 1], atol=1e-5)


def test_constant_channel_becomes_zero():
  dataset = numbered_dataset(50, shape=(5, 6, 2))
  dataset.train_images[..., 1] = 77
  batch = next(data.train_batches(dataset, 50, seed=0))
  np.testing.assert_array_equal(batch["image"][..., 1], 0)


def shifted_by(images, down, right):
  """Moves all images, one pixel at a time: slow, and nothing like the pipeline."""
  result = np.zeros_like(images)
  height, width = images.shape[1:3]
  for row, column in itertools.product(range(height), range(width)):
    if 0 <= row - down < height and 0 <= column - right < width:
      result[:, row, column] = images[:, row - down, column - right]
  return result


@pytest.mark.parametrize("augment", ["shift", "flip_shift"])
def test_augmentation(augment):
  """Every image is one of the images that it may become, and each way is taken."""
  dataset = numbered_dataset(2000, shape=(6, 7, 2))
  batch = next(data.train_batches(dataset, 2000, seed=0, augment=augment))
  original = dataset.train_images[batch["label"]]
  mirrored = [False, True] if augment == "flip_shift" else [False]
  matches = []
  for mirror, down, right in itertools.product(mirrored, range(-2, 3), range(-2, 3)):
    moved = shifted_by(original[:, :, ::-1] if mirror else original, down, right)
    errors = np.abs(batch["image"] - standardized(moved, dataset)).max((1, 2, 3))
    matches.append(errors < 1e-5)
  matches = np.array(matches)
  assert (matches.sum(0) == 1).all()
  expected = 2000 / len(matches)
  assert matches.sum(1).min() > expected / 2
  assert matches.sum(1).max() < expected * 2


def test_augmentation_differs_between_epochs():
  dataset = numbered_dataset(1, shape=(6, 6, 1))
  batches = take(data.train_batches(dataset, 1, seed=0, augment="shift"), 100)
  assert len({batch["image"].tobytes() for batch in batches}) == 25


def test_unknown_augmentation():
  with pytest.raises(ValueError, match="augment='flip' is none of none, shift, flip_shift"):
    data.train_batches(numbered_dataset(), 2, seed=0, augment="flip")


def test_negative_seed():
  with pytest.raises(ValueError, match="seed=-1 is negative"):
    data.train_batches(numbered_dataset(), 2, seed=-1)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_not_positive(batch_size):
  with pytest.raises(ValueError, match=f"batch_size={batch_size} is not positive"):
    data.train_batches(numbered_dataset(), batch_size, seed=0)
  with pytest.raises(ValueError, match=f"batch_size={batch_size} is not positive"):
    data.test_batches(numbered_dataset(), batch_size)


def test_batch_size_larger_than_the_training_set():
  message = r"batch_size=11 is larger than the training set of numbered, which has 10 examples"
  with pytest.raises(ValueError, match=message):
    data.train_batches(numbered_dataset(10), 11, seed=0)


# Batches of the test set.


@settings(max_examples=50, deadline=None)
@given(tests=st.integers(0, 20), batch_size=st.integers(1, 25))
def test_test_batches_cover_exactly(tests, batch_size):
  dataset = numbered_dataset(tests=tests)
  batches = list(data.test_batches(dataset, batch_size))
  assert len(batches) == -(-tests // batch_size)
  if not batches:
    return
  for batch in batches:
    assert batch["image"].shape == (batch_size, 4, 4, 1)
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32
    assert batch["mask"].dtype == bool
  image, label, mask = (np.concatenate([b[k] for b in batches]) for k in ("image", "label", "mask"))
  np.testing.assert_array_equal(mask, np.arange(len(mask)) < tests)
  np.testing.assert_array_equal(label[mask], np.arange(tests))
  np.testing.assert_allclose(image[mask], standardized(dataset.test_images, dataset), atol=1e-5)
  assert not image[~mask].any()
  assert not label[~mask].any()
