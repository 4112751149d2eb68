"""jaxbn.surgery.recalibrate: running statistics are those of all elements of all batches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import jaxbn.linen
from jaxbn.surgery import adapt, recalibrate, replace
from jaxbn.surgery._spread import Spread, how_far
from tests import layers
from tests.surgery import networks

RNG = np.random.default_rng(1)
ALL = RNG.normal(1, 2, (16, networks.WIDTH))
ONE = jax.devices()[:1]
STATE = nnx.Any(nnx.Param, nnx.BatchStat)
EPS = 1e-12  # in float64: rounding is far below, and what is wrong far above


@pytest.fixture
def batches():
  """Of two sizes, in float64."""
  with jax.enable_x64(True):
    yield [jnp.asarray(b) for b in np.split(ALL, [8, 12])]


@functools.partial(jax.jit, static_argnums=0)
def of_batch(model, variables, x):
  """The statistics of one batch, as Flax's layers tell them: new = 0.9 old + 0.1 batch."""
  _, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
  old = variables["batch_stats"]
  return jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, new["batch_stats"], old)


def pooled(stats, sizes):
  """Means and variances of all from those of batches: E[x^2] - E[x]^2, in float64."""
  flat = [flatten_dict(s) for s in stats]
  weigh = lambda values: sum(n * v for n, v in zip(sizes, values, strict=True)) / sum(sizes)  # noqa: E731
  result = {}
  for path in flat[0]:
    means = [s[(*path[:-1], "mean")] for s in flat]
    result[path] = weigh(means)
    if path[-1] == "var":
      squares = [s[path] + m**2 for s, m in zip(flat, means, strict=True)]
      result[path] = weigh(squares) - weigh(means) ** 2
  return result


@pytest.fixture(scope="module")
def everything():
  with jax.enable_x64(True):
    model = networks.Everything()
    return model, networks.in_double_precision(networks.init(model, jnp.asarray(ALL)))


def test_in_training_one_pass_pools_all_batches(everything, batches):
  model, variables = everything
  before = jax.tree.map(np.asarray, variables)
  new = recalibrate(model, variables, iter(batches), devices=ONE, train=True)
  expected = pooled([of_batch(model, variables, b) for b in batches], [len(b) for b in batches])
  layers.assert_equal_to_rounding(flatten_dict(new["batch_stats"]), expected, EPS)
  layers.assert_bit_equal(new["params"], variables["params"])
  layers.assert_bit_equal(jax.tree.map(np.asarray, variables), before)


def test_in_evaluation_it_is_as_if_all_were_one_batch_of_training(everything, batches):
  model, variables = everything
  said = []
  new = recalibrate(
    model, variables, batches, mode="evaluation", devices=ONE, progress=said.append, train=False
  )
  x = jnp.asarray(ALL)
  layers.assert_equal_to_rounding(new["batch_stats"], of_batch(model, variables, x), EPS)
  assert said[1] == "pass 1, batch 2 of 3 [################        ]"
  # 13 norms are one behind the other, the two of vmap beside each other, and one pass to see it.
  assert said[-1] == "done in 14 passes over 3 batches\n"


def double_network(shared):
  model = networks.nnx_network()
  nnx.update(model, networks.in_double_precision(nnx.state(model, STATE)))
  if not shared:
    model.named["shared"] = nnx.clone(model.named["shared"])
  return model


def test_a_layer_called_twice_gets_both_on_all_devices(batches):
  model = double_network(shared=True)
  before = networks.snapshot(model)
  new = recalibrate(model, None, batches)
  layers.assert_bit_equal(networks.snapshot(model), before)
  assert type(new.named["own"]) is networks.NnxOwn

  given = []
  for x in batches:
    first, second = model.blocks
    given += [first.dense(x), second(first(x))]
  given = np.concatenate(given)
  layers.assert_equal_to_rounding(new.blocks[0].norm.mean[...], given.mean(0), EPS)
  layers.assert_equal_to_rounding(new.blocks[0].norm.var[...], given.var(0), EPS)
  with pytest.raises(ValueError, match=r"blocks/0/norm, which is called 2 times.*mode='training'"):
    recalibrate(model, None, batches, mode="evaluation", devices=ONE)


def test_nnx_in_evaluation(batches):
  model = double_network(shared=False)
  model.eval()
  new = recalibrate(model, None, batches, mode="evaluation", devices=ONE)
  model.train()
  model.dropout.deterministic = True
  x = jnp.asarray(ALL)
  evaluated, trained = nnx.jit(lambda new, model, x: (new(x), model(x)))(new, model, x)
  layers.assert_equal_to_rounding(evaluated, trained, EPS)


