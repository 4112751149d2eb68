"""Writes docs/scaling.md and its figure from benchmarks/results/scaling.json and docs/templates.

  python -m benchmarks.scaling_report

What a chip does stands in the results; how long that takes on many is `benchmarks.interconnect`'s.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterator

from benchmarks import interconnect
from benchmarks import results as stored
from benchmarks.interconnect import CHIPS, HOP, POD_HOP, SLOW_HOP, Step
from benchmarks.results import Row, of, tabulate
from benchmarks.slices import GROUP, NETWORKS, TARGETS, WAYS, programs

PAGE = stored.ROOT / "docs" / "scaling.md"
# The programs that the predictions are made from: on each kind of chip the largest slice.
LARGEST = {"v5e": "v5e:16x16", "v4": "v4:8x8x16"}
CHIP_COUNTS = (4, 16, 64, 256, 512, 1024, 2048)
GROUPS = (2, 4, 8, 16, 32, 64, 256)  # chips
WHERE = {"v5e": 256, "v4": 1024}  # chips: on which slices the tables of groups are
ADDS = [f"adds on {chips:,} {CHIPS[chip].title}" for chip, chips in WHERE.items()]
ENOUGH = 32  # examples that a choice of group aims at, or up to four times as many


def main() -> None:
  from benchmarks import charts  # which draws what this module computes

  results = stored.read("scaling")
  if results is None:
    raise SystemExit("There are no results yet: run `make bench-scaling` first.")
  PAGE.write_text(page(results))
  charts.draw({"scaling": results}, PAGE.parent)
  print(f"Wrote docs/{PAGE.name} and docs/scaling.png.")


def page(results: Row) -> str:
  rows, versions = results["rows"], results["versions"]
  named = [f"{name} {versions[name]}" for name in ("jax", "flax", "libtpu") if name in versions]
  needed = [(chip, statistics) for chip in WHERE for statistics in ("local", "grouped")]
  whole = all(program_of(rows, *one) for one in needed)
  v5e, v4 = CHIPS["v5e"], CHIPS["v4"]
  return stored.fill(
    "scaling",
    {
      "origin": f"`{results['command']}`, {results['date']}: {', '.join(named)}.",
      "group": GROUP,
      "counts": "\n\n".join(_counts(rows)),
      "growth": "\n".join(f"- {sentence}" for sentence in growth(rows)) or "Nothing.",
      "additions": additions(rows),
      "predictions": "\n\n".join(_predictions(rows)),
      "batch": NETWORKS["resnet50"].batch,
      "costs": _costs(rows) if whole else "Not compiled yet.",
      "choices": _choices(rows) if whole else "Not compiled yet.",
      "enough": ENOUGH,
      "four_times_enough": 4 * ENOUGH,
      "measured": _measured(of(rows, kind="weak")),
      "hop": f"{1e6 * HOP:.0f}",
      "slow_hop": f"{1e6 * SLOW_HOP:.1f}",
      "slower": f"{SLOW_HOP / HOP:.1f}",
      "pod_hop": f"{1e6 * POD_HOP:.0f}",
      "v5e_ring": v5e.ring_of,
      "v4_ring": v4.ring_of,
      "pod": v5e.pod,
      "between_pods": f"{v5e.between_pods / 1e9:.1f}",
      "largest": ", ".join(LARGEST.values()),
      "chips": _chips(),
      "book": interconnect.SCALING_BOOK,
    },
  )


# Counts.

# What is counted of a chip: operations between chips, the bytes that it puts into them, and those
# that it moves through its memory and keeps there at most.
MEASURES: dict[str, Callable[[Row], float]] = {
  "operations": lambda row: sum(times for *_, times in row["collectives"]),
  "bytes sent": lambda row: sum(size * times for _, size, _, _, times in row["collectives"]),
  "bytes moved": lambda row: row["bytes"],
  "memory": lambda row: row["memory_bytes"],
}


def _counts(rows: list[Row]) -> Iterator[str]:
  every = of(rows, kind="program")
  for network, described in NETWORKS.items():
    if chosen := of(every, network=network):
      shape = "x".join(map(str, described.shape))
      yield f"### {described.title}: {described.batch} of {shape} on each chip, bfloat16"
      yield _by_slice(chosen, "traced", lambda row: f"{row['traced_all_reduces'] or ''}", _sent)
      yield _by_slice(
        chosen,
        "GFLOP",
        lambda row: f"{row['flops'] / 1e9:,.1f}",
        lambda row: f"{_size(row['bytes'])}, {_size(row['memory_bytes'])}",
      )
  names, begun = {row["name"] for row in rows}, {_way(row) for row in every}
  missing = [str(p) for p in programs() if _way(p._asdict()) in begun and str(p) not in names]
  if missing:  # what is compiled for some slices and not for all
    yield f"Not compiled yet: {', '.join(missing)}."


def _by_slice(
  rows: list[Row], title: str, first: Callable[[Row], str], each: Callable[[Row], str]
) -> str:
  """A line for each kind of program: what the slices agree in, and a column for each of them."""
  lines = [["by", "statistics", title, *TARGETS]]
  for mode, statistics in WAYS[rows[0]["network"]]:
    if found := {row["target"]: row for row in of(rows, mode=mode, statistics=statistics)}:
      cells = [each(found[target]) if target in found else "" for target in TARGETS]
      lines.append([mode, statistics, first(next(iter(found.values()))), *cells])
  return stored.table(lines, range(3, 3 + len(TARGETS)))


def _sent(row: Row) -> str:
  """How many all-reduces, and whatever else there is, and the bytes."""
  totals = collections.Counter({"all-reduce": 0})
  for op, *_, times in row["collectives"]:
    totals[op] += times
  others = [f"{times} {op}" for op, times in totals.items() if op != "all-reduce"]
  return ", ".join([str(totals["all-reduce"]), *others, _size(MEASURES["bytes sent"](row))])


def _size(size: float) -> str:
  for unit, name in ((1e9, "GB"), (1e6, "MB")):
    if abs(size) >= unit:
      return f"{size / unit:,.2f} {name}"
  return f"{size / 1e3:,.1f} kB"


def _way(row: Row) -> tuple[str, str, str]:
  return row["network"], row["mode"], row["statistics"]


def growth(rows: list[Row]) -> Iterator[str]:
  """In sentences, for each program: what is more on a larger slice than on the smallest."""
  several = [
    row
    for row in of(rows, kind="program")  # but for slices that are one group whole
    if not (row["statistics"].startswith(("grouped", "virtual")) and row["chips"] == GROUP)
  ]
  for (network, *way), group in itertools.groupby(sorted(several, key=_way), _way):
    slices = sorted(group, key=lambda row: row["chips"])
    small, large = slices[0], slices[-1]
    ratios = {title: of(large) / of(small) for title, of in MEASURES.items()}
    changes = [f"{title} x {r:.{2 if r < 10 else 0}f}" for title, r in ratios.items() if r > 1.005]
    if changes:
      changes.append(f"from {small['chips']} to {large['chips']:,} chips")
      yield f"{', '.join([NETWORKS[network].title, *way])}: {', '.join(changes)}."


def additions(rows: list[Row]) -> str:
  """What synchronized statistics add to local ones."""
  counts = ["layers", "local", "synchronized", "for each layer", "more sent", "more moved"]
  lines = [["network", "slice", "by", *counts]]
  for row in of(rows, kind="program", statistics="synchronized"):
    for local in of(rows, name=f"{row['network']}/{row['target']}/shard_map/local"):
      before, after = MEASURES["operations"](local), MEASURES["operations"](row)
      sizes = [
        MEASURES[title](row) - MEASURES[title](local) for title in ("bytes sent", "bytes moved")
      ]
      figures = [row["layers"], before, after, f"{(after - before) / row['layers']:.2f}"]
      names = [NETWORKS[row["network"]].title, row["target"], row["mode"]]
      lines.append([*names, *map(str, figures), *map(_size, sizes)])
  return stored.table(lines, range(3, 9))


# Predictions.


def program_of(rows: list[Row], chip: str, statistics: str) -> Row | None:
  """The compiled ResNet that a prediction is made from."""
  found = of(rows, name=f"resnet50/{LARGEST[chip]}/shard_map/{statistics}")
  return found[0] if found else None


# Which chips share, by title: what was compiled, and of how many chips the groups are.
SHARING = {
  "local": ("local", None),
  f"groups of {GROUP}": ("grouped", GROUP),
  "groups of 16": ("grouped", 16),
  "synchronized": ("synchronized", None),
}


def steps(rows: list[Row], chip: str, chips: int, hop: float = HOP) -> dict[str, Step]:
  """The predicted step by kind of statistics, on a number of chips."""
  found = {}
  for title, (statistics, group) in SHARING.items():
    program = program_of(rows, chip, statistics)
    if program and (group or 0) <= chips:
      found[title] = interconnect.predict(program, chips, group, hop)
  return found


def _predictions(rows: list[Row]) -> Iterator[str]:
  for name, chip in CHIPS.items():
    largest = steps(rows, name, max(CHIP_COUNTS))
    lines = [["chips", *largest]]
    for chips in CHIP_COUNTS:
      quick, slow = steps(rows, name, chips), steps(rows, name, chips, SLOW_HOP)
      cells = {
        title: f"{1e3 * step.seconds:.1f} ms, {step.efficiency:.1%} ({slow[title].efficiency:.1%})"
        for title, step in quick.items()
      }
      lines.append([f"{chips:,}", *(cells.get(title, "") for title in largest)])
    if largest:
      own = 1e3 * next(iter(largest.values())).compute
      yield f"### {chip.title}: a step, {own:.1f} ms of it the chip's own work, and efficiency"
      yield stored.table(lines, range(len(lines[0])))


# The choice of a group.


def group_cost(rows: list[Row], chip: str, chips: int, group: int, hop: float = HOP) -> float:
  """Seconds that the all-reduces within groups add to a step; all chips are a group too."""
  program = program_of(rows, chip, "grouped")
  if program is None:
    return math.nan
  among = None if group >= chips else group
  return sum(
    times * interconnect.all_reduce_seconds(CHIPS[chip], size, chips, among, hop)
    for _, size, members, _, times in program["collectives"]
    if members == GROUP
  )


def choice(batch: int) -> int:
  """Chips of a group, a power of two, for a batch on each: as few as have enough examples."""
  return 2 ** max(0, math.ceil(math.log2(ENOUGH / batch)))


def _costs(rows: list[Row]) -> str:
  """What groups of each size cost on either slice, in time and as a share of a local step."""
  lines = [["chips in a group", "examples", "error of the mean", *ADDS]]
  local = {chip: steps(rows, chip, chips)["local"].seconds for chip, chips in WHERE.items()}
  for group in (1, *GROUPS, 1024):
    examples = group * NETWORKS["resnet50"].batch
    added = {chip: group_cost(rows, chip, chips, group) for chip, chips in WHERE.items()}
    cells = [
      f"{1e3 * added[chip]:.2f} ms, {added[chip] / local[chip]:.1%}" if group <= chips else ""
      for chip, chips in WHERE.items()
    ]
    lines.append([f"{group:,}", f"{examples:,}", f"{1 / math.sqrt(examples):.1%}", *cells])
  return stored.table(lines, range(6))


def _choices(rows: list[Row]) -> str:
  lines = [["batch of a chip", "share among", "examples", "error of the mean", *ADDS]]
  for batch in (1, 2, 4, 8, 16, 32, 64, 128):
    group = choice(batch)
    among = f"{group} chips" if group > 1 else "none"
    added = [1e3 * group_cost(rows, chip, chips, group) for chip, chips in WHERE.items()]
    error = f"{1 / math.sqrt(group * batch):.1%}"
    lines.append([str(batch), among, str(group * batch), error, *(f"{ms:.2f} ms" for ms in added)])
  return stored.table(lines, range(6))


# What was measured, and what is assumed.

WEAK = {
  "processes": "{processes}",
  "local, min": "{local_min_ms:.1f} ms",
  "median": "{local_median_ms:.1f} ms",
  "synchronized, min": "{synchronized_min_ms:.1f} ms",
  "its median": "{synchronized_median_ms:.1f} ms",
  "ratio of minima": "{ratio_of_min:.3f}",
  "median of ratios": "{ratio_median:.3f}",
  "efficiency, local": "{efficiency_local:.1%}",
  "synchronized": "{efficiency_synchronized:.1%}",
}


def _measured(rows: list[Row]) -> str:
  if not rows:
    return "Not measured yet."
  faster = min(row["ratio_median"] for row in rows) < 0.95
  load = f"{max(row['load'] for row in rows):.1f}"
  parts = rows[0] | {"load": load, "table": tabulate(rows, {}, WEAK)}
  parts["faster"] = stored.fill("scaling-faster", {}) if faster else ""
  return stored.fill("scaling-measured", parts).strip()


def _chips() -> str:
  lines = [["", "peak", "memory", "link, one way", "links along", "source"]]
  for chip in CHIPS.values():
    rates = [f"{chip.flops / 1e12:.0f} TFLOP/s", f"{chip.memory_rate / 1e9:.0f} GB/s"]
    links = [f"{chip.link / 1e9:.0f} GB/s", f"{len(chip.shapes[4])} axes"]
    sources = " ".join(f"[{n}]({url})" for n, url in enumerate(chip.sources, 1))
    lines.append([chip.title, *rates, *links, sources])
  return stored.table(lines, range(1, 5))


if __name__ == "__main__":
  main()
