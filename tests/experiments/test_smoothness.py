"""What is measured of smoothness and shift, in little."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import results as stored
from experiments import experiment, smoothness
from experiments.splits import splits

PLAN = smoothness.Plan("digits", 2, 8, 20, 20, 10, 10, 2, (0.1,))


@pytest.fixture(scope="module")
def found():
  """Rows as `measure` makes them: of one side they are real, and stand for the others, too."""
  model = smoothness.Network(smoothness.SHIFTED, PLAN.layers, PLAN.width)
  rows = json.loads(json.dumps(smoothness.measures(model, PLAN), allow_nan=False))
  runs = [{"kind": "run", "rate": 0.1, "test": [0.1, 0.5 + row["seed"] / 10]} for row in rows]
  grid = {"kind": "grid", "rate": 0.1, "validation": [0.5, 0.6]}
  sides = [{**row, "side": s} for row in [*runs, grid, *rows] for s in smoothness.COLOURS]
  return stored.made("smoothness", "a command", sides)


def test_layers_come_in_their_order_and_join_again():
  params = {f"{kind}_{i}": (kind, i) for kind in ("Dense", "Norm") for i in (0, 2, 10)}
  layers = smoothness.by_layer(params)
  assert [{i for _, i in layer.values()} for layer in layers] == [{0}, {2}, {10}]
  assert smoothness.joined(layers) == params


def test_shifts_are_in_training_alone_and_differ_by_step():
  model = smoothness.Network(smoothness.SHIFTED, 1, 4)
  x = jnp.asarray(splits("digits")["test"].images[:9])
  variables = model.init(jax.random.key(0), x, False)

  def training(seed):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply(variables, x, True, rngs=rngs, mutable=["batch_stats"])[0]

  assert not np.allclose(training(0), training(1))
  plain = smoothness.Network(smoothness.NORM, 1, 4)
  np.testing.assert_array_equal(model.apply(variables, x, False), plain.apply(variables, x, False))


def test_each_network_has_a_shift_and_an_angle(found):
  assert (smoothness.looks(found, smoothness.SHIFTED, "shift") > 0).all()
  angles = smoothness.looks(found, smoothness.SHIFTED, "angle")
  assert ((angles > 0) & (angles < np.pi)).all()


def test_agreement_counts_pairs_in_which_the_faster_is_smoother():
  rows = []
  for i, side in enumerate(smoothness.COLOURS):
    rows.append({"kind": "run", "side": side, "test": [0, i / 4]})
    rows.append({"kind": "measured", "side": side, "beta": [0, -i], "shift": [0, i]})
  assert smoothness.agreement({"rows": rows}, "beta") == 6
  assert smoothness.agreement({"rows": rows}, "shift") == 0


def test_the_page_and_the_figure_show_it(found, tmp_path):
  experiment.show(smoothness.EXPERIMENT, found, tmp_path)
  assert smoothness.verdict(found) in (tmp_path / "smoothness.md").read_text()
  assert (tmp_path / "smoothness.png").stat().st_size > 10_000
