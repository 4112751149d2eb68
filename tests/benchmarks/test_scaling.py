"""The benchmark of many chips, on eight CPU devices: no TPU's compiler is needed for any of it."""

import collections
import copy
import dataclasses
import json

import jax
import pytest

from benchmarks import charts, hlo, networks, scaling, scaling_report, slices, weak
from benchmarks import results as stored

pytestmark = pytest.mark.optimized

CHANNELS = 8
STATISTICS = 4 * 2 * CHANNELS  # bytes of float32 sums, and of sums of squares
PIECES = 4  # in which each travels forward where devices share by name


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """The same programs on smaller data, and a smaller ResNet."""
  layer = networks.Network("layer", networks.one, (4, 4, CHANNELS), 2)
  resnet = dataclasses.replace(networks.TINY_RESNET, title="resnet50")
  for name, network in {"layer": layer, "resnet50": resnet}.items():
    monkeypatch.setitem(slices.NETWORKS, name, network)


def found(network, mode, statistics, devices):
  program = slices.Program(network, "cpu", mode, statistics)
  lowered = slices.lower(program, jax.devices()[:devices])
  return hlo.collectives(lowered.compile().as_text(), devices)


# Counts.


@pytest.mark.parametrize("mode", ["shard_map", "jit"])
@pytest.mark.parametrize("devices", [2, 8])
def test_a_synchronized_layer_has_one_all_reduce_forward_and_one_backward(mode, devices):
  forward = STATISTICS * (PIECES if mode == "shard_map" else 1)
  both = [hlo.Collective("all-reduce", size, devices) for size in (forward, STATISTICS)]
  assert sorted(found("layer", mode, "synchronized", devices), reverse=True) == both


@pytest.mark.parametrize("devices", [2, 8])
def test_a_local_layer_has_one_for_all_that_is_averaged(devices):
  # Its gradients of scale and bias, and its running statistics.
  one = hlo.Collective("all-reduce", 2 * STATISTICS, devices)
  assert found("layer", "shard_map", "local", devices) == [one]


@pytest.mark.parametrize(
  ("mode", "statistics", "devices"),
  [
    ("shard_map", "grouped", 4),
    ("shard_map", "grouped", 8),
    ("shard_map unchecked", "grouped by index", 8),
    ("jit", "virtual batch", 8),
  ],
)
def test_what_is_sent_in_a_group_does_not_grow_with_the_groups(mode, statistics, devices):
  ours = found("layer", mode, statistics, devices)
  forward = STATISTICS * (1 if mode == "jit" else PIECES)
  for size, number in collections.Counter((forward, STATISTICS)).items():
    assert ours.count(hlo.Collective("all-reduce", size, slices.GROUP)) == number
  # On CPUs under jit one bit more: whether any group is to be read twice.
  assert len([c for c in ours if c.bytes > 1]) == 3


def test_groups_by_index_with_the_checks_on_send_a_table_of_all_groups():
  # As docs/scaling.md says: JAX has no grouped reduction there, and these groups are few.
  sizes = [c.bytes for c in found("layer", "shard_map", "grouped by index", 8)]
  # The backward one is joined with gradients and running statistics, a number per channel each.
  assert sorted(sizes) == [2 * STATISTICS + 4 * 4 * CHANNELS, 2 * PIECES * STATISTICS]


def test_a_network_sends_the_same_on_two_devices_and_on_eight():
  counts = {}
  for mode, statistics in (("shard_map", "synchronized"), ("shard_map", "local")):
    two, eight = (found("resnet50", mode, statistics, devices) for devices in (2, 8))
    counts[statistics] = len(eight)
    assert [c._replace(members=0) for c in two] == [c._replace(members=0) for c in eight]
  assert slices.layers("resnet50") == 3
  assert counts["synchronized"] - counts["local"] <= 2 * slices.layers("resnet50")


def test_equal_collectives_are_stored_once():
  one, other = hlo.Collective("all-reduce", 8, 4, "Ring"), hlo.Collective("all-gather", 8, 4)
  assert scaling.summary([one, other, one]) == [
    ["all-gather", 8, 4, "", 1],
    ["all-reduce", 8, 4, "Ring", 2],
  ]


