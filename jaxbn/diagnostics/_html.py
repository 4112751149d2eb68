"""The report as one page, with pictures drawn here: no network, no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from jaxbn.diagnostics._report import Report

_WIDTH, _HEIGHT, _LEFT, _EDGE = 320, 150, 44, 14
_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --faint: #6b6b70; --page: #fff; --card: #f4f4f6;
  --data: #2a6fbb; --running: #c4570f; --error: #b3261e; --warning: #8a5a00; --note: #4a5a6a; }
@media (prefers-color-scheme: dark) { :root { --text: #ececef; --faint: #a0a0a8; --page: #151517;
  --card: #232327; --data: #7db4f5; --running: #ff9d5c; --error: #ff8a80; --warning: #f0c04a;
  --note: #a9bccd; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 0 auto; padding: 1rem; max-width: 72rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; }
article, figure { background: var(--card);
  border-radius: .5rem; padding: .8rem 1rem; margin: 0 0 .8rem; }
.error { border-left: .3rem solid var(--error); } .error b { color: var(--error); }
.warning { border-left: .3rem solid var(--warning); } .warning b { color: var(--warning); }
.note { border-left: .3rem solid var(--note); } .note b { color: var(--note); }
pre { overflow-x: auto; margin: .4rem 0 0; font-size: .85rem; overflow-wrap: normal; }
p { margin: .3rem 0; } .faint, figcaption { color: var(--faint); font-size: .85rem; }
.cards { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font-size: 10px; }
.data { color: var(--data); } .running { color: var(--running); }
svg .data, svg .running { stroke: currentColor; fill: none; stroke-width: 1.6; }
svg .band { fill: var(--data); opacity: .25; } svg .bar { fill: var(--data); }
svg .axis { stroke: var(--faint); opacity: .5; }
"""
_LEGEND = (
  '<p class="faint"><span class="data">&#9632;</span> the data: mean and one standard deviation '
  'of each channel, sorted. <span class="running">&#9632;</span> the running statistics: the same. '
  "Over the steps: the 15th, 50th and 85th percentile of one channel, and its running mean.</p>"
)


def page(report: Report) -> str:
  title = str(report).split("\n", 1)[0]
  body = [f"<h1>{escape(title)}</h1>"]
  if report.parts is not None:
    where = escape(report.parts or "(the top)")
    body += [f"<p>Training and evaluation part at <code>{where}</code>.</p>"]
  body += [_finding(*group) for group in report.grouped()]
  body += [f'<p class="faint">{escape(report.unseen)}</p>'] if report.unseen else []
  body += [
    "<h2>From layer to layer</h2>",
    '<div class="cards">',
    *_overview(report.layers),
    "</div>",
  ]
  body += [_table(report.layers), "<h2>Each layer</h2>", _LEGEND, '<div class="cards">']
  body += [_layer(v) for v in report.layers]
  head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
  return (
    f'<!doctype html><html lang="en"><head>{head}<title>{escape(title)}</title>'
    f"<style>{_STYLE}</style></head><body>{''.join(body)}</div></body></html>\n"
  )


def _finding(finding: Any, layers: Sequence[str]) -> str:
  where = ", ".join(f"<code>{escape(layer or '(the top)')}</code>" for layer in layers[:12])
  more = f" and {len(layers) - 12} more" if len(layers) > 12 else ""
  return (
    f'<article class="{finding.severity}"><h3><b>{finding.severity}</b>: {finding.fault} '
    f'<span class="faint">({finding.sure})</span></h3><p>{where}{more}</p>'
    f"<p>{escape(finding.evidence)}.</p><pre>{escape(finding.mend)}</pre></article>"
  )


def _overview(layers: Sequence[Mapping[str, Any]]) -> list[str]:
  distances = [v["distance"] for v in layers]
  pictures = [_bars(distances, "Distance of training and evaluation, in standard deviations")]
  gradients = [v["gradient"] for v in layers]
  if all(g is not None and g > 0 for g in gradients):
    decades = "Norm of the gradient at each layer, as power of ten"
    pictures.append(_bars(np.log10(np.array(gradients, float)).tolist(), decades))
  return pictures


def _table(layers: Sequence[Mapping[str, Any]]) -> str:
  names = {
    "calls": "calls",
    "drift": "drift, nats",
    "drift_of_a_batch": "of a batch",
    "distance": "distance",
    "elements": "elements",
    "gradient": "gradient",
  }
  head = "".join(f"<th>{name}</th>" for name in ("layer", *names.values()))
  rows = [
    f"<tr><td>{escape(v['path'])}</td>"
    + "".join(f"<td>{shown(v[n])}</td>" for n in names)
    + "</tr>"
    for v in layers
  ]
  return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _layer(v: Mapping[str, Any]) -> str:
  name = f"<h3>{escape(v['path'] or '(the top)')}</h3>"
  about = f"{v['kind']}, {v['size']} channels, {v['dtype']}"
  pictures = _channels(v["channels"])
  if len(v["history"]) > 1:
    pictures += _history(v["history"])
    about += f"; over the steps channel {v['history'][-1]['channel']}"
  return f"<figure>{name}{pictures}<figcaption>{escape(about)}</figcaption></figure>"


