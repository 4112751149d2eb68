"""Adaptation without labels regains accuracy under corruption."""

from examples import adapt


def test_statistics_at_hand_help_under_low_contrast(monkeypatch, capsys):
  small = {"WIDTHS": (8, 16), "STEPS": 60}
  small["CORRUPTIONS"] = {"contrast": adapt.contrast}
  for name, value in small.items():
    monkeypatch.setattr(adapt, name, value)
  as_trained, *adapted = adapt.main()["contrast"]
  assert min(adapted) > as_trained + 0.1
  assert "contrast" in capsys.readouterr().out