def test_blocks_of_chips_lie_next_to_each_other():
  Chip = collections.namedtuple("Chip", "coords")
  chips = sorted((Chip((x, y, 0)) for y in range(4) for x in range(4)), key=slices.place)
  assert [chip.coords[:2] for chip in chips[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  assert [chip.coords[:2] for chip in chips[4:8]] == [(0, 2), (0, 3), (1, 2), (1, 3)]


def test_only_what_has_changed_is_compiled_again(monkeypatch):
  def traced(statistics):
    program = slices.Program("layer", "cpu", "shard_map", statistics)
    return scaling.digest(slices.lower(program, jax.devices()))

  assert traced("local") == traced("local") != traced("synchronized")
  monkeypatch.setattr(scaling, "_compiler", lambda: "libtpu 1")
  assert scaling.known_trace({"compiler": "libtpu 1", "trace": "abc"}) == "abc"
  assert scaling.known_trace({"compiler": "libtpu 2", "trace": "abc"}) == ""
  assert scaling.known_trace(None) == ""


def test_rows_are_written_in_the_order_of_the_programs(tmp_path, monkeypatch):
  monkeypatch.setattr(stored, "FOLDER", tmp_path)
  names = [str(program) for program in slices.programs()]
  assert len(names) == len(set(names))
  scaling.write({name: {"name": name} for name in ("weak/1", names[5], names[2])})
  assert [row["name"] for row in stored.read("scaling")["rows"]] == [names[2], names[5], "weak/1"]


# What is measured.


def test_two_processes_measure_the_same_step(monkeypatch):
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")  # not what they measure is checked
  measured = weak.run(2, 1, "tiny")
  assert measured["layers"] == 3
  assert all(len(measured[kind]) == 1 < 1 + measured[kind][0] for kind in ("local", "synchronized"))


def test_ratios_are_of_neighbours_and_of_minima():
  runs = [
    {"local": [1.0, 4.0], "synchronized": [2.0, 4.0], "layers": 9},
    {"local": [2.0], "synchronized": [3.0], "layers": 9},
  ]
  row = weak.row_of(2, runs)
  assert row["samples"] == 3
  assert row["ratio_of_min"] == 2
  assert row["ratio_median"] == 1.5
  assert (row["local_median_ms"], row["synchronized_median_ms"]) == (2, 3)


def test_a_process_that_fails_says_why():
  with pytest.raises(SystemExit, match="KeyError: 'no such network'"):
    weak.run(1, 1, "no such network")


# The page.


def test_the_page_in_the_repository_is_what_the_results_make():
  results = stored.read("scaling")
  if results is None:
    pytest.skip("there are no results yet")
  with pytest.MonkeyPatch.context() as real:
    for name, network in REAL.items():
      real.setitem(slices.NETWORKS, name, network)
    page = scaling_report.page(results)
  assert scaling_report.PAGE.read_text() == page, "run python -m benchmarks.scaling_report"


REAL = dict(slices.NETWORKS)


def row(target, statistics, chips, **changes):
  collectives = [["all-reduce", 1000, chips, "", 2 if statistics == "local" else 7]]
  made = {
    "kind": "program",
    "network": "resnet50",
    "target": target,
    "mode": "shard_map",
    "statistics": statistics,
    "chips": chips,
    "layers": 3,
    "flops": 1e9,
    "bytes": 1e9,
    "memory_bytes": 1e6,
    "traced_all_reduces": 9,
    "collectives": collectives,
    "compile_s": 1.0,
    **changes,
  }
  return {"name": f"resnet50/{target}/shard_map/{statistics}", **made}


def rows():
  every = [
    row(target, statistics, chips)
    for statistics in ("local", "synchronized")
    for target, chips in (("v5e:2x2", 4), ("v5e:16x16", 256), ("v4:8x8x16", 1024))
  ]
  for target, chips in (("v5e:16x16", 256), ("v4:8x8x16", 1024)):
    sent = [["all-reduce", 1000, 4, "", 6], ["all-reduce", 1000, chips, "", 1]]
    every.append(row(target, "grouped", chips, collectives=sent))
  return every


def results():
  head = {"command": "python -m benchmarks.scaling", "date": "2020-01-01", "versions": {"jax": "1"}}
  return {**head, "rows": rows()}


def test_the_page_is_made_of_the_results_alone():
  given = results()
  before = copy.deepcopy(given)
  text = scaling_report.page(given)
  assert given == before
  assert "2020-01-01: jax 1." in text
  assert "| resnet50 | v5e:16x16 | shard_map | 3 | 2 | 7 | 1.67 | 5.0 kB | 0.0 kB |" in text
  assert "Not measured yet." in text
  # 1 GB at 819 GB/s, and seven all-reduces of 32 hops and hardly a byte.
  assert "a step, 1.2 ms of it the chip's own work, and efficiency" in text
  assert "| chips | local | groups of 4 | groups of 16 | synchronized |" in text
  assert "| 256 | 1.3 ms, 95.0% (87.7%) |" in text
  assert "| 1.4 ms, 84.5% (67.1%) |" in text


def test_what_grows_is_said_and_nothing_else():
  assert list(scaling_report.growth(rows())) == []
  every = rows()
  every[2] = row("v4:8x8x16", "local", 1024, memory_bytes=2e6)
  assert list(scaling_report.growth(every)) == [
    "resnet50, shard_map, local: memory x 2.00, from 4 to 1,024 chips."
  ]


def test_a_group_costs_what_the_model_says():
  six = scaling_report.group_cost(rows(), "v5e", 256, 4, hop=1e-6)
  assert six == pytest.approx(6 * 4e-6, rel=0.02)
  assert scaling_report.group_cost(rows(), "v5e", 256, 256) == pytest.approx(6 * 32e-6, rel=0.02)
  assert scaling_report.group_cost(rows(), "v5e", 256, 1) == 0


@pytest.mark.parametrize(("batch", "group"), [(1, 32), (3, 16), (16, 2), (32, 1), (256, 1)])
def test_a_group_has_as_few_chips_as_have_enough_examples(batch, group):
  assert scaling_report.choice(batch) == group
  assert group == 1 or group * batch < 2 * scaling_report.ENOUGH


def test_the_figure_is_drawn(tmp_path):
  (file,) = charts.draw({"scaling": results()}, tmp_path)
  assert file.name == "scaling.png"
  assert file.read_bytes().startswith(b"\x89PNG")


def test_the_stored_results_name_no_computer():
  file = stored.FOLDER / "scaling.json"
  if not file.exists():
    pytest.skip("there are no results yet")
  assert set(json.loads(file.read_text())["machine"]) == {"cpu", "cores", "system"}
