"""The callback: what it notes of a loop is what was there, and nothing is compiled again."""

import functools

import flax.linen as nn
import jax
import jax.monitoring
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn.diagnostics import Doctor
from jaxbn.diagnostics import _doctor as module
from tests.diagnostics import networks
from tests.diagnostics.networks import BATCHES, QUIET


def rows(report, layer=0):
  return report.layers[layer]["history"]


def stepped(variables, step):
  """Other running statistics in each step."""
  stats = jax.tree.map(lambda a: a + 0.5 * step, variables["batch_stats"])
  return {**variables, "batch_stats": stats}


@pytest.fixture(scope="module")
def watched():
  model = networks.Net()
  variables = networks.healthy(model)
  doctor = Doctor(model, every=2, train=False, **QUIET)
  for step in range(5):
    doctor(step, stepped(variables, step), BATCHES[step])
  return model, variables, doctor, doctor.diagnose(variables, BATCHES, steps=7)


def test_percentiles_are_those_of_the_input_and_statistics_those_of_the_step(watched):
  _, variables, _, report = watched
  assert [row["step"] for row in rows(report)] == [0, 2, 4, 7]
  inputs = [x @ np.asarray(variables["params"]["Dense_0"]["kernel"]) for x in BATCHES]
  channel = rows(report)[0]["channel"]
  assert channel == np.argsort(inputs[0].mean(0))[2]  # of four
  for row, x in zip(rows(report), inputs[:5:2], strict=False):
    assert row["channel"] == channel
    # Of 256 elements of 32, each 8 times: between the neighbours of the percentile.
    x = np.sort(x[:, channel])
    for percent, value in zip((15, 50, 85), row["percentiles"], strict=True):
      place = percent / 100 * 31
      assert x[int(place - 1)] - 1e-5 <= value <= x[int(place) + 2] + 1e-5
    stats = stepped(variables, row["step"])["batch_stats"]["BatchNorm_0"]
    assert row["running_mean"] == pytest.approx(float(stats["mean"][channel]), rel=1e-6)
    assert row["running_std"] == pytest.approx(float(stats["var"][channel]) ** 0.5, rel=1e-6)


def test_the_second_layer_is_seen_in_training_mode(watched):
  # Its statistics were made wrong: by them, its input would be far away.
  _, _, _, report = watched
  *_, wrong, right = (np.array(row["percentiles"]) for row in rows(report, 1))
  assert np.max(np.abs(wrong - right)) < 0.4 * np.ptp(right)


def test_a_second_diagnosis_compiles_nothing_and_goes_on(watched):
  _, variables, doctor, _ = watched
  compiled = []

  def listen(name, *_, **__):
    compiled.extend([name] if "backend_compile" in name else [])

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    doctor(8, variables, BATCHES[0])
    report = doctor.diagnose(variables, BATCHES, steps=9)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled == []
  assert [row["step"] for row in rows(report)] == [0, 2, 4, 7, 8, 9]
  # From an earlier step on: what was noted then and later is of another run.
  again = jaxbn.diagnose(
    doctor.model, variables, BATCHES, steps=4, before=report, train=False, **QUIET
  )
  assert [row["step"] for row in rows(again)] == [0, 2, 4]


def test_an_nnx_module_in_a_loop_and_on_two_devices():
  model = networks.healthy_nnx()
  devices = jax.devices()[:2]
  doctor = Doctor(model, every=1, devices=devices, progress=QUIET["progress"])
  one = Doctor(model, every=1, **QUIET)
  for step, x in enumerate(BATCHES[:2]):
    model.train()
    model(x)
    model.eval()
    doctor(step, model, x)
    one(step, model, x)
    mean = model.norms[0].mean.get_value()
    for row in (doctor.history()["norms/0"][step], one.history()["norms/0"][step]):
      assert row["running_mean"] == float(mean[row["channel"]])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), doctor.history(), one.history()
  )
  with pytest.raises(TypeError, match="give the NnxNet itself"):
    doctor(2, nnx.state(model), BATCHES[0])


def test_a_complex_network_is_refused_by_the_layer_s_name():
  layer, x = nn.BatchNorm(name="norm"), BATCHES[0].astype(np.complex64)
  variables = layer.init(jax.random.key(0), x, use_running_average=True)
  doctor = Doctor(layer, every=1, use_running_average=True, **QUIET)
  for look in (doctor.diagnose, functools.partial(doctor, 0)):
    with pytest.raises(TypeError, match="given complex64, but the doctor looks at real numbers"):
      look(variables, [x] if look == doctor.diagnose else x)


def test_history_has_a_limit(monkeypatch):
  monkeypatch.setattr(module, "MOST", 4)
  assert module.thinned([0, 1, 2, 3]) == [0, 1, 2, 3]
  assert module.thinned([0, 1, 2, 3, 4]) == [0, 2, 4]


def test_every_is_a_number_of_steps():
  with pytest.raises(ValueError, match="every is 0, but must be at least 1"):
    Doctor(networks.Net(), every=0)
