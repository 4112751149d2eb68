"""The report: findings and what was measured of each layer, as text, JSON and HTML."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxbn.diagnostics._finding import Finding
from jaxbn.diagnostics._html import page, shown
from jaxbn.diagnostics._watch import PERCENTILES, Moment, middle

if TYPE_CHECKING:
  from jaxbn.diagnostics._facts import Facts, LayerFacts

PARTED = 0.5  # standard deviations: what is as large as the signal's half is no rounding
_SHOWN = 48  # channels in a picture


@dataclasses.dataclass(frozen=True)
class Report:
  """What `diagnose` found; `print(report)` shows it.

  Attributes:
    findings: a tuple of `Finding`, the worst first.
    layers: of each layer, in the order of their calls, what was measured, in plain numbers: drift
      and drift_of_a_batch (nats per element), distance (between its outputs in training and in
      evaluation mode, in standard deviations), elements (how many independent ones a batch is
      worth), gradient (its norm at the output), channels (means and standard deviations: data's
      and running), history (percentiles of its input, after each step that was reported).
    run: steps, number of batches, rows of the largest, and not_looked_for: by fault the argument
      of `diagnose` that was not given and without which it cannot be seen.

  >>> import jaxbn.diagnostics
  >>> report = jaxbn.diagnostics.Report((), (), {"steps": None, "batches": 8, "rows": 64})
  >>> print(report)
  Nothing is wrong with 0 layers, as far as 8 batches of 64 show.
  >>> report.ok, report.exit_status
  (True, 0)
  """

  findings: tuple[Finding, ...]
  layers: tuple[Mapping[str, Any], ...]
  run: Mapping[str, Any]

  @property
  def ok(self) -> bool:
    """Whether there is neither an error nor a warning."""
    return all(finding.severity == "note" for finding in self.findings)

  @property
  def exit_status(self) -> int:
    """For a process: 0 if ok, else 1."""
    return 0 if self.ok else 1

  @property
  def parts(self) -> str | None:
    """The first layer whose outputs in training and in evaluation part by half a deviation."""
    return next((v["path"] for v in self.layers if not v["distance"] <= PARTED), None)

  @property
  def unseen(self) -> str:
    """A sentence of what was not looked for, and what would show it; empty if there is nothing."""
    needed = self.run.get("not_looked_for", {})
    arguments = {need: [f for f in needed if needed[f] == need] for need in needed.values()}
    each = (f"{' and '.join(faults)} (give {need})" for need, faults in arguments.items())
    return f"Not looked for: {', '.join(each)}." if needed else ""

  def __str__(self) -> str:
    return "\n".join([*_headline(self), *_told(self, str), *_rest(self)])

  def brief(self) -> str:
    """The headline, and a line for each fault."""
    return "\n".join([*_headline(self), *(_title(*group) for group in self.grouped())])

  def __rich__(self) -> str:
    """The same in colours, where rich prints it."""

    def bold(text: str) -> str:
      return f"[bold]{_escaped(text)}[/bold]"

    lines = [*map(bold, _headline(self)), *_told(self, bold), *map(_escaped, _rest(self))]
    return "\n".join(lines)

  def to_json(self) -> str:
    """All of it, for machines; `from_json` reads it. What is not finite is null."""
    findings = [finding._asdict() for finding in self.findings]
    whole: dict[str, Any] = {"ok": self.ok, "parts": self.parts, "findings": findings}
    whole |= {"layers": self.layers, "run": self.run}
    return json.dumps(_finite(whole), indent=1, allow_nan=False)

  @classmethod
  def from_json(cls, text: str) -> Report:
    """What `to_json` wrote."""
    read = json.loads(text)
    findings = tuple(Finding(**finding) for finding in read["findings"])
    layers = tuple({**v, "distance": _number(v["distance"])} for v in read["layers"])
    return cls(findings, layers, read["run"])

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes JSON; whoever reads the file meanwhile finds the old one or the new one."""
    _write(path, self.to_json())

  def save_html(self, path: str | os.PathLike[str]) -> None:
    """Writes one page with pictures of each layer, which needs no network."""
    _write(path, page(self))

  def grouped(self) -> list[tuple[Finding, list[str]]]:
    """The first finding of each fault, and the layers that have it."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in self.findings:
      groups.setdefault((finding.fault, finding.severity), []).append(finding)
    return [(found[0], list(dict.fromkeys(f.layer for f in found))) for found in groups.values()]


def report_of(
  facts: Facts,
  findings: Sequence[Finding],
  unseen: Mapping[str, str],
  history: Mapping[str, Sequence[Any]],
) -> Report:
  rows = max(facts.rows)
  run: dict[str, Any] = {"steps": facts.steps, "batches": len(facts.rows), "rows": rows}
  run["not_looked_for"] = dict(unseen)
  layers = [_measured(v, facts.steps, history.get(v.layer.path, [])) for v in facts.layers]
  return Report(tuple(findings), tuple(layers), run)


def up_to(step: int | None, history: Sequence[Any]) -> list[Any]:
  """What was noted before a step: later rows are of a run that went on from here once more."""
  return [row for row in history if None in (step, row["step"]) or row["step"] < step]


def _measured(v: LayerFacts, step: int | None, history: Sequence[Any]) -> dict[str, Any]:
  x = np.concatenate([seen.x for seen in v.training])
  order = np.argsort(v.data.mean)
  shown = order[np.linspace(0, order.size - 1, min(_SHOWN, order.size)).astype(int)]
  unit = history[0]["channel"] if history else int(middle(v.data.mean))
  with np.errstate(all="ignore"):
    channels = {
      "index": shown,
      "mean": v.data.mean[shown],
      "std": np.sqrt(v.data.var[shown]),
      "running_mean": v.running.mean[shown],
      "running_std": np.sqrt(v.running.var[shown]),
    }
    several = len(v.training) > 1
    elements = min(1 / np.nanmean(v.noise), np.max(v.batches.count)) if several else float("nan")
    now = Moment(
      unit,
      np.percentile(x[:, unit], PERCENTILES),
      v.running.mean[unit],
      np.sqrt(v.running.var[unit]),
    )
  if step is None and history:  # where the picture shows it
    step = history[-1]["step"]
  gradient = None if v.gradient is None else float(np.sqrt(np.sum(v.gradient)))
  return {
    "path": v.layer.path,
    "kind": v.layer.kind.__name__,
    "calls": v.layer.calls,
    "dtype": str(v.dtype),
    "size": v.data.var.size,
    "momentum": v.momentum,
    "drift": v.drift,
    "drift_of_a_batch": v.drift_of_a_batch,
    "distance": v.distance,
    "elements": float(elements),
    "gradient": gradient,
    "channels": {name: values.tolist() for name, values in channels.items()},
    "history": [*up_to(step, history), now.row(step)],
  }


def _headline(report: Report) -> list[str]:
  seen = f"{report.run['batches']} batches of {report.run['rows']}"
  number = len(report.layers)
  layers = f"{number} layer{'s' * (number != 1)}"
  if not report.findings:
    return [f"Nothing is wrong with {layers}, as far as {seen} show."]
  counted = collections.Counter(finding.severity for finding, _ in report.grouped())
  said = ", ".join(f"{n} {s}{'s' * (n > 1)}" for s, n in counted.items())
  lines = [f"{said}; {layers}, {seen}."]
  if report.parts is not None:
    lines += [f"Training and evaluation part at {report.parts or '(the top)'}."]
  return lines


def _told(report: Report, title: Any) -> list[str]:
  escaped = str if title is str else _escaped
  lines = []
  for finding, layers in report.grouped():
    lines += ["", title(_title(finding, layers))]
    lines += map(
      escaped, textwrap.wrap(finding.evidence, 96, initial_indent="  ", subsequent_indent="  ")
    )
    lines += [escaped(f"    {line}") for line in finding.mend.split("\n")]
  return lines


def _rest(report: Report) -> list[str]:
  unseen = ["", *textwrap.wrap(report.unseen, 98)] if report.unseen else []
  return [*unseen, *_table(report.layers)]


def _title(finding: Finding, layers: Sequence[str]) -> str:
  where = finding.layer or "(the top)"
  if len(layers) > 1:
    where += f" and {len(layers) - 1} more"
  return f"{finding.severity}: {finding.fault} in {where} ({finding.sure})"


_COLUMNS = {
  "drift": "drift",
  "drift_of_a_batch": "of a batch",
  "distance": "distance",
  "elements": "elements",
  "gradient": "gradient",
}


def _table(layers: Sequence[Mapping[str, Any]]) -> list[str]:
  if not layers:
    return []
  wide = max(5, *(len(v["path"]) for v in layers))
  head = f"{'layer':<{wide}}" + "".join(f"{name:>12}" for name in _COLUMNS.values())
  rows = [
    f"{v['path']:<{wide}}" + "".join(f"{shown(v[name]):>12}" for name in _COLUMNS) for v in layers
  ]
  return ["", head, *rows]


def _escaped(text: str) -> str:
  return text.replace("[", r"\[")


def _number(value: Any) -> float:
  return float("nan") if value is None else value


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(k): _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  return None if isinstance(value, float) and not np.isfinite(value) else value


def _write(path: str | os.PathLike[str], text: str) -> None:
  target = pathlib.Path(path)
  draft = target.with_name(f".{target.name}.{os.getpid()}")
  draft.write_text(text, encoding="utf-8")
  draft.replace(target)
