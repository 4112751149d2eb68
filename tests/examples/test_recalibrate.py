"""Statistics that no longer fit a changed network are found again."""

from examples import recalibrate


def test_recalibration_regains_what_a_border_took(monkeypatch, capsys):
  small = {"WIDTHS": (8, 16), "BLOCKS": (1, 1), "STEPS": 60, "AVERAGED": 2, "PARTS": 1}
  for name, value in small.items():
    monkeypatch.setattr(recalibrate, name, value)
  found = recalibrate.main()
  before, after = found["images with a border of 4"]
  assert after > before + 0.1
  assert all(after > 0.3 for _, after in found.values())
  assert capsys.readouterr().out.count("%") == 2 * len(found)
