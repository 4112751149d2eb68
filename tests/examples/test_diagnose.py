"""A run diagnosed: what was trained too briefly for its momentum is told so."""

import json

from examples import diagnose, train
from tests.examples import helpers


def test_a_run_is_diagnosed_and_its_history_continued(tmp_path):
  config = helpers.config(model="mlp", steps=4, workdir=str(tmp_path / "run"))
  assert train.run(config) == 0
  for times in (1, 2):
    report = diagnose.diagnose(tmp_path / "run")
    assert report.exit_status == 1
    assert {f.fault for f in report.findings} == {"momentum-too-slow"}
    assert "after 4 steps" in report.findings[0].evidence
    saved = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert [len(v["history"]) for v in saved["layers"]] == [times] * len(report.layers)
  assert (tmp_path / "run" / "report.html").exists()
