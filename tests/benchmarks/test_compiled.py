"""The benchmark of compiled programs: what it makes of rows, and of one small compiled layer."""

import argparse
import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks import charts, compiled, compiled_report, floor, networks, report

PROGRAM = {
  "kind": "program",
  "target": "h100",
  "compiler": "plugin 1",
  "dtype": "bfloat16",
  "network": "vgg",
  "activation": "relu",
  "floor_MB": 50.0,
  "kernels": 10,
  "compile_s": 2.0,
}


def program(norm, mb, temp_mb=10.0, **changes):
  return {**PROGRAM, "norm": norm, "MB": mb, "temp_MB": temp_mb, **changes}


def rows():
  every = [
    program("none", 100.0),
    program("flax", 200.0, 30.0),
    program("jaxbn", 160.0, 12.0, kernels=12),
    program("none", 10.0, target="v5e"),
    program("flax", 40.0, target="v5e"),
    program("jaxbn", 60.0, target="v5e"),
    {"kind": "skipped", "target": "cpu", "why": "CPU: left out, for this test."},
  ]
  compiled.compare(every)
  return every


def results():
  return {
    "name": "compiled",
    "command": "python -m benchmarks.compiled",
    "date": "2020-01-01",
    "versions": {"jax": "1", "flax": "2"},
    "machine": {"cpu": "some processor", "cores": 2, "system": "Linux"},
    "rows": rows(),
  }


def test_the_tax_is_what_a_norm_adds_on_the_same_target():
  by = {(row["target"], row["norm"]): row for row in rows() if row["kind"] == "program"}
  assert by["h100", "flax"]["tax_MB"] == 100
  assert by["h100", "jaxbn"]["tax_over_floor"] == pytest.approx(1.2)
  assert by["v5e", "flax"]["tax_MB"] == 30
  assert by["h100", "flax"]["temp_over_none_MB"] == 20
  assert by["h100", "none"]["tax_MB"] == 0


def test_where_flax_is_better_is_said_and_nothing_else():
  kernels, moved = compiled_report.losses(rows())
  assert kernels == "H100 bfloat16 VGG, jaxbn: kernels 12 against 10."
  assert moved == "TPU v5e bfloat16 VGG, jaxbn: bytes moved 50 MB against 30 MB."


def test_a_hair_is_no_loss():
  every = rows()
  every[2] = program("jaxbn", 200.5, 30.01, compile_s=2.1)
  compiled.compare(every)
  assert not [sentence for sentence in compiled_report.losses(every) if sentence.startswith("H100")]


def test_the_section_is_made_of_the_results_alone():
  stored = results()
  before = copy.deepcopy(stored)
  text = report.section("compiled", stored)
  assert stored == before
  assert text.startswith("## ")
  assert "| VGG | jaxbn | 160 MB | 60 MB | 1.20 | 2 MB | 12 | 2.0 s |" in text
  assert "CPU: left out, for this test." in text
  assert "kernels 12 against 10" in text
  assert "benchmarks-compiled.png" in text


def test_a_section_without_losses_says_so():
  stored = results()
  stored["rows"] = stored["rows"][:2]
  assert "Nowhere in these tables." in report.section("compiled", stored)


def test_the_picture_is_drawn(tmp_path):
  (file,) = charts.draw({"compiled": results()}, tmp_path)
  assert file.name == "benchmarks-compiled.png"
  assert file.read_bytes().startswith(b"\x89PNG")


def test_no_programs_no_picture(tmp_path):
  assert charts.draw({"compiled": {**results(), "rows": []}}, tmp_path) == []


@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_a_missing_compiler_is_a_sentence(target, monkeypatch):
  monkeypatch.setattr(compiled, "_installed", lambda package: False)
  assert compiled.missing("cpu") is None
  why = compiled.missing(target)
  assert why.startswith(f"{compiled_report.TITLES[target]}: left out, for want of ")
  assert "'.[compiled]'" in why


def test_a_compiler_that_does_not_start_is_a_sentence(monkeypatch):
  def fail(target):
    raise RuntimeError("no such topology\nand a trace")

  monkeypatch.setattr(compiled, "_installed", lambda package: True)
  monkeypatch.setattr(compiled, "_devices", fail)
  expected = "TPU v5e: left out, for libtpu does not start: no such topology"
  assert compiled.missing("v5e") == expected


def test_an_unknown_name_is_refused():
  with pytest.raises(argparse.ArgumentTypeError, match="h200: not among h100, v5e, cpu"):
    compiled.names_of(compiled_report.TITLES)("h100,h200")


def test_all_reduces_are_counted():
  found = compiled.all_reduces("pmap", False, nn.BatchNorm(False, axis_name="batch"), False)
  assert found == [2 * 4 * compiled.SHARED_SHAPE[-1]]  # Flax's mean and mean square


@pytest.mark.parametrize("name", ["vgg", "generator"])
def test_a_step_is_the_same_whatever_the_norm(name):
  network = networks.NETWORKS[name]
  shapes = []
  for norm in (networks.none, networks.jaxbn):
    model = network.model(norm, jnp.bfloat16)
    arguments = networks.step_arguments(network, model)
    params, stats, _, loss = jax.eval_shape(networks.train_step(model), *arguments)
    assert loss.shape == ()
    assert bool(stats) == (norm is networks.jaxbn)
    shapes.append(jax.tree.map(jnp.shape, params))
  without, with_norm = shapes
  assert set(without) < set(with_norm)


@pytest.mark.parametrize("norm", [networks.flax, networks.jaxbn])
def test_a_norm_normalizes_then_adds_then_activates(norm):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, residual):
      return norm(x, residual=residual, dtype=jnp.float32, activation=nn.leaky_relu)

  x = jnp.asarray([[1.0], [3.0]])
  for residual, expected in ((None, [-0.01, 1.0]), (jnp.asarray([[0.5], [0.5]]), [-0.005, 1.5])):
    y, _ = jax.jit(Net().init_with_output)(jax.random.key(0), x, residual)
    assert y[:, 0] == pytest.approx(expected, rel=1e-4)


def test_normalized_bytes_by_hand():
  per_example = 32 * 32 * 64 + 16 * 16 * 128 + 8 * 8 * 256
  sizes = [size for size, _ in floor.layers(networks.NETWORKS["vgg"], "bfloat16")]
  assert sum(sizes) == 2 * 128 * per_example
