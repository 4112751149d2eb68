"""The optimizers: what decays, and how the learning rate goes."""

import jax
import numpy as np
import pytest

from examples import optimizers
from examples.settings import UserError
from tests.examples import helpers

PARAMS = {"Conv_0": {"kernel": np.ones((3, 3))}, "norm": {"scale": np.ones(3), "bias": np.ones(3)}}


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_weight_decay_leaves_scale_and_bias_alone(name):
  config = helpers.config(optimizer=name, learning_rate=0.5, weight_decay=0.1, warmup_steps=0)
  optimizer = optimizers.create(config)
  still = jax.tree.map(np.zeros_like, PARAMS)
  updates, _ = optimizer.update(still, optimizer.init(PARAMS), PARAMS)
  assert np.all(updates["Conv_0"]["kernel"] < 0)
  assert not np.any(updates["norm"]["scale"])
  assert not np.any(updates["norm"]["bias"])


def test_learning_rate_warms_up_and_falls_to_zero():
  config = helpers.config(learning_rate=0.4, warmup_steps=4, steps=20)
  rate = optimizers.schedule(config)
  assert [float(rate(i)) for i in (0, 2, 4)] == pytest.approx([0.0, 0.2, 0.4])
  assert float(rate(12)) == pytest.approx(0.2)
  assert float(rate(20)) == pytest.approx(0.0, abs=1e-7)


def test_unknown_name_is_refused_with_the_nearest():
  with pytest.raises(UserError, match=r"config.optimizer is 'adam'.*did you mean 'adamw'"):
    optimizers.create(helpers.config(optimizer="adam"))
