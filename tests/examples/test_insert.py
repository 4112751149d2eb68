"""Batch norm in a trained VGG: it starts from where the network was, and trains."""

import matplotlib.image
import numpy as np

from examples import insert


def test_both_start_alike_and_learn(monkeypatch, tmp_path, capsys):
  small = {"WIDTHS": (8,), "BLOCKS": (1,), "STEPS": 30, "LAST": 2, "BEFORE": 1e-2, "RATES": (1e-2,)}
  for name, value in small.items():
    monkeypatch.setattr(insert, name, value)
  curves = insert.main(str(tmp_path / "new"))
  plain, normed = curves.values()
  assert plain.accuracies[0] == normed.accuracies[0]
  assert all(np.mean(c.losses[-2:]) < c.losses[0] for c in curves.values())
  assert "1 norm(s) inserted" in capsys.readouterr().out
  picture = matplotlib.image.imread(tmp_path / "new" / "curves.png")
  assert picture[..., :3].std() > 0
