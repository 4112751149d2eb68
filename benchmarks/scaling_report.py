"""Writes docs/scaling.md and its figure from benchmarks/results/scaling.json, and nothing else.

  python -m benchmarks.scaling_report

What a chip does stands in the results; how long that takes on many is `benchmarks.interconnect`'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from benchmarks import interconnect
from benchmarks import results as stored
from benchmarks.interconnect import CHIPS, HOP, POD_HOP, SLOW_HOP, Step
from benchmarks.report import DOCS
from benchmarks.slices import GROUP, NETWORKS, TARGETS, WAYS, programs

PAGE = DOCS / "scaling.md"
FIGURE = DOCS / "scaling.png"
# The programs that the predictions are made from: on each kind of chip the largest slice.
LARGEST = {"v5e": "v5e:16x16", "v4": "v4:8x8x16"}
CHIP_COUNTS = (4, 16, 64, 256, 512, 1024, 2048)
GROUPS = (2, 4, 8, 16, 32, 64, 256)  # chips
ENOUGH = 32  # examples that a choice of group aims at, or up to four times as many
Row = dict[str, Any]


def main() -> None:
  """Writes the page and the figure."""
  results = stored.read("scaling")
  if results is None:
    raise SystemExit("There are no results yet: run `make bench-scaling` first.")
  PAGE.write_text(page(results))
  draw(results)
  Console().print(f"Wrote docs/{PAGE.name} and docs/{FIGURE.name}.")


def page(results: Row) -> str:
  """docs/scaling.md."""
  parts = [
    HEAD,
    _origin(results),
    *_counts(results["rows"]),
    *_predictions(results["rows"]),
    *_choice(results["rows"]),
    *_measured(results["rows"]),
    "## What is assumed",
    _assumptions(),
    "## Sources",
    _sources(),
  ]
  return "\n\n".join(parts) + "\n"


HEAD = """# Towards a thousand chips

Made by `python -m benchmarks.scaling_report` from benchmarks/results/scaling.json, which
`make bench-scaling` writes. No figure here is typed by hand, and none of the times of a TPU is
measured: the counts are facts about compiled programs, the times a model's."""


def _origin(results: Row) -> str:
  versions = results["versions"]
  named = [f"{name} {versions[name]}" for name in ("jax", "flax", "libtpu") if name in versions]
  return f"`{results['command']}`, {results['date']}: {', '.join(named)}."


# Counts.


def _counts(rows: list[Row]) -> Iterator[str]:
  yield "## What one chip does"
  yield COUNTS
  for network, described in NETWORKS.items():
    chosen = [row for row in rows if row["kind"] == "program" and row["network"] == network]
    if not chosen:
      continue
    shape = "x".join(map(str, described.shape))
    yield f"### {described.title}: {described.batch} of {shape} on each chip, bfloat16"
    for title, shown in TABLES.items():
      yield stored.table(_lines(chosen, title, shown), range(3, 3 + len(TARGETS)))
  if missing := list(_missing(rows)):
    yield f"Not compiled yet: {', '.join(missing)}."
  yield "### What grows with the chips"
  yield GROWTH
  yield "\n".join(f"- {sentence}" for sentence in growth(rows)) or "Nothing."
  yield "### What synchronization adds"
  yield ADDITIONS
  yield stored.table(additions(rows), range(3, 9))


COUNTS = f"""\
A step of training, or one layer forward and backward, is compiled by XLA for slices of a TPU, with
none present. The batch of each chip is the same on all of them. *Synchronized*: all chips share the
statistics of every layer; *grouped*: each square of {GROUP} chips does, as an axis of the mesh or,
*by index*, as `axis_index_groups`; *virtual batch*: as many examples as such a square has, by
`virtual_batch_size`; *local*: each chip has its own; *none*: there are no norm layers. Running
statistics that differ are averaged.

The first table has the operations between chips and the bytes that a chip puts into them. All are
all-reduces unless it says so. They are counted in the compiled program, where the compiler has
combined some into one, and, *traced*, before that (by jit there are none yet). A convolution's
gradient is summed in bfloat16, since the parameters are cast on the chips' side. The second table
has the bytes that a chip moves through its memory, which is the compiler's own count, on padded
layouts, and those that it holds there at most: arguments, results and temporaries."""


