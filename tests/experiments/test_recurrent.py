"""Recurrent batch normalization on digits: the experiment in little, and the page that it made."""

import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import results
from experiments import recurrent
from experiments.splits import Split, splits

DOCS = pathlib.Path(recurrent.__file__).resolve().parents[1] / "docs"


def test_sequences_hold_all_pixels_in_the_task_s_order():
  images = np.arange(2 * 8 * 8).reshape(2, 8, 8, 1)
  rows, pixels, permuted = (recurrent.sequences(task, images) for task in recurrent.TASKS)
  np.testing.assert_array_equal(rows[1, 2], images[1, 2, :, 0])
  np.testing.assert_array_equal(pixels[1, :, 0], np.arange(64, 128))
  assert not np.array_equal(permuted, pixels)
  np.testing.assert_array_equal(np.sort(permuted, 1), pixels)
  np.testing.assert_array_equal(permuted[1] - permuted[0], 64)  # one order for all


@pytest.mark.parametrize("method", recurrent.METHODS)
def test_all_methods_have_the_same_start(method):
  """The same kernels' shapes and forget gates, and a scale only where something is normalized."""
  model = recurrent.Classifier(method, 5, 3)
  x, noise = jnp.ones((4, 3, 2)), 0.1 * jax.random.normal(jax.random.key(1), (4, 5))
  params = model.init(jax.random.key(0), x, noise, True)["params"]
  leaves = jax.tree.leaves_with_path(params)
  shapes = sorted(np.shape(leaf) for _, leaf in leaves if np.ndim(leaf) == 2)
  assert shapes == [(2, 20), (5, 10), (5, 20)]
  (bias,) = (
    leaf for _, leaf in leaves if np.shape(leaf) == (20,) and set(np.ravel(leaf)) == {0, 1}
  )
  np.testing.assert_array_equal(bias, np.repeat([0, 1, 0, 0], 5))
  scales = [np.unique(leaf) for path, leaf in leaves if "scale" in jax.tree_util.keystr(path)]
  gain = {"LSTM": [], "layer norm": [1.0] * 3, "batch norm, 0.1": [0.1] * 3}
  np.testing.assert_allclose(np.ravel(scales), gain.get(method, [1.0] * 3), rtol=1e-6)


def test_a_tiny_run_writes_results_page_and_picture(tmp_path, monkeypatch):
  few = {k: Split(s.images[:40], s.labels[:40]) for k, s in splits().items()}
  monkeypatch.setattr(recurrent, "splits", lambda: few)
  monkeypatch.setattr(recurrent, "TASKS", (recurrent.ROWS,))
  plan = recurrent.Plan(4, 8, steps=4, evaluations=2, seeds=2, learning_rates=(0.01, 0.1))
  console = Console(record=True, width=120, file=io.StringIO())
  found = recurrent.main(tmp_path, plan, console)
  assert [row["method"] for row in found["rows"]] == list(recurrent.METHODS)
  for row in found["rows"]:
    assert np.shape(row["accuracies"]) == (2, 2)
    assert np.all((np.array(row["accuracies"]) >= 0) & (np.array(row["accuracies"]) <= 1))
    assert np.all(np.isfinite(row["losses"]))
  written = json.loads((tmp_path / "recurrent.json").read_text())
  page = recurrent.page(written, results.read(recurrent.cost.NAME, recurrent.cost.FOLDER))
  assert (tmp_path / "recurrent.md").read_text() == page
  assert (tmp_path / "recurrent.png").read_bytes().startswith(b"\x89PNG")
  assert "Test accuracy in %" in console.export_text()


def row(method, accuracies):
  return {"task": "t", "method": method, "accuracies": accuracies, "losses": [1.0]}


def test_a_difference_within_the_spread_is_called_that():
  rows = [
    row(recurrent.PLAIN, [[0.5, 0.80], [0.5, 0.90]]),
    row(recurrent.LAYER, [[0.1, 0.20], [0.1, 0.21]]),
    row(recurrent.GAIN_SMALL, [[0.9, 0.88], [0.9, 0.90]]),
    row(recurrent.GAIN_ONE, [[0.2, 0.40], [0.2, 0.42]]),
  ]
  plain, layer, gain = recurrent.verdicts(rows)
  assert "t +4.0 (within the spread of the seeds) in the end and +22.0 over the training" in plain
  assert "t +68.5 in the end" in layer
  assert "t +48.0 in the end" in gain


def test_the_page_in_the_repository_is_what_the_results_make():
  found = json.loads((DOCS / "recurrent.json").read_text())
  page = recurrent.page(found, results.read(recurrent.cost.NAME, recurrent.cost.FOLDER))
  assert (DOCS / "recurrent.md").read_text() == page, "run experiments.recurrent"
