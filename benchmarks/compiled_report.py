"""What the rows of `benchmarks.compiled` say: tables, and where Flax's layer is the better one."""

from __future__ import annotations

from typing import Any

from benchmarks.networks import NETWORKS
from benchmarks.results import Row, of, tabulate

TITLES = {"h100": "H100", "v5e": "TPU v5e", "cpu": "CPU"}
CASE = ("kind", "target", "dtype", "network", "activation", "case", "how", "mask")
# The smaller the better: what it is and how it is written, and the differences, relative and
# absolute, below which two are level.
QUANTITIES = {
  "tax_MB": ("bytes moved", "{:,.0f} MB", 0.01, 1.0),
  "temp_over_none_MB": ("temporary memory", "{:,.0f} MB", 0.01, 1.0),
  "kernels": ("kernels", "{:,}", 0.0, 0.5),
  "compile_s": ("compile time", "{:.1f} s", 0.15, 0.2),
  "passes": ("bytes moved, in passes", "{:.2f}", 0.01, 0.05),
  "forward": ("all-reduces forward", "{}", 0.0, 0.5),
  "backward": ("all-reduces backward", "{}", 0.0, 0.5),
  "forward_bytes": ("bytes of all-reduces forward", "{}", 0.0, 64.0),
  "backward_bytes": ("bytes of all-reduces backward", "{}", 0.0, 64.0),
}
PROGRAMS = {
  "moves": "{MB:,.0f} MB",
  "tax": "{tax_MB:,.0f} MB",
  "tax / floor": "{tax_over_floor:.2f}",
  "memory over no norm": "{temp_over_none_MB:,.0f} MB",
  "kernels": "{kernels:,}",
  "compile time": "{compile_s:.1f} s",
}
ALL_REDUCES = {
  "forward": "{forward}",
  "bytes forward": "{forward_bytes}",
  "backward adds": "{backward}",
  "bytes added": "{backward_bytes}",
}


def parts(results: Row) -> Row:
  rows, worse = results["rows"], losses(results["rows"])
  layer = {"dtype": "{dtype}", "layer": "{case}", "norm": "{norm}"}
  shared = [
    {**row, "masked": "yes" if row["mask"] else "no"} for row in of(rows, kind="collectives")
  ]
  words = {"under": "{how}", "mask": "{masked}", "norm": "{norm}"}
  return {
    "origin": f"`{results['command']}`, {results['date']}: {_versions(results)}.",
    "skipped": "\n\n".join(row["why"] for row in of(rows, kind="skipped")),
    "programs": "\n\n".join(_programs(of(rows, kind="program"))),
    "layers": tabulate(of(rows, kind="layer"), layer, {"passes": "{passes:.2f}"}),
    "all_reduces": tabulate(shared, words, ALL_REDUCES),
    "losses": "\n".join(f"- {sentence}" for sentence in worse) or "Nowhere in these tables.",
  }


def _programs(rows: list[Row]) -> list[str]:
  """A table for each target and dtype, with its heading."""
  found = []
  for target, dtype in dict.fromkeys((row["target"], row["dtype"]) for row in rows):
    lines = [{**row, "title": title(row)} for row in of(rows, target=target, dtype=dtype)]
    table = tabulate(lines, {"network": "{title}", "norm": "{norm}"}, PROGRAMS)
    found.append(f"### {TITLES[target]}, {dtype}: a step of training\n\n{table}")
  return found


def title(row: Row, between: str = ", ") -> str:
  """The network's, and the activation's where it is none of the usual."""
  name = NETWORKS[row["network"]].title
  return name if row["activation"] == "relu" else f"{name}{between}{row['activation']}"


def case(row: Row) -> tuple[Any, ...]:
  """What two rows that differ in the norm alone have in common."""
  return tuple(row.get(key) for key in CASE)


def losses(rows: list[Row]) -> list[str]:
  """Where Flax's layer is better than ours, a sentence a case; those who compare want it said."""
  flax = {case(row): row for row in rows if row.get("norm") == "flax"}
  found = []
  for row in rows:
    if not row.get("norm", "").startswith("jaxbn") or not (theirs := flax.get(case(row))):
      continue
    worse = [
      f"{name} {shown.format(row[key])} against {shown.format(theirs[key])}"
      for key, (name, shown, relative, absolute) in QUANTITIES.items()
      if key in row and row[key] - theirs[key] > max(absolute, relative * abs(theirs[key]))
    ]
    if worse:
      found.append(f"{_name(row)}, {row['norm']}: {', '.join(worse)}.")
  return found


def _name(row: Row) -> str:
  if row["kind"] == "collectives":
    on = f"{row['devices']} devices under {row['how']}{' with a mask' * row['mask']}"
    return f"{TITLES[row['target']]} {on}"
  program = row["kind"] == "program"
  what = title(row, " ") if program else f"layer {row['case']}"
  return f"{TITLES[row['target']]} {row['dtype']} {what}"


def _versions(results: Row) -> str:
  compilers = dict.fromkeys(r["compiler"] for r in results["rows"] if "compiler" in r)
  libraries = [f"{name} {results['versions'][name]}" for name in ("jax", "flax")]
  return ", ".join([*libraries, *compilers, results["machine"]["cpu"]])