def _lines(rows: list[Row], title: str, shown: Columns) -> list[list[str]]:
  """A line for each kind of program, with a column for each slice."""
  lines = [["by", "statistics", title, *TARGETS]]
  for way in WAYS[rows[0]["network"]]:
    found = {row["target"]: row for row in rows if _way(row)[1:] == way}
    if found:
      first, each = (tuple(map(of, found.values())) for of in shown)
      cells = dict(zip(found, each, strict=True))
      lines.append([*way, first[0], *(cells.get(target, "") for target in TARGETS)])
  return lines


def _missing(rows: list[Row]) -> Iterator[str]:
  """Programs that are compiled for some slices and not for all."""
  names = {row["name"] for row in rows}
  begun = {_way(row) for row in rows if row["kind"] == "program"}
  for program in programs():
    if _way(vars(program)) in begun and str(program) not in names:
      yield str(program)


def _traced(row: Row) -> str:
  return f"{row['traced_all_reduces'] or ''}"


def _communication(row: Row) -> str:
  return f"{_operations(row)}, {_size(sent(row))}"


def _flops(row: Row) -> str:
  return f"{row['flops'] / 1e9:,.1f}"


def _memory(row: Row) -> str:
  return f"{_size(moved(row))}, {_size(held(row))}"


# What a table has in its third column, where the slices agree, and in those of the slices.
Columns = tuple[Callable[[Row], str], Callable[[Row], str]]
TABLES: dict[str, Columns] = {"traced": (_traced, _communication), "GFLOP": (_flops, _memory)}


def _operations(row: Row) -> str:
  """How many all-reduces, and whatever else there is."""
  totals: dict[str, int] = {"all-reduce": 0}
  for op, *_, count in row["collectives"]:
    totals[op] = totals.get(op, 0) + count
  others = [f"{count} {op}" for op, count in totals.items() if op != "all-reduce"]
  return ", ".join([str(totals["all-reduce"]), *others])


def count(row: Row) -> int:
  """Operations between chips."""
  return sum(one[-1] for one in row["collectives"])


def sent(row: Row) -> int:
  """Bytes that a chip puts into them."""
  return sum(size * times for _, size, _, _, times in row["collectives"])


def _size(size: float) -> str:
  for unit, name in ((1e9, "GB"), (1e6, "MB")):
    if abs(size) >= unit:
      return f"{size / unit:,.2f} {name}"
  return f"{size / 1e3:,.1f} kB"


GROWTH = """\
Operations, bytes sent and moved, and memory on the largest slice against the smallest (of more than
one group), where they are more by half a percent:"""


def growth(rows: list[Row]) -> Iterator[str]:
  """In sentences, for each program: what is more on a larger slice than on the smallest."""
  programs = [row for row in rows if row["kind"] == "program" and not _one_group(row)]
  measures = {"operations": count, "bytes sent": sent, "bytes moved": moved, "memory": held}
  for (network, mode, statistics), group in itertools.groupby(sorted(programs, key=_way), _way):
    slices = sorted(group, key=lambda row: row["chips"])
    changes = [
      f"{title} {_times(of(slices[-1]) / of(slices[0]))}"
      for title, of in measures.items()
      if of(slices[-1]) > 1.005 * of(slices[0])
    ]
    if changes:
      ends = f"from {slices[0]['chips']} to {slices[-1]['chips']:,} chips"
      name = f"{NETWORKS[network].title}, {mode}, {statistics}"
      yield f"{name}: {', '.join(changes)}, {ends}."


def _one_group(row: Row) -> bool:
  """Whether a slice is one group whole, so that there is nothing between groups."""
  return row["statistics"].startswith(("grouped", "virtual")) and row["chips"] == GROUP


def moved(row: Row) -> float:
  """Bytes that a chip moves through its memory."""
  return row["bytes"]


def held(row: Row) -> int:
  """Bytes that it keeps there at most."""
  return row["memory_bytes"]


def _way(row: Row) -> tuple[str, str, str]:
  return row["network"], row["mode"], row["statistics"]


def _times(ratio: float) -> str:
  return f"x {ratio:.2f}" if ratio < 10 else f"x {ratio:.0f}"


ADDITIONS = """\
All-reduces with local statistics, which are the gradients' and the running statistics', and with
synchronized ones; what these add is at most two for each layer, one forward and one backward."""


