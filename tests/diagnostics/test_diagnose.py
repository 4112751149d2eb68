"""jaxbn.diagnose on networks, foreign ones included: what it sees is what is there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
from tests.diagnostics import networks
from tests.diagnostics.networks import BATCHES, QUIET, names
from tests.surgery import networks as others

RUN = {**QUIET, "train": False}


@pytest.fixture(scope="module")
def healthy():
  model = networks.Net()
  variables = networks.healthy(model)
  report = jaxbn.diagnose(model, variables, BATCHES, optimizer=optax.sgd(0.1), **RUN)
  return model, variables, report


def test_nothing_is_found_in_a_healthy_network(healthy):
  *_, report = healthy
  assert report.ok
  assert report.parts is None
  assert [v["path"] for v in report.layers] == ["BatchNorm_0", "BatchNorm_1"]
  assert report.unseen == (
    "Not looked for: not-mutable (give earlier=), padding (give valid=), replicas-differ (give "
    "replicas=)."
  )


def test_outputs_and_gradients_are_those_of_the_network(healthy):
  model, variables, _ = healthy
  x = BATCHES[0]
  stats = {"batch_stats": variables["batch_stats"]}

  def loss(params):
    y, _ = model.apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])
    return (y**2).sum()

  norms = jaxbn.diagnostics.gradient_norms(
    model, variables, x, loss=lambda y, x: (y**2).sum(), train=False
  )
  # Of the last layer by hand: y = relu(h) W, so that dh = [h > 0] 2 y W^T.
  capture = {"capture_intermediates": True, "mutable": ["batch_stats", "intermediates"]}
  y, state = model.apply(variables, x, train=True, **capture)
  h = state["intermediates"]["BatchNorm_1"]["__call__"][0]
  expected = np.linalg.norm((h > 0) * (2 * y @ variables["params"]["Dense_2"]["kernel"].T))
  assert norms["BatchNorm_1"] == pytest.approx(float(expected), rel=1e-4)

  evaluated = model.apply(variables, x, train=False, **capture)[1]["intermediates"]
  far = np.sqrt(np.mean((h - evaluated["BatchNorm_1"]["__call__"][0]) ** 2) / np.var(h, 0).mean())
  one = jaxbn.diagnose(model, variables, [x], gradients=False, **RUN)
  # Of 256 elements of a channel that has 32.
  assert one.layers[1]["distance"] == pytest.approx(float(far), rel=0.1)


def test_an_nnx_network_and_its_flag():
  model = networks.healthy_nnx()
  before = nnx.state(model, nnx.BatchStat)
  assert names(jaxbn.diagnose(model, None, BATCHES, gradients=False, **QUIET)) == []
  model.train()
  sick = jaxbn.diagnose(model, None, BATCHES, gradients=False, **QUIET)
  assert names(sick) == [("inverted-flag", "norms/0"), ("inverted-flag", "norms/1")]
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.BatchStat))


def test_peculiarities_of_a_network():
  model = networks.Net(biased=True, frozen=True, twice=True)
  variables = networks.healthy(model)
  report = jaxbn.diagnose(model, variables, BATCHES, decay_mask=True, **RUN)
  assert names(report) == [
    ("frozen", "BatchNorm_1"),
    ("called-twice", "BatchNorm_1"),
    ("weight-decay", "BatchNorm_0"),
    ("weight-decay", "BatchNorm_1"),
    ("cancelled-bias", "Dense_1/bias"),
  ]


@pytest.mark.parametrize("masked", [False, True])
def test_padding_is_seen_where_the_mask_is_missing(healthy, masked):
  model, variables, _ = healthy
  valid = np.arange(32) < 24
  padded = [np.where(valid[:, None], x, 0) for x in BATCHES]
  variables = jaxbn.surgery.recalibrate(
    model, variables, [x[valid] for x in BATCHES], train=False, **QUIET
  )
  mask = valid[:, None] if masked else None
  arguments = {**RUN, "mask": mask, "gradients": False}
  report = jaxbn.diagnose(model, variables, padded, valid=lambda x: valid, **arguments)
  assert names(report)[:1] == ([] if masked else [("padding", "BatchNorm_0")])


def test_replicas_and_optimizer_are_looked_at(healthy):
  model, variables, _ = healthy
  told = {"gradients": False, "optimizer": optax.adamw(1e-3), **RUN}
  both = jax.tree.map(lambda a: jnp.stack([a, a]), variables)
  report = jaxbn.diagnose(model, variables, BATCHES[:2], replicas=both, **told)
  decays = [("weight-decay", "BatchNorm_0"), ("weight-decay", "BatchNorm_1")]
  assert names(report) == decays
  apart = jax.tree.map(lambda a: jnp.stack([a, a + 0.01]), variables)
  report = jaxbn.diagnose(model, variables, BATCHES[:2], replicas=apart, **told)
  assert [name for name, _ in names(report)][:2] == ["replicas-differ"] * 2


def test_foreign_and_scanned_layers():
  model = others.WithTheirs()
  x = [np.asarray(b) for b in BATCHES]
  variables = others.init(model, x[0])
  foreign = {others.Theirs: others.THEIRS}
  given = {"foreign": foreign, "gradients": False, **RUN}
  variables = jaxbn.surgery.recalibrate(model, variables, x, foreign=foreign, train=False, **QUIET)
  assert names(jaxbn.diagnose(model, variables, x, **given)) == []

  model = others.Scanned()
  variables = others.init(model, x[0])
  report = jaxbn.diagnose(model, variables, x[:2], **RUN)
  assert [v["size"] for v in report.layers] == [9]
  assert np.isfinite(report.layers[0]["gradient"])


def test_what_devices_hold_is_compared():
  model = nn.BatchNorm(use_running_average=True)
  variables = model.init(jax.random.key(0), BATCHES[0])
  mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def held(values):
    pieces = [jax.device_put(v, d) for v, d in zip(values, mesh.devices, strict=True)]
    return jax.make_array_from_single_device_arrays((3,), everywhere, pieces)

  for second, expected in ((1.0, False), (1.5, True)):
    mean = held([jnp.ones(3), jnp.full(3, second)])
    stats = {"mean": mean, "var": held([4 * jnp.ones(3)] * 2)}
    variables = {**variables, "batch_stats": stats}
    report = jaxbn.diagnose(model, variables, BATCHES[:2], gradients=False, **QUIET)
    assert (("replicas-differ", "") in names(report)) == expected


def test_what_cannot_be_is_refused(healthy):
  model, variables, _ = healthy
  with pytest.raises(ValueError, match="batches gave none"):
    jaxbn.diagnose(model, variables, [], **RUN)
  with pytest.raises(ValueError, match="thresholds has 'noise', but the faults are nan"):
    jaxbn.diagnose(model, variables, BATCHES, thresholds={"noise": {}}, **RUN)
  with pytest.raises(ValueError, match=r"has 'often', but that fault has elements"):
    jaxbn.diagnose(model, variables, BATCHES, thresholds={"noisy-statistics": {"often": 1}}, **RUN)
