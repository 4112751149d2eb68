"""The sums of a checkpoint: no damage goes unseen, and what is whole passes."""

import subprocess

import pytest

from examples import integrity


@pytest.fixture
def sealed(tmp_path):
  directory = tmp_path / "200"
  (directory / "state" / "d").mkdir(parents=True)
  (directory / "state" / "d" / "5af0").write_bytes(bytes(range(16)))
  (directory / "state" / "empty").touch()
  (directory / "position").write_text('{"next_index": 200}')
  integrity.seal(directory)
  for name in integrity.NOTES:  # Orbax writes these later
    (directory / name).write_text("done")
  return directory


def test_what_is_whole_passes(sealed):
  assert integrity.damage(sealed) is None
  subprocess.run(["sha256sum", "--quiet", "-c", integrity.SUMS], cwd=sealed, check=True)
  sealed.rename(sealed.with_name("moved"))
  assert integrity.damage(sealed.with_name("moved")) is None


def test_a_flipped_bit_is_seen_in_every_byte(sealed):
  files = [f for f in sealed.rglob("*") if f.is_file() and f.name not in integrity.NOTES]
  assert len(files) == 4
  for file in files:
    good = file.read_bytes()
    for position in range(len(good)):
      damaged = bytearray(good)
      damaged[position] ^= 1 << position % 8
      file.write_bytes(damaged)
      wrong = integrity.damage(sealed)
      assert wrong, (file, position)
      if file.name != integrity.SUMS:
        assert wrong == f"{file.relative_to(sealed)} is not what was written"
    file.write_bytes(good)
  assert integrity.damage(sealed) is None


@pytest.mark.parametrize("name", ["state/d/5af0", "position", integrity.SUMS])
@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_file_cut_short_is_seen(sealed, name, length):
  (sealed / name).write_bytes((sealed / name).read_bytes()[:length])
  assert integrity.damage(sealed)


@pytest.mark.parametrize(
  "name", ["state/d/5af0", "state/empty", "position", integrity.SUMS, *integrity.NOTES]
)
def test_a_missing_file_is_named(sealed, name):
  (sealed / name).unlink()
  assert integrity.damage(sealed) == f"{name} is missing"


def test_other_damage_is_named(sealed, tmp_path, monkeypatch):
  (sealed / "state" / "more").touch()
  assert integrity.damage(sealed) == "state/more was not written with it"
  (tmp_path / "empty").mkdir()
  assert integrity.damage(tmp_path / "empty") == "it is empty"
  (tmp_path / "file").touch()
  assert "it cannot be read" in integrity.damage(tmp_path / "file")
  monkeypatch.setattr(integrity, "LARGEST", 100)  # a list that nobody wrote is not read
  assert "is damaged: " in integrity.damage(sealed)