def additions(rows: list[Row]) -> list[list[str]]:
  """What synchronized statistics add to local ones."""
  programs = {row["name"]: row for row in rows if row["kind"] == "program"}
  lines = [["network", "slice", "by", "layers", "local", "synchronized", "for each layer"]]
  lines[0] += ["more sent", "more moved"]
  for row in programs.values():
    local = programs.get(f"{row['network']}/{row['target']}/shard_map/local")
    if row["statistics"] == "synchronized" and local:
      more = (count(row) - count(local)) / row["layers"]
      sizes = [_size(of(row) - of(local)) for of in (sent, moved)]
      named = [NETWORKS[row["network"]].title, row["target"], row["mode"], str(row["layers"])]
      lines.append([*named, str(count(local)), str(count(row)), f"{more:.2f}", *sizes])
  return lines


# Predictions.


def program_of(rows: list[Row], chip: str, statistics: str) -> Row | None:
  """The compiled ResNet that a prediction is made from."""
  wanted = f"resnet50/{LARGEST[chip]}/shard_map/{statistics}"
  return next((row for row in rows if row["name"] == wanted), None)


def steps(rows: list[Row], chip: str, chips: int, hop: float = HOP) -> dict[str, Step]:
  """The predicted step by kind of statistics, on a number of chips."""
  found = {}
  for title, statistics, group in (
    ("local", "local", None),
    (f"groups of {GROUP}", "grouped", GROUP),
    ("groups of 16", "grouped", 16),
    ("synchronized", "synchronized", None),
  ):
    program = program_of(rows, chip, statistics)
    if program and (group or 0) <= chips:
      found[title] = interconnect.predict(program, chips, group, hop)
  return found


def _predictions(rows: list[Row]) -> Iterator[str]:
  yield "## How long a step takes, and how well it scales"
  yield PREDICTIONS
  yield f"![Efficiency over chips, and the cost of a group over its size]({FIGURE.name})"
  for name, chip in CHIPS.items():
    known = [title for title in COLORS if title in steps(rows, name, max(CHIP_COUNTS))]
    if not known:
      continue
    own = steps(rows, name, max(CHIP_COUNTS))[known[0]].compute
    lines = [["chips", *known]]
    lines += [[f"{chips:,}", *_steps(rows, name, chips, known)] for chips in CHIP_COUNTS]
    yield f"### {chip.title}: a step, {1e3 * own:.1f} ms of it the chip's own work, and efficiency"
    yield stored.table(lines, range(len(lines[0])))


def _steps(rows: list[Row], chip: str, chips: int, titles: list[str]) -> Iterator[str]:
  quick, slow = steps(rows, chip, chips), steps(rows, chip, chips, SLOW_HOP)
  for title in titles:
    if title in quick:
      step = quick[title]
      worse = slow[title].efficiency
      yield f"{1e3 * step.seconds:.1f} ms, {step.efficiency:.1%} ({worse:.1%})"
    else:
      yield ""


PREDICTIONS = f"""\
ResNet-50's step from the counts above: the larger of the time that its FLOPs take at the chip's
peak and the time that its bytes take at its memory's bandwidth, and after that its all-reduces, one
after another, each by latency and bandwidth. Efficiency is that of weak scaling: the chip's own
work over the step. Local statistics have no all-reduces but those of the gradients and of the
running statistics, so that what they lose is every data-parallel trainer's loss. In parentheses the
efficiency where a hop takes {SLOW_HOP / HOP:.1f} times as long."""


# The choice of a group.


def group_cost(rows: list[Row], chip: str, chips: int, group: int, hop: float = HOP) -> float:
  """Seconds that the all-reduces within groups add to a step; all chips are a group too."""
  program = program_of(rows, chip, "grouped")
  if program is None:
    return math.nan
  shared = [c for c in program["collectives"] if c[2] == GROUP]
  among = None if group >= chips else group
  seconds = (
    times * interconnect.all_reduce_seconds(CHIPS[chip], size, chips, among, hop)
    for _, size, _, _, times in shared
  )
  return sum(seconds)


def _choice(rows: list[Row]) -> Iterator[str]:
  yield "## Which group to choose"
  yield CHOICE
  if program_of(rows, "v5e", "grouped") is None or program_of(rows, "v4", "grouped") is None:
    return
  yield stored.table(_cost_lines(rows), range(6))
  yield LITERATURE
  yield stored.table(_choice_lines(rows), range(6))
  yield ADVICE


WHERE = {"v5e": 256, "v4": 1024}  # chips: on which slices the tables of groups are


