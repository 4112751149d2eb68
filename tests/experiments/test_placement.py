"""Before or after the activation, in little; and what is seen in a layer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import results as stored
from experiments import experiment, placement
from experiments.activations import inside, linear
from experiments.networks import Perceptron

PLAN = placement.Plan("digits", (8, 8), 20, 20, 20, 20, 2, (0.3,), 100)


@pytest.fixture(scope="module")
def found():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(placement, "ACTIVATIONS", {"ReLU": jax.nn.relu})
    rows = json.loads(json.dumps(placement.measure(PLAN), allow_nan=False))
    yield stored.made("placement", "a command", rows)


def test_batch_norm_before_a_relu_makes_half_of_it_zero(found):
  def first(side):
    rows = stored.of(found["rows"], kind="run", side=side)
    return np.array([row["asleep"][-1] for row in rows])

  assert abs(first("before").mean() - 0.5) < 0.1
  assert "scale" not in stored.of(found["rows"], kind="run", side="without")[0]


def test_a_layer_that_is_all_asleep_is_seen_to_be():
  model = Perceptron((4,), norm="none")
  images = jnp.zeros((2, 8, 8, 1))
  variables = model.init(jax.random.key(0), images, False)
  look = inside(model, "digits", 280, 1.0)
  for bias, dead in ((-100.0, 1.0), (100.0, 0.0)):
    variables["params"]["Dense_0"]["bias"] = jnp.full(4, bias)
    seen = look(variables)
    assert seen["asleep"].tolist() == seen["dead"].tolist() == [dead]
    # All of a layer of ReLUs that are awake is linear in what comes out; nothing, if they sleep.
    np.testing.assert_allclose(seen["recovered"], 1 - dead, atol=0.1)


def test_of_one_standard_normal_relu_leaves_what_is_said():
  z = jax.random.normal(jax.random.key(0), (20_000, 1))
  share = 1 - jnp.var(z - linear(jax.nn.relu(z), z, jax.nn.relu(z))) / jnp.var(z)
  np.testing.assert_allclose(share, placement.RECOVERED_OF_NORMAL, atol=0.02)


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(placement.EXPERIMENT, found, tmp_path)
  page = (tmp_path / "placement.md").read_text()
  assert placement.verdict(found) in page
  assert (tmp_path / "placement.png").stat().st_size > 10_000
