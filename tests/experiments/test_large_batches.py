"""Large batches without batch norm, in little; and what clips a gradient in a recipe."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import results as stored
from examples.optimizers import adaptive_clip
from experiments import experiment, large_batches
from experiments.classification import recipe
from experiments.residual import Residual
from jaxbn.alternatives import normalizer_free

PLAN = large_batches.Plan("digits", 8, 1, (20, 40), 80, 80, 2, (0.1,))


@pytest.fixture(scope="module")
def found():
  with pytest.MonkeyPatch.context() as patch:
    side = "clipped at 0.02"
    patch.setattr(large_batches, "SIDES", {side: large_batches.SIDES[side]})
    rows = json.loads(json.dumps(large_batches.measure(PLAN), allow_nan=False))
    yield stored.made("large_batches", "a command", rows)


def test_all_batch_sizes_see_as_many_images(found):
  runs = stored.of(found["rows"], kind="run")
  assert {row["batch"] * row["every"] * (len(row["test"]) - 1) for row in runs} == {PLAN.images}


def test_a_clipped_step_is_at_most_so_long_but_in_the_last_layer():
  relu = normalizer_free.scaled_activation(jax.nn.relu)
  model = Residual(8, 1, normalized=False, activation=relu)
  rate, limit = 2.0, 1e-3
  of = recipe(model, "digits", clip=adaptive_clip(limit))
  first = of.start(jax.random.key(0))
  second = of.step(first, jnp.array(rate), jnp.arange(20))

  def step(layer):  # as a multiple of the weights
    old, new = (carry[0]["params"][layer]["kernel"] for carry in (first, second))
    return jnp.linalg.norm(new - old, axis=0) / jnp.linalg.norm(old, axis=0)

  np.testing.assert_allclose(step("WSDense_0").max(), rate * limit, rtol=1e-3)
  assert step("head").max() > 10 * rate * limit


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(large_batches.EXPERIMENT, found, tmp_path)
  assert large_batches.verdict(found) in (tmp_path / "large_batches.md").read_text()
  assert (tmp_path / "large_batches.png").stat().st_size > 10_000