def _added(rows: list[Row], group: int) -> Iterator[str]:
  """What a group adds to a step, on each of the slices, and what share that is of a local step."""
  for chip, chips in WHERE.items():
    program = program_of(rows, chip, "local")
    if group > chips or not program:
      yield ""
    else:
      seconds = group_cost(rows, chip, chips, group)
      share = seconds / interconnect.predict(program, chips).seconds
      yield f"{1e3 * seconds:.2f} ms, {share:.1%}"


def _headings() -> list[str]:
  return [f"adds on {chips:,} {CHIPS[chip].title}" for chip, chips in WHERE.items()]


def _error(examples: int) -> str:
  return f"{1 / math.sqrt(examples):.1%}"


def _cost_lines(rows: list[Row]) -> list[list[str]]:
  lines = [["chips in a group", "examples", "error of the mean", *_headings()]]
  batch = NETWORKS["resnet50"].batch
  for group in (1, *GROUPS, 1024):
    examples = group * batch
    lines.append([f"{group:,}", f"{examples:,}", _error(examples), *_added(rows, group)])
  return lines


def choice(batch: int) -> int:
  """Chips of a group, a power of two, for a batch on each: as few as have enough examples."""
  return 2 ** max(0, math.ceil(math.log2(ENOUGH / batch)))


def _choice_lines(rows: list[Row]) -> list[list[str]]:
  lines = [["batch of a chip", "share among", "examples", "error of the mean"]]
  lines[0] += _headings()
  for batch in (1, 2, 4, 8, 16, 32, 64, 128):
    group = choice(batch)
    added = [1e3 * group_cost(rows, chip, chips, group) for chip, chips in WHERE.items()]
    among = f"{group} chips" if group > 1 else "none"
    cells = [str(batch), among, str(group * batch), _error(group * batch)]
    lines.append([*cells, *(f"{ms:.2f} ms" for ms in added)])
  return lines


_BATCH = NETWORKS["resnet50"].batch
CHOICE = f"""\
What a group costs is latency: its all-reduces are of some kilobytes, and there are two for every
layer. So it costs by the hops across the group, not by the bytes. What it buys is statistics of
more examples. The error of a mean over V examples is 1 / sqrt(V) standard deviations at most, which
it is where the positions of an example agree. The first table has it for {_BATCH} examples on each
chip, and what the group adds to a step, in milliseconds and of a step with local statistics."""

LITERATURE = f"""\
What statistics are good for has been measured by others, on ImageNet unless it says otherwise:

- Few examples are bad. ResNet-50's error is 23.6 % with statistics of 32 examples, 23.7 of 16, 24.8
  of 8, 27.3 of 4 and 34.7 of 2 (Wu & He 2018). Batch renormalization was made for small batches and
  for those that are not drawn independently (Ioffe 2017).
- Very many are not better. Goyal et al. (2017) keep statistics of 32 whatever the number of
  workers, so that the loss stays the same function, and lose nothing up to batches of 8192. With
  large batches, statistics of 128 examples at a time generalize better than those of all of them
  (Hoffer et al. 2017, "ghost batches").
- Where a device holds one or two images, as in detection, statistics must be shared between devices
  (Peng et al. 2018).
- On 1024 chips with small batches on each, groups of chips shared them, not all (Ying et al. 2018).

So the second table shares among as few neighbouring chips as have {ENOUGH} examples. What that adds
does not depend on the batch, since what is sent does not."""

ADVICE = f"""\
In short: share among as few neighbouring chips as have {ENOUGH} examples, and at most among as many
as have {4 * ENOUGH}. A chip with {ENOUGH} or more needs no sharing, unless one result on any number
of devices is wanted, for which the first table has the price. A chip with many more than
{4 * ENOUGH} can cut its batch, which sends nothing. Keep a group within a pod.

As an axis of the mesh, `axis_name="member"` over `("group", "member")`, a group costs the same on
any slice. As `axis_index_groups` it does so too; but under shard_map with its checks on JAX has no
grouped reduction, and jaxbn gathers within the groups where they are smaller than they are many,
and else sums a table with a row for each group."""


# What was measured.


