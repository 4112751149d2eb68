"""A run diagnosed: what was trained too briefly for its momentum is told so."""

import json

import jax
import numpy as np
import pytest

from examples import checkpoints, diagnose, train
from examples.settings import UserError
from tests.examples import helpers


def test_a_run_is_diagnosed_and_its_history_is_of_steps(tmp_path):
  config = helpers.config(model="mlp", steps=4, workdir=str(tmp_path / "run"))
  assert train.run(config) == 0
  for _ in range(2):
    report = diagnose.diagnose(tmp_path / "run")
    assert report.exit_status == 1
    assert {f.fault for f in report.findings} == {"momentum-too-slow"}
    assert "after 4 steps" in report.findings[0].evidence
    saved = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    # The second is of the same step, and takes the place of the first.
    assert [len(v["history"]) for v in saved["layers"]] == [1] * len(report.layers)
  assert (tmp_path / "run" / "report.html").exists()


def test_a_run_diagnoses_itself_and_goes_on(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(diagnose, "EVERY", 2)
  run, alone = tmp_path / "run", tmp_path / "alone"
  options = {"model": "mlp", "save_every": 100}
  assert train.run(helpers.config(steps=5, workdir=str(alone), **options)) == 0
  assert not (alone / "diagnosis.json").exists()
  options |= {"diagnose_every": 3, "workdir": str(run)}
  assert train.run(helpers.config(steps=5, **options)) == 0
  said = capsys.readouterr().out
  for step in (3, 5):
    assert f"step      {step} of 5: 1 error; 1 layer, 8 batches of 32.\n" in said
  assert "  error: momentum-too-slow in BatchNorm_0 (certain)\n" in said
  assert f"What to do: python -m jaxbn.diagnostics {run}" in said
  both = [checkpoints.read(directory / "checkpoints")[1] for directory in (run, alone)]
  jax.tree.map(np.testing.assert_array_equal, *both)

  assert train.run(helpers.config(steps=7, **options)) == 0
  saved = json.loads((run / "diagnosis.json").read_text())
  assert [row["step"] for row in saved["layers"][0]["history"]] == [2, 3, 4, 5, 6, 7]
  assert (run / "report.html").read_text().count("Percentiles over training") == 1


def test_what_has_no_batch_norm_is_refused_before_any_work(tmp_path):
  config = helpers.config(norm="layer", diagnose_every=2, workdir=str(tmp_path / "run"))
  with pytest.raises(UserError, match=r"diagnose_every is 2, but config.norm is 'layer'"):
    train.run(config)
  assert not (tmp_path / "run").exists()


def test_a_damaged_diagnosis_is_not_continued(tmp_path):
  config = helpers.config(model="mlp", steps=4, diagnose_every=2, workdir=str(tmp_path))
  (tmp_path / "diagnosis.json").write_text("{")
  with pytest.raises(UserError, match=r"is no diagnosis: .*move it away"):
    train.run(config)
