"""Whether a checkpoint is still what was written: SHA-256 sums of its files, kept among them.

Orbax finds some kinds of damage and restores others as numbers. The sums find any: a file cut
short, a bit flipped, a file gone or added. They are written before the checkpoint gets its name, so
that one without them was never whole; `sha256sum -c sha256sums.txt` checks them by hand.
"""

import hashlib
from pathlib import Path

from examples.settings import write_atomically

SUMS = "sha256sums.txt"
# What the sums leave out: themselves, and what Orbax notes last, of which only the presence counts.
NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")
UNSUMMED = (SUMS, *NOTES)
LARGEST = 2**26  # bytes of the list: some 500,000 files


def seal(directory: Path) -> None:
  """Writes the sums of all files in `directory`, at once or not at all."""
  write_atomically(directory / SUMS, "".join(_lines(directory)))


def damage(directory: Path) -> str | None:
  """What is wrong with a sealed directory, in words; None where all is as it was sealed."""
  sums = directory / SUMS
  try:
    if not any(directory.iterdir()):
      return "it is empty"
    if not sums.is_file():
      return f"{SUMS} is missing"
    for name in NOTES:
      if not (directory / name).is_file():
        return f"{name} is missing"
    if sums.stat().st_size > LARGEST:
      return f"{SUMS} is damaged: {sums.stat().st_size} bytes long"
    sealed, found = sums.read_bytes(), "".join(_lines(directory)).encode()
  except OSError as error:
    return f"it cannot be read ({error})"
  return None if sealed == found else _difference(_parse(sealed), _parse(found))


def _lines(directory: Path) -> list[str]:
  """A line for each file, as sha256sum writes it; no file is read into memory whole."""
  lines = []
  for file in sorted(directory.rglob("*")):
    name = file.relative_to(directory).as_posix()
    if name not in UNSUMMED and not file.is_dir():
      with file.open("rb") as content:
        lines.append(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {name}\n")
  return lines


def _parse(sums: bytes) -> dict[str, str]:
  """Sums by file name; of any bytes."""
  parts = (line.partition("  ") for line in sums.decode(errors="replace").splitlines())
  return {name: digest for digest, _, name in parts}


def _difference(sealed: dict[str, str], found: dict[str, str]) -> str:
  for name in sorted({*sealed, *found}):
    if name not in found:
      return f"{name} is missing"
    if name not in sealed:
      return f"{name} was not written with it"
    if sealed[name] != found[name]:
      return f"{name} is not what was written"
  return f"{SUMS} is not what was written"
