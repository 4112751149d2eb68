"""The picture of a run."""

import matplotlib.image
import pytest

from examples import curves

ROWS = [
  {"step": 1, "train/loss": 2.0, "train/accuracy": 0.1},
  {"step": 2, "train/loss": 1.0, "train/accuracy": 0.5},
  {"step": 2, "test/loss": 1.5, "test/accuracy": 0.4},
]


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS], ids=["none", "one", "all"])
def test_draws_what_there_is(tmp_path, rows):
  curves.draw(rows, tmp_path / "curves.png", "a title")
  picture = matplotlib.image.imread(tmp_path / "curves.png")
  assert picture.shape[1] > picture.shape[0] > 500
  # The line of the test results is drawn if and only if there are some.
  red = (abs(picture[..., :3] - [0xC8 / 255, 0x45 / 255, 0x2C / 255]) < 0.02).all(-1)
  assert red.any() == any("test/loss" in row for row in rows)
