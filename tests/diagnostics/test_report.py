"""The report: what is read in a terminal, by machines and in a browser."""

import html.parser
import json
import math
import runpy
import sys

import pytest

from jaxbn.diagnostics import Finding, Report

CHANNELS = ("index", "mean", "std", "running_mean", "running_std")


def layer(path, distance=0.1, size=2, history=1, **changes):
  now = {"step": 10, "channel": 0, "percentiles": [-1.0, 0.0, 1.0]}
  now |= {"running_mean": 0.1, "running_std": 1.0}
  return {
    "path": path,
    "kind": "BatchNorm",
    "calls": 1,
    "dtype": "float32",
    "size": size,
    "momentum": 0.9,
    "drift": 0.25,
    "drift_of_a_batch": 0.01,
    "distance": distance,
    "elements": 32.0,
    "gradient": 1.5,
    "channels": {name: [0.5] * size for name in CHANNELS},
    "history": [{**now, "step": 10 * i} for i in range(history)],
    **changes,
  }


def finding(where, fault="never-updated", severity="error"):
  return Finding(fault, where, severity, "certain", "seen <b> & heard", "f(x[0])\ng(y)")


@pytest.fixture(params=[1, 3])
def report(request):
  layers = (
    layer("a/<norm>", history=request.param),
    layer("", distance=math.nan, drift=math.inf, gradient=None, size=1),
  )
  findings = (finding("a/<norm>"), finding(""), finding("a/<norm>", "cancelled-bias", "note"))
  run = {"steps": 10, "batches": 8, "rows": 64}
  return Report(findings, layers, {**run, "not_looked_for": {"padding": "valid="}})


def test_a_terminal_shows_the_worst_first_and_each_fault_once(report):
  lines = str(report).splitlines()
  assert lines[0] == "1 error, 1 note; 2 layers, 8 batches of 64."
  assert lines[1] == "Training and evaluation part at (the top)."
  assert lines[3] == "error: never-updated in a/<norm> and 1 more (certain)"
  assert lines[4:7] == ["  seen <b> & heard", "    f(x[0])", "    g(y)"]
  assert lines[-5:-3] == ["Not looked for: padding (give valid=).", ""]
  assert lines[-1].split() == ["-", "0.01", "-", "32", "-"]


def test_rich_shows_the_same_words(report):
  rich = pytest.importorskip("rich.text")
  assert rich.Text.from_markup(report.__rich__()).plain == str(report)


def test_json_is_read_back(report):
  text = report.to_json()
  assert json.loads(text)["ok"] is False
  again = Report.from_json(text)
  assert str(again) == str(report)
  assert again.to_json() == text
  assert (again.findings, again.parts) == (report.findings, "")


@pytest.mark.parametrize(("severity", "ok"), [("error", False), ("warning", False), ("note", True)])
def test_a_note_is_no_failure(severity, ok):
  report = Report((finding("", severity=severity),), (), {"steps": 1, "batches": 1, "rows": 1})
  assert (report.ok, report.exit_status) == (ok, 0 if ok else 1)


class Page(html.parser.HTMLParser):
  """What is open, what there is, and what is loaded from elsewhere."""

  def __init__(self):
    super().__init__()
    self.open, self.seen, self.loaded, self.words = [], [], [], ""

  def handle_starttag(self, tag, attrs):
    self.seen.append(tag)
    self.loaded += [value for name, value in attrs if name in ("src", "href")]
    if tag != "meta":
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.seen.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words += data


def test_the_page_is_whole_and_needs_no_network(report, tmp_path):
  report.save_html(tmp_path / "report.html")
  text = (tmp_path / "report.html").read_text()
  page = Page()
  page.feed(text)
  assert (page.open, page.loaded) == ([], [])
  assert "script" not in page.seen
  assert "url(" not in text
  assert "nan" not in text.lower().replace("tabular-nums", "")
  # The distances; each layer's channels; where there are several steps, what came of them.
  assert page.seen.count("svg") == 1 + 2 + (len(report.layers[0]["history"]) > 1)
  assert "seen <b> & heard" in page.words
  assert "a/<norm>" in page.words
  assert "Not looked for: padding (give valid=)." in page.words


def test_a_run_directory_is_shown_with_an_exit_status(report, tmp_path, monkeypatch, capsys):
  def status(*arguments):
    monkeypatch.setattr(sys, "argv", ["jaxbn.diagnostics", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
      runpy.run_module("jaxbn.diagnostics", run_name="__main__")
    return ended.value.code

  assert status() == 2
  assert status(tmp_path) == 2
  assert "is no diagnosis" in capsys.readouterr().err
  report.save(tmp_path / "diagnosis.json")
  assert status(tmp_path) == 1
  assert capsys.readouterr().out.startswith(str(report))
  assert (tmp_path / "report.html").exists()
