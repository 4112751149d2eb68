"""The table of keys: ranges, and names that are those of the code."""

import math

import pytest

from examples import microbatches, models, norms, optimizers, parallelism
from examples.data import pipeline, sources
from examples.keys import FIXED, FREE, KEYS, PLACE, numbers


@pytest.mark.parametrize(
  ("key", "table"),
  [
    ("dataset", sources.CLASS_NAMES),
    ("augment", pipeline.AUGMENTATIONS),
    ("model", models.MODELS),
    ("norm", norms.NORMS),
    ("optimizer", optimizers.OPTIMIZERS),
    ("parallelism", parallelism.MODES),
  ],
)
def test_the_names_are_those_that_the_code_knows(key, table):
  assert set(KEYS[key].allowed.names) == set(table)


def test_there_is_a_usual_rate_for_every_optimizer():
  assert optimizers.USUAL_RATES.keys() == optimizers.OPTIMIZERS.keys()


@pytest.mark.parametrize("name", KEYS["microbatch_statistics"].allowed.names)
def test_microbatches_know_these_statistics(name):
  assert microbatches.create(2, name)


@pytest.mark.parametrize(
  ("allowed", "inside", "outside"),
  [
    (numbers(0), (0, 1e30), (-1e-9, math.inf, math.nan)),
    (numbers(0, above=True), (1e-9,), (0, -1, math.nan)),
    (numbers(1, 3), (1, 3), (0, 4, math.nan)),
    (numbers(0, 1, below=True), (0, 0.999), (1, 2, math.nan, math.inf)),
    (numbers(1, 3, or_zero="none"), (0, 1, 3), (0.5, 4, math.nan)),
  ],
)
def test_ranges(allowed, inside, outside):
  assert all(map(allowed.test, inside))
  assert not any(map(allowed.test, outside))


def test_every_number_has_a_range():
  """NaN and infinity are none of them."""
  for name, key in KEYS.items():
    assert key.change in (FIXED, FREE, PLACE)
    if type(key.default) in (int, float):
      assert not key.allowed.test(math.nan), name
      assert not key.allowed.test(math.inf), name
      assert not key.allowed.test(-1), name