def _measured(rows: list[Row]) -> Iterator[str]:
  weak = [row for row in rows if row["kind"] == "weak"]
  yield "## Measured here: one process and two"
  if not weak:
    yield "Not measured yet."
    return
  one = weak[0]
  load = max(row["load"] for row in weak)
  yield (
    f"A small ResNet with {one['layers']} norm layers, {one['batch']} images for each process, one "
    f"core each; two processes talk by gloo over loopback. {one['samples']} samples of "
    f"{one['steps']} steps with each kind of statistics, in turns. The ratio is of the step with "
    "synchronized statistics to the one with local statistics; both sum the gradients. The load "
    f"average before a run was at most {load:.1f}."
  )
  lines = [["processes", "local, min", "median", "synchronized, min", "median"]]
  lines[0] += ["ratio of minima", "median of ratios", "efficiency, local", "synchronized"]
  for row in weak:
    times = [row[f"{s}_{m}_ms"] for s in ("local", "synchronized") for m in ("min", "median")]
    ratios = [row["ratio_of_min"], row["ratio_median"]]
    shares = [row["efficiency_local"], row["efficiency_synchronized"]]
    lines.append(
      [
        str(row["processes"]),
        *(f"{t:.1f} ms" for t in times),
        *(f"{r:.3f}" for r in ratios),
        *(f"{share:.1%}" for share in shares),
      ]
    )
  yield stored.table(lines, range(9))
  yield (
    "Efficiency is the shortest local step of one process over the shortest step here. What two "
    "processes lose with either kind is the sum of the gradients over gloo, and the cores' waiting "
    "for memory and for what else the machine does; a TPU's links are another matter."
  )
  if min(row["ratio_median"] for row in weak) < 0.95:
    yield (
      "A ratio below 1 says that the synchronized step was the faster one. It is no merit of "
      "synchronization, and its cause has not been established. The programs differ in one more "
      "thing: with local statistics all gradients are summed by one all-reduce at the end, with "
      "synchronized ones by more and smaller ones. So this measurement shows no cost of "
      "synchronizing over loopback, and is no measure of one elsewhere."
    )


# Assumptions and sources.


def _assumptions() -> str:
  slices = ", ".join(LARGEST.values())
  v5e = CHIPS["v5e"]
  return f"""\
- A chip's own work takes what the roofline says, the least it can: at the peak, at the whole
  bandwidth, and with the compiler's count of bytes. A slower chip would make every efficiency here
  better.
- Nothing overlaps: every all-reduce waits for the one before it, the gradients' too. Those of the
  statistics must wait in truth; those of the gradients need not.
- A hop from chip to chip takes {HOP * 1e6:.0f} µs whatever it carries. That is an assumption
  (Austin et al. call it typical); their own profile of a small gather makes it {1e6 * SLOW_HOP:.1f}
  µs, which the parentheses above and the bands of the figure take.
- An all-reduce is a reduce-scatter and an all-gather over all axes of the torus at once. For the
  smallest in small groups the compiler names a ring of a single phase, which has fewer hops there.
- An axis is closed to a ring on a v5e at {v5e.ring_of} chips and on a v4 at multiples of
  {CHIPS["v4"].ring_of}; a block shorter than the axis is not.
- More than {v5e.pod} v5e chips are several pods, between which each chip has its share of the pod's
  network ({v5e.between_pods / 1e9:.1f} GB/s) and a hop takes {POD_HOP * 1e6:.0f} µs, for which
  there is no source, in a number that grows as the logarithm of the pods.
- The program on any number of chips is that of the largest slice compiled ({slices}),
  since it does not change with the chips. What is sent within groups of {GROUP} chips there is
  taken to be sent within groups of another size.
- Input, the host, stragglers and failures are not in it."""


def _sources() -> str:
  lines = [["", "peak", "memory", "link, one way", "links along", "source"]]
  lines += [
    [
      chip.title,
      f"{chip.flops / 1e12:.0f} TFLOP/s",
      f"{chip.memory_rate / 1e9:.0f} GB/s",
      f"{chip.link / 1e9:.0f} GB/s",
      f"{len(chip.shapes[4])} axes",
      " ".join(f"[{n}]({url})" for n, url in enumerate(chip.sources, 1)),
    ]
    for chip in CHIPS.values()
  ]
  return f"{stored.table(lines, range(1, 5))}\n\n{REFERENCES}"


