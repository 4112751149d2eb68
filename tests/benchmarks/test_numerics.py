"""The benchmark of exactness: its reference, its data, and what it makes of the errors."""

import numpy as np
import pytest

from benchmarks import charts, numerics, report
from benchmarks.frameworks import EPSILON
from tests import oracle

PANEL = numerics.Panel("output", "mean", "float32")
FLOORS = {numerics.RESULT_FLOOR: 1e-7, numerics.MEAN_FLOOR: 1e-7}


def rows(quantity="output", **errors):
  """One point with each library's error."""
  return [
    {
      "sweep": "mean",
      "dtype": "float32",
      "ratio": 100.0,
      "framework": name,
      "quantity": quantity,
      "largest": error,
      "rms": error,
    }
    for name, error in {**FLOORS, **errors}.items()
  ]


def test_the_reference_is_the_oracle_of_the_tests():
  x, g = numerics.data((16, 3), "float32", 5.0)
  exact = numerics.reference(x, g)
  np.testing.assert_allclose(exact.y, oracle.batch_norm(x, epsilon=EPSILON), atol=1e-13)
  gradient = oracle.gradients(x, np.ones(3), g, EPSILON).x
  np.testing.assert_allclose(exact.gradient, gradient, atol=1e-13)


def test_a_constant_channel_has_output_zero():
  x = np.full((7, 2), 0.1, np.float32)
  exact = numerics.reference(x, np.ones_like(x))
  assert not exact.y.any()
  assert not exact.mean_error.any()


@pytest.mark.parametrize("size", [2, 1000])
def test_data_have_standard_deviation_one_and_the_mean_asked_for(size):
  x, g = numerics.data((size, 5), "float32", 100.0)
  np.testing.assert_allclose(x.std(0), 1, rtol=1e-4)
  assert (np.abs(x.mean(0)) >= 100 - 1e-3).all()
  assert (np.abs(x.mean(0)) <= 110 + 1e-3).all()
  assert x.dtype == g.dtype == np.float32


def test_rows_tell_a_fast_variance_from_an_exact_one():
  shape = (256, 4)
  layers = numerics.layers_of(("jaxbn", "flax.linen"), shape, "float32")
  found = numerics.rows_of(layers, *numerics.data(shape, "float32", 1000.0))
  largest = {(row["framework"], row["quantity"]): row["largest"] for row in found}
  assert largest["jaxbn", "output"] < 1e-3 < 0.01 < largest["flax.linen", "output"]
  assert largest["jaxbn", "gradient"] < 1e-3 < 0.01 < largest["flax.linen", "gradient"]
  assert largest[numerics.RESULT_FLOOR, "output"] == pytest.approx(2**-23, rel=1e-3)
  assert 2**-16 < largest[numerics.MEAN_FLOOR, "output"] < 2**-13


def test_devices_share():
  found = numerics.rows_at(numerics.Point("devices", "float32", 1000.0), ("jaxbn", "flax.linen"))
  largest = {(row["framework"], row["quantity"]): row["largest"] for row in found}
  for quantity in numerics.QUANTITIES:
    assert largest["jaxbn", quantity] < 2e-4 < 0.01 < largest["flax.linen", quantity]
    assert largest["torch SyncBatchNorm", quantity] < 1e-3


def test_float16_stops_where_it_overflows():
  points = [point for point in numerics.points((1.0, 1e6), []) if point.dtype == "float16"]
  assert [len(numerics.rows_at(point, ("jaxbn",))) for point in points] == [5, 0]


def test_level_is_twice_the_best_or_what_the_formula_costs():
  assert numerics.worst_of(rows(jaxbn=2e-5, torch=1e-5), PANEL, "largest")[0] == 1
  assert numerics.worst_of(rows(jaxbn=5e-7, torch=0.0), PANEL, "largest")[0] == pytest.approx(1)
  ratio, ours, best, name, point = numerics.worst_of(
    rows(jaxbn=6e-5, torch=None, keras=1e-5), PANEL, "rms"
  )
  assert (ratio, ours, best, name, point) == (pytest.approx(3), 6e-5, 1e-5, "keras", "mean 100")


def test_the_mean_in_float32_is_no_excuse_for_a_gradient():
  panel = PANEL._replace(quantity="gradient")
  found = rows("gradient", jaxbn=8e-7, torch=0.0)
  assert numerics.worst_of(found, panel, "rms")[0] == pytest.approx(2)


def test_not_finite_is_worst():
  assert numerics.worst_of(rows(jaxbn=None, torch=1.0), PANEL, "rms")[0] == np.inf


def test_the_section_says_who_is_better_and_where():
  text = report.section("numerics", {"rows": rows(jaxbn=6e-5, keras=1e-5, torch=None)})
  assert "| float32 | 1e2 | 6.0e-05 | 1.0e-05 | not finite | 1.0e-07 |" in text
  assert "jaxbn is the best or level with the best in 0 of 2 comparisons" in text
  assert "- keras is more exact in output, float32, over the mean (largest), at worst" in text
  assert "Not installed where this was measured: flax.linen, flax.linen two-pass, haiku" in text


def test_the_standing_names_the_verdict():
  assert numerics.standing(rows(jaxbn=6e-5, keras=1e-5)).count("- keras is more exact") == 2
  assert "best in 2 of 2" in numerics.standing(rows(jaxbn=1e-5, keras=1e-5))


def test_the_chart_is_drawn(tmp_path):
  results = {"rows": rows(jaxbn=6e-5, keras=0.0, torch=None)}
  assert [path.stat().st_size > 0 for path in charts.draw({"numerics": results}, tmp_path)] == [
    True
  ]