class _Scale:
  """From values to places in a picture."""

  def __init__(self, x: Sequence[Any], y: Sequence[Any]):
    self.x0, self.x1 = float(np.min(x)), float(np.max(x))
    finite = [float(v) for v in y if v is not None and np.isfinite(v)] or [0.0]
    self.y0, self.y1 = min(finite), max(finite)

  def point(self, x: Any, y: Any) -> str:
    right = _LEFT + (x - self.x0) / (self.x1 - self.x0 or 1) * (_WIDTH - _LEFT - _EDGE)
    return f"{right:.1f},{self.height(y):.1f}"

  def height(self, y: Any) -> float:
    return _HEIGHT - _EDGE - (y - self.y0) / (self.y1 - self.y0 or 1) * (_HEIGHT - 2 * _EDGE)

  def line(self, xs: Sequence[Any], ys: Sequence[Any], kind: str, dashes: str = "") -> str:
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and np.isfinite(y)]
    points = " ".join(self.point(*pair) for pair in known)
    return f'<polyline class="{kind}" stroke-dasharray="{dashes}" points="{points}"/>'

  def axis(self) -> str:
    at = {f"{self.y1:.3g}": _EDGE, f"{self.y0:.3g}": _HEIGHT - _EDGE}
    texts = [
      f'<text x="{_LEFT - 4}" y="{y + 3}" text-anchor="end">{t}</text>' for t, y in at.items()
    ]
    return f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_EDGE}" y2="{_HEIGHT - _EDGE}"/>' + (
      "".join(texts)
    )


def _picture(title: str, parts: Sequence[str]) -> str:
  return (
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>'
    f"{''.join(parts)}</svg>"
  )


def _plus(a: Sequence[Any], b: Sequence[Any], times: float) -> list[Any]:
  """a + times b, where both are known: JSON has null for what is not finite."""
  pairs = zip(a, b, strict=True)
  return [None if v is None or w is None else v + times * w for v, w in pairs]


def _channels(channels: Mapping[str, Any]) -> str:
  mean, std = channels["mean"], channels["std"]
  running, spread = channels["running_mean"], channels["running_std"]
  upper, lower = _plus(mean, std, 1), _plus(mean, std, -1)
  edges = _plus(running, spread, 1), _plus(running, spread, -1)
  x = list(range(len(mean)))
  if len(x) == 1:  # a line is drawn from somewhere to somewhere
    x, mean, upper, lower, running = [0, 1], mean * 2, upper * 2, lower * 2, running * 2
    edges = edges[0] * 2, edges[1] * 2
  scale = _Scale(x, [*upper, *lower, *edges[0], *edges[1]])
  known = [i for i in x if all(v[i] is not None and np.isfinite(v[i]) for v in (upper, lower))]
  outline = [scale.point(i, upper[i]) for i in known]
  outline += [scale.point(i, lower[i]) for i in reversed(known)]
  lines = [scale.line(x, mean, "data"), scale.line(x, running, "running")]
  lines += [scale.line(x, edge, "running", "3 3") for edge in edges]
  band = f'<polygon class="band" points="{" ".join(outline)}"/>'
  return _picture("Data and running statistics by channel", [scale.axis(), band, *lines])


def _history(history: Sequence[Mapping[str, Any]]) -> str:
  steps = [h["step"] for h in history]
  if None in steps:
    steps = list(range(len(history)))
  curves = list(zip(*(h["percentiles"] for h in history), strict=True))
  running = [h["running_mean"] for h in history]
  scale = _Scale(steps, [v for curve in (*curves, running) for v in curve])
  lines = [scale.line(steps, curve, "data") for curve in curves]
  texts = [f'<text x="{_LEFT}" y="{_HEIGHT - 2}">step {steps[0]}</text>']
  texts += [f'<text x="{_WIDTH - _EDGE}" y="{_HEIGHT - 2}" text-anchor="end">{steps[-1]}</text>']
  parts = [scale.axis(), *lines, scale.line(steps, running, "running"), *texts]
  return _picture("Percentiles over training", parts)


def _bars(values: Sequence[Any], title: str) -> str:
  known = [v if v is not None and np.isfinite(v) else 0.0 for v in values]
  scale = _Scale([0, len(known)], [0.0, *known])
  wide = (_WIDTH - _LEFT - _EDGE) / len(known)
  zero = scale.height(0.0)

  def bar(i: int, value: float) -> str:
    top, end = sorted([zero, scale.height(value)])
    at, size = _LEFT + (i + 0.1) * wide, 0.8 * wide
    return (
      f'<rect class="bar" x="{at:.1f}" y="{top:.1f}" width="{size:.1f}" height="{end - top:.1f}"/>'
    )

  drawing: list[Callable[..., Any] | str] = [scale.axis(), *map(bar, range(len(known)), known)]
  picture = _picture(title, drawing)  # type: ignore[arg-type]
  return f"<figure>{picture}<figcaption>{escape(title)}</figcaption></figure>"


def shown(value: Any) -> str:
  return "-" if value is None or not np.isfinite(value) else f"{value:.3g}"