REFERENCES = f"""\
- J. Austin et al., [How to scale your model]({interconnect.SCALING_BOOK}), 2025: links, hops and
  the cost of collectives on TPUs.
- S. Williams, A. Waterman, D. Patterson,
  [Roofline](https://doi.org/10.1145/1498765.1498785), 2009.
- R. Thakur, R. Rabenseifner, W. Gropp, [Optimization of collective communication operations in
  MPICH](https://doi.org/10.1177/1094342005051521), 2005.
- N. Jouppi et al., [TPU v4](https://arxiv.org/abs/2304.01433), 2023: the torus.
- S. Ioffe, [Batch renormalization](https://arxiv.org/abs/1702.03275), 2017.
- P. Goyal et al., [Accurate, large minibatch SGD](https://arxiv.org/abs/1706.02677), 2017.
- E. Hoffer, I. Hubara, D. Soudry,
  [Train longer, generalize better](https://arxiv.org/abs/1705.08741), 2017.
- C. Peng et al., [MegDet](https://arxiv.org/abs/1711.07240), 2018.
- Y. Wu, K. He, [Group normalization](https://arxiv.org/abs/1803.08494), 2018.
- C. Ying et al., [Image classification at supercomputer scale](https://arxiv.org/abs/1811.06992),
  2018."""


# The figure.

COLORS = {
  "local": "#8a8a8a",
  f"groups of {GROUP}": "#4c86b8",
  "groups of 16": "#7fb069",
  "synchronized": "#c8452c",
}


def draw(results: Row) -> None:
  """Writes the figure: efficiency over chips on each kind, and a group's cost over its size."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 4.4), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)  # no window system, no global state
  batch, quick, slow = NETWORKS["resnet50"].batch, 1e6 * HOP, 1e6 * SLOW_HOP
  figure.suptitle(
    f"Predicted: ResNet-50, {batch} images on each chip, {quick:.0f} (line) to {slow:.1f} µs a hop"
  )
  *efficiencies, cost = figure.subplots(1, 3)
  for axes, (name, chip) in zip(efficiencies, CHIPS.items(), strict=True):
    _efficiencies(axes, results["rows"], name)
    axes.set_title(chip.title, fontsize=10)
  efficiencies[0].legend(frameon=False, fontsize=8, loc="lower left")
  _costs(cost, results["rows"])
  figure.savefig(FIGURE)


def _efficiencies(axes: Any, rows: list[Row], name: str) -> None:
  counts = [n for n in CHIP_COUNTS if n >= GROUP]
  quick = {n: steps(rows, name, n) for n in counts}
  slow = {n: steps(rows, name, n, SLOW_HOP) for n in counts}
  for title, color in COLORS.items():
    at = [n for n in counts if title in quick[n]]
    best = [100 * quick[n][title].efficiency for n in at]
    worst = [100 * slow[n][title].efficiency for n in at]
    axes.plot(at, best, color=color, marker="o", markersize=3, label=title)
    axes.fill_between(at, worst, best, color=color, alpha=0.15, linewidth=0)
  if CHIPS[name].pod < max(counts):
    axes.axvline(CHIPS[name].pod, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("one pod ", (CHIPS[name].pod, 3), ha="right", fontsize=8)
  _chip_axis(axes, counts, "chips")
  axes.set_ylabel("weak-scaling efficiency, %")
  axes.set_ylim(0, 102)


def _costs(axes: Any, rows: list[Row]) -> None:
  for (name, chips), color in zip(WHERE.items(), ("#7a1f10", "#2f4b6e"), strict=True):
    groups = [n for n in (*GROUPS, 1024) if n <= chips]
    quick = [1e3 * group_cost(rows, name, chips, n) for n in groups]
    slow = [1e3 * group_cost(rows, name, chips, n, SLOW_HOP) for n in groups]
    label = f"{chips:,} {CHIPS[name].title}"
    axes.plot(groups, quick, color=color, marker="o", markersize=3, label=label)
    axes.fill_between(groups, quick, slow, color=color, alpha=0.15, linewidth=0)
  _chip_axis(axes, [*GROUPS, 1024], "chips in a group")
  axes.set_ylabel("added to a step, ms")
  axes.set_ylim(bottom=0)
  axes.set_title("What a group costs", fontsize=10)
  axes.legend(frameon=False, fontsize=8, loc="upper left")


def _chip_axis(axes: Any, counts: list[int], label: str) -> None:
  axes.set_xscale("log", base=2)
  axes.set_xticks(counts, [str(n) for n in counts], fontsize=8, rotation=45)
  axes.minorticks_off()
  axes.set_xlabel(label)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
  main()
