"""Length and direction apart: two problems, and a network in little."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import results as stored
from experiments import descents, experiment, length_direction
from experiments.directions import WeightNormed, across
from experiments.length_direction import EXPERIMENT, Plan
from experiments.networks import Perceptron

PLAN = Plan(150, 10, "digits", (8,), 50, 80, 20, 20, 2, (1.0,))


@pytest.fixture(scope="module")
def found():
  rows = json.loads(json.dumps(length_direction.measure(PLAN), allow_nan=False))
  return stored.made("length_direction", "a command", rows)


def gap(found, task, method):
  (row,) = [r for r in stored.of(found["rows"], kind="gap", method=method) if task in r["task"]]
  return np.array(row["gap"])


def test_gdnp_converges_linearly_on_both_and_gradient_descent_on_one(found):
  for method in descents.COLOURS:
    assert gap(found, "squares", method)[0] == gap(found, "Halfspace", method)[0] == 1
  bound = gap(found, "squares", descents.BOUND)
  assert np.all(gap(found, "squares", "GDNP") <= bound)
  assert np.all(gap(found, "squares", "gradient descent") <= bound)
  bound = gap(found, "Halfspace", descents.BOUND)[-1]
  assert gap(found, "Halfspace", "GDNP")[-1] < 1e-3 * bound
  assert gap(found, "Halfspace", "gradient descent")[-1] > 10 * bound


def test_weight_norm_starts_as_the_plain_network():
  split = WeightNormed((4, 3))
  x = jax.random.normal(jax.random.key(0), (5, 6))
  variables = split.init(jax.random.key(1), x, True)
  params = dict(variables["params"])
  head = params.pop(max(params.keys() - {"WeightNorm_0", "WeightNorm_1"}))
  layers = [{k: v[k] for k in ("kernel", "bias")} for _, v in sorted(params.items())]
  plain = Perceptron((4, 3), norm="none", activation=nn.tanh)
  same = {"params": {f"Dense_{i}": layer for i, layer in enumerate([*layers, head])}}
  expected = plain.apply(same, x, True)
  np.testing.assert_allclose(split.apply(variables, x, True), expected, rtol=1e-5, atol=1e-6)


def test_the_derivative_across_is_that_by_the_direction():
  w, target = jax.random.normal(jax.random.key(0), (2, 5, 3))

  def loss(w):
    return jnp.sum(jnp.sin(w) * target)

  def by_direction(direction):
    lengths = jnp.linalg.norm(w, axis=0)
    return loss(lengths * direction / jnp.linalg.norm(direction, axis=0))

  gradient = jax.grad(by_direction)(w / jnp.linalg.norm(w, axis=0))
  np.testing.assert_allclose(across(w, jax.grad(loss)(w)), jnp.square(gradient).sum(), rtol=1e-5)


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(EXPERIMENT, found, tmp_path)
  page = (tmp_path / "length_direction.md").read_text()
  assert length_direction.verdict(found) in page
  assert "GDNP 91 steps, gradient descent more than 150" in page
  assert (tmp_path / "length_direction.png").stat().st_size > 10_000
