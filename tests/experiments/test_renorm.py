"""Batch renormalization in small batches: the experiment in little, and its page."""

import json

import jax
import numpy as np

from benchmarks import results as stored
from experiments import experiment, renorm, renorm_runs, splits
from experiments.renorm_runs import (
  NONE,
  NORM,
  RENORM,
  SETTINGS,
  Patches,
  Plan,
  cases,
  limits,
  measure,
)

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 7))
PLAN = Plan("digits", (8,), 160, 1, 2, (0.1,))


def test_batches_drawn_evenly_hold_every_example_once_an_epoch():
  order = splits.batches(False, LABELS, size=2, steps=70, seed=0)
  assert order.shape == (70, 2)
  for epoch in order.reshape(2, -1):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(70))


def test_batches_of_two_classes_hold_half_of_each():
  for batch in splits.batches(True, LABELS, size=8, steps=20, seed=0):
    assert len(set(batch)) == 8
    assert np.unique(LABELS[batch], return_counts=True)[1].tolist() == [4, 4]


def test_the_limits_are_batch_normalization_s_at_first_and_the_paper_s_in_the_end():
  r_max, d_max = limits(100)
  assert (float(r_max(5)), float(d_max(5))) == (1.0, 0.0)
  assert (float(r_max(40)), float(d_max(25))) == (3.0, 5.0)


def test_renorm_starts_as_batch_norm_and_all_see_as_many_examples():
  x = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))
  made = [Patches(((2, 3),), side, 100) for side in (NORM, RENORM)]
  outputs = [
    model.apply(model.init(jax.random.key(1), x, False), x, True, mutable=["batch_stats"])[0]
    for model in made
  ]
  np.testing.assert_array_equal(*outputs)
  for _, training, _ in cases(Plan()):
    assert training.steps * training.batch_size == Plan().examples
    assert training.steps % training.every == 0


def test_it_learns_and_the_page_shows_it(monkeypatch, tmp_path):
  monkeypatch.setattr(renorm_runs, "SETTINGS", SETTINGS[:1])
  monkeypatch.setattr(renorm_runs, "NETWORKS", {"convolutional": ((8, 16),)})
  monkeypatch.setattr(renorm_runs, "NORMS", (RENORM,))
  rows = json.loads(json.dumps(measure(PLAN), allow_nan=False))
  runs = stored.of(rows, kind="run")
  assert [len(row["test"]) for row in runs] == [2, 2]
  assert all(row["validation"][-1] > row["validation"][0] + 0.1 for row in runs)
  others = [row | {"side": side} for side in (NORM, NONE) for row in rows]
  found = stored.made("renorm", "a command", [*rows, *others])
  experiment.show(renorm.EXPERIMENT, found, tmp_path)
  page = (tmp_path / "renorm.md").read_text()
  assert renorm.verdict(found) in page
  assert "| 8 | 20 |" in page
  assert (tmp_path / "renorm.png").stat().st_size > 10_000


def test_what_renorm_gains_is_of_the_same_seeds():
  def run(side, test):
    return {"kind": "run", "setting": "s", "batch_size": 2, "side": side, "test": [0, test]}

  rows = [run(NORM, 0.5), run(NORM, 0.7), run(RENORM, 0.6), run(RENORM, 0.8)]
  assert renorm.gain({"rows": rows}, "s", 2) == "+10.0"