def test_layers_that_are_not_flax_s_keep_their_shapes(batches):
  model, foreign = networks.WithTheirs(), {networks.Theirs: networks.THEIRS}
  variables = networks.in_double_precision(model.init(jax.random.key(0), batches[0]))
  new = recalibrate(model, variables, batches, foreign=foreign, devices=ONE)
  stats = new["batch_stats"]["Theirs_0"]
  h = [b[: len(b) // 2] @ variables["params"]["Dense_0"]["kernel"] for b in batches]
  h = np.concatenate(h)  # the half that its mask lets through
  layers.assert_equal_to_rounding(stats["moving_mean"], h.mean(0).reshape(1, 1, 1, 3), EPS)
  layers.assert_equal_to_rounding(stats["moving_var"], h.var(0).reshape(1, 1, 1, 3), EPS)


def test_options_of_our_layers(batches):
  """Unbiased variances, counts, an axis that is not bound, and a replacement around."""
  options = {"axis_name": "devices", "unbiased": True, "debias": True}
  layer = jaxbn.linen.BatchNorm(use_running_average=True, **options)
  variables = networks.in_double_precision(layer.init(jax.random.key(0), batches[0]))
  expected = {"mean": ALL.mean(0), "var": ALL.var(0, ddof=1), "count": np.full(3, 3.0)}
  new = recalibrate(layer, variables, batches, devices=ONE)
  layers.assert_equal_to_rounding(new["batch_stats"], expected, EPS)
  around = replace(nn.BatchNorm(use_running_average=True), **options)
  new = recalibrate(around, variables, batches, devices=ONE)
  layers.assert_equal_to_rounding(
    new["batch_stats"] | {"var": ALL.var(0)}, expected | {"var": ALL.var(0)}, EPS
  )


def test_a_network_that_trains_where_batch_stats_may_change(batches):
  model = networks.ByMutability()
  variables = model.init(jax.random.key(0), batches[0])
  with pytest.raises(Exception, match="dropout"):  # and is told so, where it draws
    recalibrate(model, variables, batches, mode="evaluation", devices=ONE)
  rngs = {"dropout": jax.random.key(0)}
  new = recalibrate(model, variables, batches, mode="evaluation", devices=ONE, rngs=rngs)
  h = ALL @ variables["params"]["Dense_0"]["kernel"]
  np.testing.assert_allclose(new["batch_stats"]["BatchNorm_0"]["mean"], h.mean(0), rtol=1e-6)


def test_rows_lie_on_as_many_devices_as_divide_them():
  spread = Spread(None)
  for rows, devices in ((16, 8), (12, 6), (7, 7), (11, 1)):
    tree, *_, (x, other) = spread({"w": jnp.ones(3)}, None, 0, (jnp.ones((rows, 3)), jnp.ones(2)))
    assert len(x.sharding.device_set) == len(tree["w"].sharding.device_set) == devices
    assert {s.data.shape for s in x.addressable_shards} == {(rows // devices, 3)}
    assert tree["w"].is_fully_replicated
    assert other.is_fully_replicated


SIMPLE = networks.PreActivation()


def test_what_cannot_be_is_said():
  x = jnp.asarray(ALL, jnp.float32)
  variables = networks.init(SIMPLE, x)
  run = lambda batches, **options: recalibrate(  # noqa: E731
    SIMPLE, options.pop("variables", variables), batches, **options
  )
  with pytest.raises(ValueError, match="mode='eval' is neither"):
    run([x], mode="eval")
  with pytest.raises(ValueError, match=r"once.*lambda: loader"):
    run(iter([x]), mode="evaluation")
  with pytest.raises(ValueError, match="batches gave none"):
    run([])
  with pytest.raises(
    ValueError, match=r"BatchNorm BatchNorm_0 is given has a NaN .* 1 of 3 channels"
  ):
    run([x, x.at[0, 1].set(jnp.nan)])
  with pytest.raises(ValueError, match=r"lacks what a layer needs.*'batch_stats': batch_stats"):
    run([x], variables={"params": variables["params"]})
  with pytest.raises(ValueError, match=r"lacks what a layer needs.*BatchNorm_0"):
    run([x], variables={**variables, "batch_stats": {}})
  with pytest.raises(TypeError, match="of type list"):
    run([x], variables=[1])
  with pytest.raises(TypeError, match="give None"):
    recalibrate(networks.nnx_network(), variables, [x])
  dense = nn.Sequential([nn.Dense(2)])
  without = {**dense.init(jax.random.key(0), x), "cache": {}}
  with pytest.raises(ValueError, match=r"Sequential calls no batch norm.*foreign="):
    recalibrate(dense, without, [x])
  elsewhere = {**variables["batch_stats"], "other": {"mean": x[0], "var": x[0]}}
  more = {**variables, "batch_stats": elsewhere}
  with pytest.raises(ValueError, match=r"batch_stats/other, but .* foreign=.* partial=True"):
    run([x], variables=more)
  new = run(lambda: iter([{"x": x}]), variables=more, partial=True, inputs=lambda b: (b["x"],))
  layers.assert_bit_equal(new["batch_stats"]["other"], elsewhere["other"])


def test_statistics_are_where_they_were_whatever_divides_the_batches():
  model, x = networks.PreActivation(), networks.X
  variables = networks.init(model, x)
  there = jax.device_put(variables, jax.devices()[1])
  for given, devices in ((variables, {jax.devices()[0]}), (there, {jax.devices()[1]})):
    new = recalibrate(model, given, [x[:6], x[6:]])
    for old, leaf in zip(jax.tree.leaves(given), jax.tree.leaves(new), strict=True):
      assert leaf.devices() == devices
      assert leaf.committed == old.committed


class Domains(nn.Module):
  @nn.compact
  def __call__(self, x, domains, mask):
    layer = jaxbn.linen.DomainBatchNorm(num_domains=3, use_running_average=True, name="norm")
    return layer(x, domains, mask=mask)


class NnxDomains(nnx.Module):
  def __init__(self):
    self.norm = jaxbn.nnx.DomainBatchNorm(networks.WIDTH, 3, rngs=nnx.Rngs(0))
    self.norm.mean[...] += 1

  def __call__(self, x, domains, mask):
    return self.norm(x, domains, mask=mask)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_each_domain_gets_its_own_examples(kind):
  """Images with a mask, in two batches; a domain that is absent keeps what it had."""
  x = np.float32(RNG.normal(1, 2, (6, 2, 2, networks.WIDTH)))
  domains, mask = np.array([0, 2, 0, 2, 2, 0]), np.arange(6) != 3
  batches = [(x[i], domains[i], mask[i, None, None, None]) for i in np.split(np.arange(6), [4])]
  ones = {"mean": jnp.ones((3, 3)), "var": jnp.ones((3, 3))}
  if kind == "linen":
    affine = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    given = Domains(), {"params": {"norm": affine}, "batch_stats": {"norm": ones}}
    read = lambda new: new["batch_stats"]["norm"]  # noqa: E731
  else:
    given = NnxDomains(), None
    read = lambda new: {"mean": new.norm.mean[...], "var": new.norm.var[...]}  # noqa: E731
  own = [x[(domains == d) & mask].reshape(-1, networks.WIDTH) for d in (0, 2)]
  expected = {name: np.ones((3, 3), np.float32) for name in ones}
  for name, of in (("mean", np.mean), ("var", np.var)):
    expected[name][[0, 2]] = [of(v, 0) for v in own]
  layers.assert_equal_to_rounding(read(recalibrate(*given, batches)), expected)
  # An example of the prior has as many elements as one of the batches on average.
  prior = 2.0 * sum(map(len, own)) / len(x)
  shares = np.float32([len(own[0]) / (len(own[0]) + prior), 0, len(own[1]) / (len(own[1]) + prior)])
  mixed = read(adapt(*given, batches, prior=2.0))["mean"]
  expected = 1 + shares[:, None] * (expected["mean"] - 1)
  np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("batches", "said"),
  [(4 * [0], "batch 3 of 4 [##################      ]"), ([], "batch 3"), (iter([]), "batch 3")],
)
def test_a_length_that_is_too_small_or_none_has_no_bar(batches, said):
  assert how_far(3, batches) == said


def test_complex_inputs_in_a_network_just_initialized():
  """Whose mean is float32: what is put there is complex, as Flax's own first update is."""
  layer = nn.BatchNorm()
  parts = RNG.normal(size=(2, 12, 3)).astype(np.float32)
  x = parts[0] + 1j * parts[1] + 2j
  variables = layer.init(jax.random.key(0), x, use_running_average=True)
  new = recalibrate(layer, variables, [x[:8], x[8:]], use_running_average=True)["batch_stats"]
  np.testing.assert_allclose(new["mean"], x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(new["var"], x.var(0), rtol=1e-5)
