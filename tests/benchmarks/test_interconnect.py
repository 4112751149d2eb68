"""The model of a step on many chips, on cases that one can work out by hand."""

import dataclasses
import math

import pytest

from benchmarks import interconnect
from benchmarks.interconnect import CHIPS, Step, all_reduce_seconds

V5E, V4 = CHIPS["v5e"], CHIPS["v4"]
US, MS = 1e-6, 1e-3


def test_the_roofline_is_the_slower_of_the_two():
  assert interconnect.compute_seconds(V5E, 197e9, 0) == pytest.approx(1 * MS)
  assert interconnect.compute_seconds(V5E, 197e9, 819e9 * 2 * MS) == pytest.approx(2 * MS)


@pytest.mark.parametrize(
  ("chip", "chips", "among", "hops"),
  [
    (V5E, 256, None, 2 * (8 + 8)),  # rings of 16: half way round each, there and back
    (V5E, 64, None, 2 * (7 + 7)),  # 8 of them are no ring: from end to end
    (V5E, 128, None, 2 * (7 + 8)),
    (V5E, 4, None, 2 * (1 + 1)),
    (V5E, 256, 4, 2 * (1 + 1)),
    (V5E, 256, 64, 2 * (7 + 7)),
    (V5E, 256, 2, 2),
    (V5E, 256, 1, 0),
    (V4, 1024, None, 2 * (4 + 4 + 8)),
    (V4, 64, None, 2 * (2 + 2 + 2)),
    (V4, 1024, 64, 2 * (3 + 3 + 3)),  # the same cube, not closed within a larger slice
    (V4, 4, None, 2 * (1 + 1)),
  ],
)
def test_nothing_sent_costs_the_hops(chip, chips, among, hops):
  assert all_reduce_seconds(chip, 0, chips, among) == pytest.approx(hops * US)
  assert all_reduce_seconds(chip, 0, chips, among, hop=3 * US) == pytest.approx(3 * hops * US)


@pytest.mark.parametrize(
  ("chip", "chips", "rate"),
  [(V5E, 256, 4 * 50e9), (V5E, 64, 2 * 50e9), (V5E, 128, 3 * 50e9), (V4, 1024, 6 * 45e9)],
)
def test_much_sent_costs_the_links(chip, chips, rate):
  size = 1e9
  expected = 2 * size * (chips - 1) / chips / rate
  assert all_reduce_seconds(chip, size, chips, hop=0) == pytest.approx(expected)


def test_between_pods_each_chip_sends_its_share():
  size = 256e6  # 1 MB for each chip of a pod
  within = all_reduce_seconds(V5E, size, 256)
  assert all_reduce_seconds(V5E, size, 1024) == pytest.approx(
    within + 2 * 2 * interconnect.POD_HOP + 2 * 1e6 * (3 / 4) / 3.125e9
  )
  # A group stays in its pod.
  assert all_reduce_seconds(V5E, size, 1024, 16) == all_reduce_seconds(V5E, size, 256, 16)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_slice_has_as_many_chips_as_it_says(chip):
  for chips, shape in chip.shapes.items():
    assert math.prod(shape) == chips


def test_efficiency_is_the_own_work_over_the_step():
  assert Step(3.0, 1.0).efficiency == 0.75
  assert Step(3.0, 1.0).seconds == 4


PROGRAM = {
  "target": "v5e:16x16",
  "statistics": "grouped",
  "flops": 0.0,
  "bytes": 819e9 * MS,
  # Ten within groups, and the gradients.
  "collectives": [["all-reduce", 0, 4, "", 10], ["all-reduce", 0, 256, "", 1]],
}


def test_a_prediction_by_hand():
  step = interconnect.predict(PROGRAM, 256, group=4)
  assert step.compute == pytest.approx(1 * MS)
  assert step.communication == pytest.approx((10 * 4 + 32) * US)
  larger = interconnect.predict(PROGRAM, 256, group=16)
  assert larger.communication == pytest.approx((10 * 12 + 32) * US)
  everywhere = interconnect.predict({**PROGRAM, "statistics": "synchronized"}, 256)
  assert everywhere.communication == pytest.approx(11 * 32 * US)


def test_a_group_for_a_program_without_one_is_refused():
  with pytest.raises(ValueError, match="group is 4 for a program of local statistics"):
    interconnect.predict({**PROGRAM, "statistics": "local"}, 256, group=4)
  with pytest.raises(ValueError, match="group is None"):
    interconnect.predict(PROGRAM, 256)


def test_what_is_published_stands_with_its_source():
  for chip in CHIPS.values():
    assert all(url.startswith("https://") for url in chip.sources)
  # 400 GB/s are of four links in both directions.
  assert V5E.link == 50e9
  assert dataclasses.replace(V5E, ring_of=8).rings(8)
  assert not V5E.rings(8)
