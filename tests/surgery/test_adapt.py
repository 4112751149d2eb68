"""jaxbn.surgery.adapt: statistics of the data at hand, mixed with those of the source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn.surgery import adapt, recalibrate
from tests import layers
from tests.surgery import networks

RNG = np.random.default_rng(2)
TARGET = np.float32(RNG.normal(3, 2, (12, networks.WIDTH)))
BATCHES = [jnp.asarray(b) for b in np.split(TARGET, [8])]
ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def source():
  model = networks.Bare()
  return model, networks.init(model, BATCHES[0])


@pytest.mark.parametrize("prior", [4.0, np.inf])
def test_statistics_are_mixed_by_numbers_of_examples(source, prior):
  model, variables = source
  new = adapt(model, variables, BATCHES, prior=prior, devices=ONE, train=False)
  target = recalibrate(model, variables, BATCHES, devices=ONE, train=False)["batch_stats"]
  share = 12 / (12 + prior)  # of the target, whatever the elements of an example
  mix = lambda s, t: (1 - share) * s + share * t  # noqa: E731
  expected = jax.tree.map(mix, variables["batch_stats"], target)
  layers.assert_equal_to_rounding(new["batch_stats"], expected)
  layers.assert_bit_equal(new["params"], variables["params"])


def test_without_a_prior_each_domain_has_its_own(source):
  model, variables = source
  domains = {"a": BATCHES[:1], "b": BATCHES[1:]}
  new = adapt(model, variables, domains, devices=ONE, train=False)
  assert new.keys() == domains.keys()
  for name, batches in domains.items():
    expected = recalibrate(model, variables, batches, devices=ONE, train=False)
    layers.assert_equal_to_rounding(new[name], expected)


def test_in_evaluation_mode_what_is_mixed_is_what_is_seen():
  model = nnx.Sequential(*(nnx.BatchNorm(3, epsilon=0, rngs=nnx.Rngs(0)) for _ in range(2)))
  for layer in model.layers:
    layer.mean[...] += 1  # as if trained
  new = adapt(model, None, BATCHES, prior=4.0, mode="evaluation", devices=ONE)
  x = np.float64(TARGET)
  for before, after in zip(model.layers, new.layers, strict=True):
    mean, var = (0.75 * t + 0.25 * s for t, s in ((x.mean(0), 1.0), (x.var(0), 1.0)))
    np.testing.assert_array_equal(before.mean[...], 1)
    layers.assert_equal_to_rounding(after.mean[...], np.float32(mean))
    layers.assert_equal_to_rounding(after.var[...], np.float32(var))
    x = (x - mean) / np.sqrt(var)


def test_what_cannot_be_is_said(source):
  model, variables = source
  fresh = model.init(jax.random.key(0), BATCHES[0])
  with pytest.raises(ValueError, match=r"BatchNorm BatchNorm_0 were never updated.*prior=0"):
    adapt(model, fresh, BATCHES, prior=4.0, devices=ONE, train=False)
  adapt(model, fresh, BATCHES, devices=ONE, train=False)  # as it says
  broken = jax.tree.map(lambda a: a.at[0].set(jnp.nan), variables["batch_stats"])
  with pytest.raises(ValueError, match=r"BatchNorm_0 have a NaN .*prior=0"):
    adapt(model, {**variables, "batch_stats": broken}, BATCHES, prior=4.0, train=False)
  with pytest.raises(ValueError, match="holds no domain"):
    adapt(model, variables, {})
  with pytest.raises(ValueError, match=r"prior=-1.* is out of range"):
    adapt(model, variables, BATCHES, prior=-1.0)
