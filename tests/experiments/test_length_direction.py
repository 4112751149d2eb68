"""The picture of length and direction, and that it shows what is claimed."""

import jax
import matplotlib.image
import numpy as np
import pytest

from experiments import length_direction


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch):
  monkeypatch.setattr(length_direction, "STEPS", 150)


def test_gdnp_converges_linearly_on_both_and_gradient_descent_on_one():
  with jax.enable_x64(True):
    regression = length_direction.gaps(length_direction.diabetes())
    sides = length_direction.gaps(length_direction.halfspace())
  for curves in (regression, sides):
    assert all(curves[name][0] == 1 for name in length_direction.COLOURS)
  bound = regression[length_direction.BOUND]
  assert np.all(regression["GDNP"] <= bound)
  assert np.all(regression["gradient descent"] <= bound)
  assert sides["GDNP"][150] < 1e-3 * sides[length_direction.BOUND][150]
  assert sides["gradient descent"][150] > 10 * sides[length_direction.BOUND][150]


def test_says_and_draws(tmp_path):
  said = []
  length_direction.main(tmp_path / "picture.png", said.append)
  assert [line for line in said if "GDNP" in line][1].split() == ["GDNP", "91"]
  assert any(line.endswith("more than 150") for line in said)
  picture = matplotlib.image.imread(tmp_path / "picture.png")
  assert picture.shape[1] > picture.shape[0] > 500
  red = (abs(picture[..., :3] - [0xC8 / 255, 0x45 / 255, 0x2C / 255]) < 0.02).all(-1)
  assert red[:, : red.shape[1] // 2].any()
  assert red[:, red.shape[1] // 2 :].any()
