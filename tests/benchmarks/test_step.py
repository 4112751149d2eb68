"""The benchmark of whole steps: what it runs is a step, and its chapter says what the rows say."""

import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import networks, report, step
from benchmarks import results as stored

TINY = networks.TINY_RESNET


def test_steps_are_timed_in_turns():
  flax, ours = step.step_rows("tiny", TINY, "float32", rounds=2)
  assert (flax["norm"], ours["norm"]) == ("flax", "jaxbn")
  for row in (flax, ours):
    assert 0 < row["min_ms"] <= row["median_ms"]
    assert 0 < row["temp_MB"] < row["peak_MB"]
    assert row["rounds"] == 2


def test_a_step_goes_on_from_the_last_one():
  _, compiled, shapes = step.seconds_to_compile(TINY, networks.jaxbn)
  losses = []

  def recorded(*arguments):
    *state, loss = compiled(*arguments)
    losses.append(float(loss))
    return *state, loss

  run = step._running(recorded, shapes)
  for _ in range(3):
    run()
  assert len(set(losses)) == 3
  assert losses[0] > losses[2]


@pytest.mark.parametrize("name", step.WHOLE)
def test_the_networks_have_the_published_numbers_of_parameters(name):
  millions = {"resnet50": 25.6, "mobilenet": 3.5, "densenet": 8.0, "unet": 31.0}
  model = step.WHOLE[name].model(networks.none, jnp.bfloat16)
  inputs = jax.ShapeDtypeStruct((1, *step.WHOLE[name].shape), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count / 1e6 == pytest.approx(millions[name], rel=0.02)  # without those of the norms


def row(device, norm, **changes):
  made = {"device": device, "machine": device, "date": "2020-01-01", "jax": "1", "norm": norm}
  made |= {"kind": "step", "network": "unet", "dtype": "bfloat16", "batch": 32, "load": 0.5}
  made |= {"shape": [8, 8, 3], "compile_s": 2.0, "temp_MB": 5.0, "peak_MB": 9.0, "rounds": 30}
  return made | {"median_ms": 1234.5, "min_ms": 1000.0} | changes


def rows(device):
  compiled = {"kind": "compile", "processes": 3, "cold_s": 1.25, "cached_s": 0.5}
  return [row(device, "flax"), row(device, "jaxbn"), row(device, "none", **compiled)]


def test_the_chapter_has_a_table_for_each_device_and_says_where_it_was_not_run():
  text = report.section("step", {"rows": [*rows("cpu"), *rows("NVIDIA H100 80GB HBM3")]})
  assert "### cpu\n" in text
  assert "### NVIDIA H100 80GB HBM3\n" in text
  assert "| U-Net | 32 of 8x8x3 | jaxbn | 1,234.5 ms | 1,000.0 ms | 5 MB | 9 MB | 2.0 s |" in text
  assert "| none | 1.25 s | 0.50 s |" in text
  assert "Not run yet on: NVIDIA A100, TPU." in text


def test_rows_of_other_devices_stay(tmp_path, monkeypatch):
  monkeypatch.setattr(stored, "FOLDER", tmp_path)
  stored.write("step", step.COMMAND, [*rows("cpu"), *rows("TPU v9")], tmp_path / "step.json")
  new = [row("cpu", "flax", rounds=7), rows("cpu")[2]]
  for one in new:
    one.pop("device")
  monkeypatch.setattr(step, "run", lambda quick: new)
  monkeypatch.setattr(sys, "argv", ["step"])
  step.main()
  found = stored.read("step")["rows"]
  assert [one["device"] for one in found] == ["TPU v9"] * 3 + ["cpu"] * 2
  assert found[3]["rounds"] == 7
