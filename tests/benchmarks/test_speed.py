"""The benchmark of speed: its adapters compute batch normalization, its summary what rows say."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import charts, report, speed
from benchmarks.frameworks import EPSILON, FRAMEWORKS, Layer, missing
from tests import oracle

UNTRAINED = {"haiku"}  # their running variance starts at 0, not at 1
TINY = speed.Plan(((4, 2, 2, 3),), repeats=2, seconds=0.0)
PARTS = {"shape": [4, 3], "dtype": "float32", "kind": "forward"}


def row(framework, ratio, **changes):
  times = {"ours_min_ms": ratio, "theirs_min_ms": 1.0, "ratio_min": ratio, "ratio_median": ratio}
  return {**PARTS, "framework": framework, "samples": 21, **times, **changes}


def rows():
  every = [
    row(framework, ratio, kind=kind, dtype=dtype)
    for framework, ratio in (("flax.linen", 0.5), ("torch", 1.04))
    for kind in speed.KINDS
    for dtype in speed.DTYPES
  ]
  every.append(row("torch", 3.0, shape=[8, 8]))
  imported = {"kind": "import", "statement": "import jaxbn", "after": "import jax"}
  return [*every, {**imported, "samples": 2, "ours_min_ms": 4.25, "ours_median_ms": 5.0}]


def all_kinds(ratio):
  return [row(speed.TWICE, ratio, kind=k, dtype=d) for k in speed.KINDS for d in speed.DTYPES]


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize(("shape", "dtype"), [((8, 3), "bfloat16"), ((4, 2, 3, 5), "float32")])
def test_adapters_compute_batch_normalization(name, shape, dtype):
  if sentence := missing(name):
    pytest.skip(sentence)
  rng = np.random.default_rng(0)
  x, g = ((1 + 2 * rng.normal(size=shape)).astype(jnp.dtype(dtype)) for _ in range(2))
  layer = FRAMEWORKS[name](shape, jnp.dtype(dtype))
  y, (of_x, *_), _ = layer.gradients(layer.put(x), layer.put(g))
  trained = layer.train(layer.put(x))[0]
  expected = oracle.batch_norm(x, epsilon=EPSILON)
  tolerance = 1e-5 if dtype == "float32" else 0.02
  np.testing.assert_allclose(layer.get(y).astype(float), expected, atol=tolerance)
  np.testing.assert_allclose(layer.get(trained).astype(float), expected, atol=tolerance)
  gradient = oracle.gradients(x, np.ones(shape[-1]), g, EPSILON).x
  np.testing.assert_allclose(layer.get(of_x).astype(float), gradient, atol=tolerance)
  if name not in UNTRAINED:
    evaluated = layer.get(layer.evaluate(layer.put(x))).astype(float)
    np.testing.assert_allclose(evaluated, x.astype(float), atol=2 * tolerance, rtol=0.01)


def test_a_missing_library_is_named(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
  assert missing("haiku") == "haiku is left out: dm-haiku is not installed."


def test_calls_are_timed_in_turns():
  called = []
  times = speed.in_turns([lambda: called.append("a"), lambda: called.append("b")], TINY)
  assert [len(taken) for taken in times] == [2, 2]
  assert "".join(called) == "ab" + 2 * "aabb"


def test_a_pair_gives_a_row_for_every_case(monkeypatch):
  same = Layer(*[lambda *inputs: inputs] * 6)
  monkeypatch.setattr(speed, "FRAMEWORKS", dict.fromkeys(FRAMEWORKS, lambda shape, dtype: same))
  found = list(speed.pair_rows("flax.linen", TINY))
  assert [(one["dtype"], one["kind"]) for one in found] == [
    (dtype, kind) for dtype in speed.DTYPES for kind in speed.KINDS
  ]
  for one in found:
    assert one["ours_min_ms"] <= one["ours_median_ms"]


def test_what_several_processes_found_is_one_row():
  times = [(1.0, 4.0, 2.0, 2.0), (3.0, 6.0, 1.0, 8.0)]
  names = "ours_min_ms", "ours_median_ms", "theirs_min_ms", "theirs_median_ms"
  found = [
    {**PARTS, "framework": "torch", "samples": 21, **dict(zip(names, one, strict=True))}
    for one in times
  ]
  assert speed.together(found) == {
    **{**PARTS, "framework": "torch", "samples": 42, "processes": 2},
    **dict(zip(names, (1.0, 5.0, 1.0, 5.0), strict=True)),
    **{"ratio_min": 1.0, "ratio_median": 1.0},
  }


def test_a_library_beside_itself_wins_and_loses_nothing():
  twice = [row(speed.TWICE, 1.5), row("flax.linen", 0.5)]
  assert [one.split()[0] for one in speed.losses(twice)] == ["flax.linen"]
  assert speed.relative_to_flax(twice) == {"jaxbn": {"4x3": 0.5}, "flax.linen": {"4x3": 1.0}}
  assert "| flax.linen twice | float32 |" in report.section(
    "speed", {"rows": [*rows(), *all_kinds(1.5)]}
  )


def test_losses_count_what_is_beyond_the_noise():
  flax, torch = speed.losses(rows())
  assert flax == "flax.linen is faster in none of 6 cases."
  assert torch == (
    "torch is faster in 1 of 7 cases (1 of 3 in forward), most in forward of 8x8 in float32, where "
    "jaxbn takes 3.00 times as long."
  )


def test_the_geometric_mean():
  assert speed.geometric_mean([row("torch", 0.5), row("torch", 8.0)]) == pytest.approx(2)


def test_times_relative_to_flax_go_through_jaxbn():
  relative = speed.relative_to_flax([row("flax.linen", 0.5), row("torch", 2.0)])
  assert relative == {
    "jaxbn": {"4x3": 0.5},
    "flax.linen": {"4x3": 1.0},
    "torch": {"4x3": 0.25},
  }


def test_the_section_says_what_the_rows_say():
  text = report.section("speed", {"rows": rows()})
  assert "| flax.linen | float32 | 0.50 (0.50) | 0.50 (0.50) | 0.50 (0.50) | 0.50: " in text
  assert "| float32 | forward | 8x8 | 3 |  | 3.00 |" in text
  assert "- torch is faster in 1 of 7 cases" in text
  assert "`import jaxbn` after `import jax` takes 4.2 ms" in text
  assert "Not installed where this was measured: flax.nnx, haiku, equinox, keras." in text


def test_the_chart_is_drawn(tmp_path):
  assert [
    path.stat().st_size > 0 for path in charts.draw({"speed": {"rows": rows()}}, tmp_path)
  ] == [True]
