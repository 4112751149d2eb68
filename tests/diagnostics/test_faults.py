"""Each fault, planted in what is known of a healthy network: it is named, with its layer, alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import Moments, RunningStats, merge
from jaxbn.diagnostics import _facts, covariate_shift
from jaxbn.diagnostics._collect import Programs, Run, collect
from jaxbn.diagnostics._faults import FAULTS, findings
from jaxbn.diagnostics._faults_of_runs import gradient_growth
from jaxbn.surgery._network import Network
from jaxbn.surgery._spread import Spread
from tests.diagnostics import networks

SECOND = "BatchNorm_1"
NOTHING_SAID = Run(*[None] * (len(Run._fields) - 1), gradients=True)


@pytest.fixture(scope="module")
def facts():
  model = networks.Net()
  arguments = {"inputs": None, "foreign": None, "partial": True, "arguments": {"train": False}}
  network = Network(model, networks.healthy(model), **arguments)
  quiet = networks.QUIET["progress"]
  return collect(network, networks.BATCHES, NOTHING_SAID, Spread(networks.ONE), quiet, Programs())


def test_nothing_is_wrong_with_a_healthy_network(facts):
  assert findings(facts, {}) == []


@pytest.mark.parametrize("channels", [3, 1000])
def test_whatever_the_number_of_channels_each_is_measured(channels):
  values = np.random.default_rng(0).normal(size=(6, channels)).astype(np.float32)
  one, other = (Moments(*(np.abs(v) + 1)) for v in (values[:3], values[3:]))
  for got, want in zip(_facts._merge(one, other), merge(one, other), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6)
  got = _facts._shift(one, other, epsilon=0.5)
  np.testing.assert_allclose(got, covariate_shift(one, other, epsilon=0.5), rtol=1e-5, atol=1e-7)


def planted(facts, *, which=1, run=None, **changes):
  layers = list(facts.layers)
  layers[which] = dataclasses.replace(layers[which], **changes)
  return dataclasses.replace(facts, layers=layers, **(run or {}))


def found(facts, **thresholds):
  return [(f.fault, f.layer) for f in findings(facts, thresholds)]


def options(layer, **changes):
  return layer._replace(options={**layer.options, **changes})


def first_channel(values, value):
  values = np.array(values)
  values[0] = value
  return values


def changes(v):
  """Of each fault what is other in its layer, or in the run."""
  mean, var = v.running[:2]
  seen, data = v.training, v.data
  return {
    "nan": {"running": RunningStats(first_channel(mean, np.nan), var)},
    "never-updated": {"running": RunningStats(0 * mean, np.ones_like(var))},
    "not-mutable": {"earlier": v.running, "run": {"moved": True}},
    "other-domain": {"running": RunningStats(mean - np.sqrt(var), var)},
    "pytorch-momentum": {"layer": options(v.layer, momentum=0.1)},
    "inverted-flag": {"layer": v.layer._replace(evaluating=False)},
    "frozen": {"trains": False},
    "called-twice": {
      "layer": v.layer._replace(calls=2),
      "training": [s._replace(last=Moments(s.last.count, mean + 3, var)) for s in seen],
    },
    "dead-channels": {"scale": first_channel(v.scale, 0.0)},
    "exploding-scale": {"scale": first_channel(v.scale, -33.0)},
    "epsilon-dominates": {"layer": options(v.layer, epsilon=2 * float(np.median(data.var)))},
    "half-precision": {"dtype": np.dtype(jnp.bfloat16)},
    "padding": {"other_padding": Moments(data.count, seen[0].given.mean + 0.1, seen[0].given.var)},
    "replicas-differ": {
      "replicas": RunningStats(np.stack([mean, mean + 0.1]), np.stack([var, var]))
    },
    "weight-decay": {"run": {"decayed": [v.layer.variables["scale"]]}},
  }


@pytest.mark.parametrize(
  "fault",
  sorted(
    FAULTS.keys()
    - {
      "cancelled-bias",
      "gradient-growth",
      "last-batch-of-one",
      "momentum-too-slow",
      "noisy-statistics",
    }
  ),
)
def test_a_fault_is_named_with_its_layer_and_nothing_else_is(facts, fault):
  assert found(planted(facts, **changes(facts.layers[1])[fault])) == [(fault, SECOND)]


def blend(v, w):
  mean, var = v.data.mean, v.data.var
  return RunningStats((1 - w) * mean, w + (1 - w) * var)


@pytest.mark.parametrize("steps", [None, 20])
def test_what_is_left_of_initial_values_is_measured(facts, steps):
  w = 0.9**20
  sick = facts
  for i, v in enumerate(facts.layers):
    v = dataclasses.replace(v, layer=options(v.layer, momentum=0.9))
    sick = planted(sick, which=i, running=blend(v, w), run={"steps": steps})
  first, second = findings(sick, {"momentum-too-slow": {"nats": 1e-4, "batches": 0.0}})
  assert (first.fault, first.layer, second.layer) == ("momentum-too-slow", "BatchNorm_0", SECOND)
  about = "after 20 steps" if steps else "after about 20 steps"
  assert f"{about} with momentum 0.9 its running statistics are still 12% initial" in first.evidence
  # 0.7 ** 20 is 0.1 %: the momentum that is told leaves less than a hundredth.
  assert first.mend.startswith("BatchNorm(momentum=0.7)")
  assert first.sure == ("certain" if steps else "likely")


def test_a_drift_is_that_of_a_gaussian(facts):
  v = facts.layers[1]
  shifted = dataclasses.replace(v, running=RunningStats(v.data.mean, np.e * v.data.var))
  # (log e + 1/e - 1) / 2, but for epsilon and float32.
  assert shifted.drift == pytest.approx(0.5 / np.e, rel=1e-4)
  limit = {"batches": 0.0}
  sick = planted(facts, running=shifted.running)
  assert found(sick, **{"other-domain": {**limit, "nats": 0.18}}) == [("other-domain", SECOND)]
  assert found(sick, **{"other-domain": {**limit, "nats": 0.19}}) == []


def test_the_noise_of_a_batch_is_one_over_its_independent_elements(facts):
  first = facts.layers[0]
  # 32 rows; of 8 batches the estimate has a standard error of sqrt(2 / 7) per channel.
  assert 1 / np.mean(first.noise) == pytest.approx(32, rel=3 * np.sqrt(2 / 7))
  # What the shapes say needs no estimate, which for 6 would not be sure.
  assert len(found(dataclasses.replace(facts, batch_size=6))) == 2
  noisy = dataclasses.replace(facts, batch_size=2)
  told = findings(noisy, {})
  assert {f.fault for f in told} == {"noisy-statistics"}
  assert [f.layer for f in told] == ["BatchNorm_0", SECOND]
  need = int(told[0].mend.split()[2])
  assert found(dataclasses.replace(facts, batch_size=need)) == []


def test_padding_is_told_where_it_comes_in(facts):
  sick = facts
  for i, v in enumerate(facts.layers):
    given = v.training[0].given
    sick = planted(sick, which=i, other_padding=given._replace(mean=given.mean + 0.1))
  assert found(sick) == [("padding", "BatchNorm_0")]


def test_a_last_batch_of_one(facts):
  assert found(dataclasses.replace(facts, rows=[32] * 7 + [1])) == [
    ("last-batch-of-one", "BatchNorm_0")
  ]


def test_gradients_that_grow(facts):
  v = facts.layers[1]

  def deep(growth):
    layers = [
      dataclasses.replace(v, gradient=np.full(4, growth ** (2.0 * (39 - i)))) for i in range(40)
    ]
    return list(gradient_growth(dataclasses.replace(facts, layers=layers)))

  (growing,) = deep(1.21)  # pi / (pi - 1), the square root
  assert growing.fault == "gradient-growth"
  assert "grows by 1.21 per layer, over 40 layers" in growing.evidence
  assert deep(1.19) == []  # 884 times


def test_a_channel_that_never_says_anything(facts):
  v = facts.layers[1]
  seen = [s._replace(largest=first_channel(s.largest, -1.0)) for s in v.training]
  silent = planted(facts, training=seen, gradient=first_channel(v.gradient, 0.0))
  assert found(silent) == [("dead-channels", SECOND)]
  assert found(planted(facts, training=seen)) == []  # something behind it hears it
  constant = [
    s._replace(given=s.given._replace(var=first_channel(s.given.var, 0), mean=0 * s.given.mean))
    for s in v.training
  ]
  assert ("dead-channels", SECOND) in found(planted(facts, training=constant))


def test_large_means_are_lost_in_half_precision(facts):
  v = facts.layers[1]
  given = v.layer.input.update(dtype=jnp.bfloat16)
  assert found(planted(facts, layer=v.layer._replace(input=given))) == []
  far = [s._replace(given=s.given._replace(mean=1e3 + s.given.mean)) for s in v.training]
  sick = planted(
    facts,
    layer=v.layer._replace(input=given),
    training=far,
    running=RunningStats(v.running.mean + 1e3, v.running.var),
  )
  assert found(sick) == [("half-precision", SECOND)]


def test_not_finite_data_is_told_of_the_first_layer(facts):
  sick = facts
  for i in range(2):
    seen = [
      s._replace(given=s.given._replace(mean=s.given.mean * np.nan))
      for s in facts.layers[i].training
    ]
    sick = planted(sick, which=i, training=seen)
  told = findings(sick, {})
  assert [(f.fault, f.layer) for f in told] == [("nan", "BatchNorm_0")]
