"""The page of benchmarks: it is what the stored results make, and nothing in it is typed."""

import json

import pytest

from benchmarks import report
from benchmarks import results as stored

ROW = {"framework": "torch", "ours": "jaxbn", "shape": [4, 3], "dtype": "float32", "samples": 21}
TIMES = {"ours_min_ms": 2.0, "theirs_min_ms": 1.0, "ratio_min": 2.0, "ratio_median": 2.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(stored, "FOLDER", tmp_path)
  return tmp_path


def write_speed(folder):
  kinds = ("evaluation", "forward", "forward and backward")
  rows = [
    {**ROW, **TIMES, "kind": kind, "dtype": dtype}
    for kind in kinds
    for dtype in ("float32", "bfloat16")
  ]
  stored.write("speed", "python -m benchmarks.speed", rows, folder / "speed.json")
  return rows


def test_the_page_in_the_repository_is_what_the_results_make():
  found = report.available()
  if not found:
    pytest.skip("there are no results yet")
  assert report.PAGE.read_text() == report.page(found), "run python -m benchmarks.report"


def test_what_is_written_is_read_back(folder):
  rows = write_speed(folder)
  found = stored.read("speed")
  assert found["rows"] == rows
  assert {"name", "command", "date", "versions", "machine", "rows"} == set(found)
  assert found["versions"].keys() >= {"python", "jax", "flax"}
  assert set(found["machine"]) == {"cpu", "cores", "system"}
  text = (folder / "speed.json").read_text()
  assert sum(line.startswith('    {"framework"') for line in text.splitlines()) == len(rows)


def test_not_a_number_is_not_written(folder):
  with pytest.raises(ValueError, match="JSON"):
    stored.write("speed", "", [{"ratio": float("nan")}], folder / "speed.json")


def test_the_page_says_what_made_it_and_what_is_missing(folder):
  write_speed(folder)
  found = report.available()
  assert list(found) == ["speed"]
  text = report.page(found)
  assert text.startswith("# Benchmarks\n")
  assert "| speed | `python -m benchmarks.speed` |" in text
  assert f"| jax | {found['speed']['versions']['jax']} |" in text
  assert "Not measured yet: compiled." in text
  assert "torch is faster in 6 of 6 cases" in text


def test_the_report_writes_the_page_and_the_charts(folder, monkeypatch, capsys):
  monkeypatch.setattr(report, "DOCS", folder / "docs")
  monkeypatch.setattr(report, "PAGE", folder / "docs" / "benchmarks.md")
  (folder / "docs").mkdir()
  with pytest.raises(SystemExit, match="no results yet"):
    report.main()
  write_speed(folder)
  report.main()
  assert (folder / "docs" / "benchmarks.md").read_text() == report.page(report.available())
  assert (folder / "docs" / "benchmarks-speed.png").exists()
  assert "compiled is left out" in capsys.readouterr().out


def test_a_table_is_markdown():
  text = stored.table([["a", "b"], ["1", "2"]], right=[1])
  assert text.splitlines() == ["| a | b |", "| --- | ---: |", "| 1 | 2 |"]


def test_the_stored_results_name_no_computer():
  for name in report.available():
    assert set(json.loads((stored.FOLDER / f"{name}.json").read_text())["machine"]) == {
      "cpu",
      "cores",
      "system",
    }
