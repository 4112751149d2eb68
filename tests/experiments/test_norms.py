"""The comparison of norms: what is run, that it runs, and that the page shows what was found."""

import json

from benchmarks import results as stored
from experiments import norms, norms_report
from experiments.norms import Case

TINY = Case("batch", batch_size=32, examples=640, seeds=2, rate=0.4, dataset="digits")


def test_every_norm_meets_every_batch_size_and_every_depth_once():
  cases = list(norms.departures(Case("layer"), norms.QUICK))
  assert len(set(cases)) == len(cases)
  assert {c.batch_size for c in cases if c.skip} == set(norms.QUICK.batch_sizes)
  settings = {(c.depth, c.skip) for c in cases if c.batch_size == norms.REFERENCE_BATCH}
  assert settings == {(d, s) for d in norms.QUICK.depths for s in (True, False)}
  assert set(norms.NORMS) < set(norms.names())


def test_a_run_learns_and_seeds_differ():
  first, second = norms.run(TINY)
  assert (first["seed"], second["seed"]) == (0, 1)
  assert first["accuracy"] != second["accuracy"]
  assert min(first["accuracy"], second["accuracy"]) > 2 * norms.CHANCE
  assert not first["diverged"]
  assert json.dumps(first)


def test_a_rate_that_is_too_high_diverges_and_says_so():
  (row,) = norms.run(TINY._replace(norm="none", seeds=1, rate=1e4))
  assert row["diverged"]
  assert json.dumps(row, allow_nan=False)


def test_the_rate_is_chosen_on_images_held_out(monkeypatch):
  monkeypatch.setattr(norms, "HELD_OUT", 200)
  monkeypatch.setattr(norms, "RATES", (1e-6, 0.4, 1e6))
  assert norms.best_rate(TINY._replace(seeds=1)) == 0.4


def row(**changes):
  base = {"kind": "training", "norm": "batch", "batch_size": 128, "depth": 1, "skip": True}
  base |= {"rate": 0.2, "seed": 0, "examples": 640, "accuracy": 0.5, "loss": 1.0, "diverged": False}
  return base | changes


ROWS = [
  row(),
  row(seed=1, accuracy=0.75),
  row(batch_size=2, accuracy=0.25),
  row(batch_size=2, seed=1, accuracy=0.125, diverged=True),
  row(depth=4),
  row(depth=4, skip=False),
  *(
    {"kind": "time", "norm": norm, "batch_size": 32, "minimum_ms": least, "median_ms": 3.0}
    for norm, least in [("batch", 2.0), ("none", 1.0)]
  ),
]
HEAD = {"command": "a command", "date": "a day", "versions": {"jax": "1"}, "machine": {"cpu": "c"}}


def test_its_tables_show_means_spreads_divergence_and_ratios(tmp_path):
  tables = norms_report.section(HEAD | {"rows": ROWS})
  assert "| batch | 0.2 | 18.8 ± 8.8 (1) | 62.5 ± 17.7 |" in tables
  assert "| batch | 62.5 ± 17.7 | 50.0 | 50.0 |" in tables.replace(" |  |", " |")
  assert "| none | 0.50; 1.00 |" in tables
  norms_report.draw(HEAD | {"rows": ROWS}, tmp_path / "figure.png")
  assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_page_shows_what_was_found():
  results = stored.read("norms", norms.FOLDER)
  assert results is not None
  page = norms_report.PAGE.read_text()
  assert norms_report.spliced(page, norms_report.section(results)) == page
