"""What holds for every Linen layer: what Flax's own tools see of it."""

import flax.linen as nn
import jax
import pytest

import jaxbn.linen
from tests import layers

KEY = jax.random.key(0)
EVERY = layers.EVERY_LINEN
MUTABLE = ["batch_stats", "reference", "intermediates"]


def test_every_layer_is_here():
  assert {name.partition(",")[0] for name in EVERY} == set(jaxbn.linen.__all__) - {
    "prediction_time"
  }


@pytest.mark.parametrize("name", layers.BATCH_NORMS)
def test_a_batch_norm_is_one_of_flax_s(name):
  make, args, _ = EVERY[name]
  assert isinstance(make(), nn.BatchNorm)
  variables = make().init(KEY, *args)
  y, new = make().apply(
    variables,
    *args,
    mutable=MUTABLE,
    capture_intermediates=lambda module, _: isinstance(module, nn.BatchNorm),
  )
  (captured,) = new["intermediates"]["__call__"]
  layers.assert_bit_equal(captured, y)


def test_flax_s_call_is_never_reached(monkeypatch):
  def reached(*args, **kwargs):
    raise AssertionError("Flax's own")

  monkeypatch.setattr(nn.BatchNorm, "__call__", reached)
  for name in layers.BATCH_NORMS:
    make, args, _ = EVERY[name]
    _, variables = make().init_with_output(KEY, *args)
    make().apply(variables, *args, mutable=MUTABLE)
