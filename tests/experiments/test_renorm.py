"""Batch renormalization in small batches: the experiment in little, and the page that it made."""

import io
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import renorm, splits

DOCS = pathlib.Path(renorm.__file__).resolve().parents[1] / "docs"
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 7))


def test_batches_drawn_evenly_hold_every_example_once_an_epoch():
  order = splits.batches(False, LABELS, size=2, steps=70, seed=0)
  assert order.shape == (70, 2)
  for epoch in order.reshape(2, -1):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(70))


def test_batches_of_two_classes_hold_half_of_each():
  for batch in splits.batches(True, LABELS, size=8, steps=20, seed=0):
    assert len(set(batch)) == 8
    assert np.unique(LABELS[batch], return_counts=True)[1].tolist() == [4, 4]


def test_patches_are_the_positions_of_a_square():
  x = jnp.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
  y = renorm.patches(x, 2)
  assert y.shape == (2, 2, 2, 12)
  np.testing.assert_array_equal(y[1, 0, 1], x[1, 0:2, 2:4].reshape(-1))


def test_the_limits_are_batch_normalization_s_at_first_and_the_paper_s_in_the_end():
  r_max, d_max = renorm.limits(100)
  assert (float(r_max(5)), float(d_max(5))) == (1.0, 0.0)
  assert (float(r_max(40)), float(d_max(25))) == (3.0, 5.0)


def test_a_tiny_run_writes_results_page_and_picture(tmp_path, monkeypatch):
  few = {k: splits.Split(s.images[:150], s.labels[:150]) for k, s in splits.splits().items()}
  monkeypatch.setattr(renorm, "splits", lambda: few)
  monkeypatch.setattr(renorm, "NETWORKS", {"fully connected": ((8, 4),)})
  monkeypatch.setattr(renorm, "SETTINGS", [renorm.Setting("fully connected", True)])
  plan = renorm.Plan(batch_sizes=(4,), epochs=1, seeds=2, learning_rates=(0.1, 0.3))
  console = Console(record=True, width=120, file=io.StringIO())
  found = renorm.main(tmp_path, plan, console)
  assert [row["method"] for row in found["rows"]] == list(renorm.METHODS)
  assert all(0 <= a <= 1 for row in found["rows"] for a in row["accuracies"])
  stored = json.loads((tmp_path / "renorm.json").read_text())
  assert (tmp_path / "renorm.md").read_text() == renorm.page(stored)
  assert (tmp_path / "renorm.png").read_bytes().startswith(b"\x89PNG")
  assert "two classes in a batch: test accuracy" in console.export_text()


def test_the_page_in_the_repository_is_what_the_results_make():
  found = json.loads((DOCS / "renorm.json").read_text())
  assert (DOCS / "renorm.md").read_text() == renorm.page(found), "run experiments.renorm"
