"""jaxbn.surgery.stats: a network's statistics as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.surgery import replace, stats
from tests import layers
from tests.surgery import networks

RNG = np.random.default_rng(0)


def random_statistics(*shape):
  norm = lambda: {"mean": RNG.normal(size=shape), "var": RNG.uniform(0.5, 2, shape)}  # noqa: E731
  return jax.tree.map(jnp.float32, {"a": norm(), "b": {"c": norm()}, "other": {"u": np.ones(2)}})


def test_replicas_are_averaged_as_the_moments_of_their_data():
  data = RNG.normal(2, 3, (4, 10, 3))
  each = {"norm": {"mean": jnp.float32(data.mean(1)), "var": jnp.float32(data.var(1))}}
  all_data = data.reshape(40, 3)
  expected = {"norm": {"mean": all_data.mean(0), "var": all_data.var(0)}}
  averaged = jax.jit(stats.average_replicas)(each)
  layers.assert_equal_to_rounding(averaged, jax.tree.map(jnp.float32, expected))
  turned = jax.tree.map(jnp.transpose, each)
  layers.assert_equal_to_rounding(stats.average_replicas(turned, axis=1), averaged)
  counted = stats.average_replicas(stats.add_count(each, 5))
  np.testing.assert_array_equal(counted["norm"]["count"], [5, 5, 5])


@pytest.mark.parametrize("share", [0.0, 0.001, 1.0])
def test_interpolation_is_linear_and_follows_an_average_of_weights(share):
  old, new = random_statistics(3), random_statistics(3)
  expected = jax.tree.map(
    lambda a, b: (1 - share) * np.float64(a) + share * np.float64(b), old, new
  )
  expected["other"] = old["other"]
  between = jax.jit(stats.interpolate)(old, new, share)
  layers.assert_equal_to_rounding(between, jax.tree.map(jnp.float32, expected))
  with_counts = stats.interpolate(stats.add_count(old, 1), stats.add_count(new, 7), share)
  np.testing.assert_array_equal(with_counts["a"]["count"], [7, 7, 7])


def test_reset_is_init():
  got = stats.reset(stats.add_count(random_statistics(3), 4))
  expected = jaxbn.init(3, debias=True)._asdict()
  layers.assert_bit_equal((got["a"], got["b"]["c"]), (expected, expected))


def test_a_table_of_the_worst_channels():
  first = {"norm": {"mean": jnp.zeros(2), "var": jnp.array([4.0, 1.0])}}
  second = {"norm": {"mean": jnp.array([1.0, -3.0]), "var": jnp.array([2.0, 3.0])}}
  table = stats.compare({"batch_stats": first}, {"batch_stats": second})
  assert table == {"batch_stats/norm": stats.Difference(3.0, 0.5, 3.0)}
  assert str(table).splitlines()[1] == "batch_stats/norm           3  0.5 to 3"


def test_a_checkpoint_of_flax_s_trains_on_debiased():
  """With the count added it goes on as if it had been debiased from the start; in NNX too."""
  x = networks.X
  model = replace(networks.PreActivation(), debias=True)
  variables = networks.init(networks.PreActivation(), x)
  with pytest.raises(ValueError, match=r"BatchNorm_0 has a mean but no count.*stats.add_count"):
    model.apply(variables, x, mutable=["batch_stats"])
  counted = stats.add_count(variables, 3)
  assert counted.keys() == variables.keys()
  _, new = model.apply(counted, x, mutable=["batch_stats"])
  old = jaxbn.RunningStats(**counted["batch_stats"]["BatchNorm_0"])
  expected = jaxbn.update(old, jaxbn.moments(x), momentum=0.9, debias=True)
  layers.assert_equal_to_rounding(new["batch_stats"]["BatchNorm_0"], expected._asdict())
  layers.assert_bit_equal(stats.drop_count(counted), variables)

  plain = networks.nnx_network()
  counted = stats.add_count(plain, 3)
  ours = replace(counted, debias=True)
  np.testing.assert_array_equal(ours.scanned.norm.count[...], np.full((3, 3), 3.0))
  ours(x)
  np.testing.assert_array_equal(ours.scanned.norm.count[...], np.full((3, 3), 4.0))
  assert not hasattr(plain.blocks[0].norm, "count")
  layers.assert_bit_equal(
    *(nnx.state(m, nnx.BatchStat) for m in (stats.drop_count(counted), plain))
  )


@pytest.mark.parametrize(("momentum", "updates"), [(0.99, 1), (0.99, 5), (0.5, 30)])
def test_the_initial_values_are_taken_out(momentum, updates):
  plain, debiased = jaxbn.init(3), jaxbn.init(3, debias=True)
  for x in np.random.default_rng(0).normal(5, 2, (updates, 8, 3)).astype(np.float32):
    plain = jaxbn.update(plain, jaxbn.moments(x), momentum=momentum)
    debiased = jaxbn.update(debiased, jaxbn.moments(x), momentum=momentum, debias=True)
  as_flax = {"norm": {"mean": plain.mean, "var": plain.var}}
  counted = stats.add_count(as_flax, updates, momentum=momentum)
  # Rounding of each update, in units of the 1 that the initial variance was, grows by the division.
  lost = updates / (1 - momentum**updates)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=4 * lost * 2**-24),
    counted["norm"],
    debiased._asdict(),
  )
  layer = replace(networks.nnx_network(), debias=False)
  layer.blocks[0].norm.mean[...] += 1.0
  ours = stats.add_count(layer, 2, momentum=0.5)
  np.testing.assert_allclose(
    ours.blocks[0].norm.mean[...], layer.blocks[0].norm.mean[...] / 0.75, rtol=1e-6
  )


def test_nnx_modules_and_frozen_dicts_come_back_as_such():
  model = networks.nnx_network()
  new = stats.interpolate(model, stats.reset(model), 0.5)
  assert type(new) is networks.NnxNetwork
  np.testing.assert_array_equal(new.blocks[0].norm.var[...], [1, 1, 1])
  frozen = freeze({"norm": {"mean": jnp.ones(2), "var": jnp.ones(2)}})
  assert type(stats.reset(frozen)) is type(frozen)


def test_what_cannot_be_is_said():
  one = random_statistics(3)
  with pytest.raises(ValueError, match="statistics in a of one network"):
    stats.compare(one, {"b": one["b"]})
  with pytest.raises(ValueError, match=r"means in a have shapes \(3,\) and \(2,\)"):
    stats.interpolate(one, random_statistics(2), 0.5)
  with pytest.raises(ValueError, match=r"no mean beside a var .* have params: give batch_stats"):
    stats.reset({"params": {}})
  with pytest.raises(TypeError, match="of type list"):
    stats.reset([])
  with pytest.raises(ValueError, match="there is a leaf count already"):
    stats.add_count(stats.add_count(one, 1), 1)
  with pytest.raises(ValueError, match="updates=0 with a momentum"):
    stats.add_count(one, 0, momentum=0.9)
  with pytest.raises(ValueError, match="momentum=2 is out of range"):
    stats.add_count(one, 1, momentum=2)
