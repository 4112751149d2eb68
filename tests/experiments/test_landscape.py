"""What is measured of smoothness and shift, in little."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import landscape, smoothness
from experiments.splits import splits


def test_layers_come_in_their_order():
  params = {f"{kind}_{i}": (kind, i) for kind in ("Dense", "Norm") for i in (0, 2, 10)}
  layers = landscape.by_layer(params)
  assert [{i for _, i in layer.values()} for layer in layers] == [{0}, {2}, {10}]


def test_shifts_are_in_training_alone_and_differ_by_step():
  model = landscape.Network(landscape.SHIFTED, 1, 4)
  x = jnp.asarray(splits("digits")["test"].images[:9])
  variables = model.init(jax.random.key(0), x, False)

  y, changed = model.apply(variables, x, True, mutable=["batch_stats", "steps"])
  again, _ = model.apply({**variables, "steps": changed["steps"]}, x, True, mutable=["batch_stats"])
  assert not np.allclose(y, again)
  plain = landscape.Network(landscape.NORM, 1, 4)
  np.testing.assert_array_equal(model.apply(variables, x, False), plain.apply(variables, x, False))


def test_what_a_step_draws_is_a_shift_though_no_parameter_moves():
  model = landscape.Network(landscape.SHIFTED, 1, 8)
  variables = model.init(jax.random.key(0), splits("digits")["train"].images[:2], False)
  plan = smoothness.Plan("digits", batch_size=5, common_rate=0.0)
  assert jax.jit(landscape.measured(model, plan))(variables)["shift"] > 0.05
