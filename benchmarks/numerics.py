"""How exact batch normalization is: jaxbn and the others against float64.

  python -m benchmarks.numerics                 some minutes, and 6 GB of memory for the largest
                                                batch; writes benchmarks/results/numerics.json
  python -m benchmarks.numerics --largest 20    batches up to 2^20 only; written nowhere

Three sweeps, each of one forward and backward pass in training per point, the first of training. In
the first the mean goes from 1 to 10^6 standard deviations, in float32, bfloat16 and float16; in the
second the batch goes from 2 to 2^26 elements per channel, in float32; the third is the first in
float32 over four devices that share their statistics. Every channel's standard deviation is 1
before the input is rounded to its dtype, scale is 1 and bias 0, so that the output is in standard
deviations.

The reference is computed in float64 from the rounded input that the libraries get, with the same
epsilon; rounding the input is nobody's error. A channel that rounding has made constant has
variance 0, and its output is 0. Errors of the gradient of x are relative to the root mean square of
the cotangent divided by the standard deviation, which but for the smallest batches is that of the
gradient. Of each, the largest over all elements and channels and the root mean square over all are
kept.

Two lines say what could be expected at best. "rounding of the result" is half the spacing of the
result's dtype at the exact result, and for the root mean square that of numbers uniform up to
there. "mean in float32" is the most that rounding the mean to float32 before it is
subtracted may cost a computation that is otherwise exact.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks import results as stored
from benchmarks.frameworks import DEVICES, EPSILON, FRAMEWORKS, SHARED, Layer, missing

COMMAND = "python -m benchmarks.numerics"
COMPARED = (
  "jaxbn",
  "jaxbn without state",
  "flax.linen",
  "flax.linen two-pass",
  "haiku",
  "equinox",
  "keras",
  "torch",
  "torch channels-first",
  "torch SyncBatchNorm",
)
RESULT_FLOOR = "rounding of the result"
MEAN_FLOOR = "mean in float32"
DTYPES = ("float32", "bfloat16", "float16")
RATIOS = tuple(10 ** (k / 2) for k in range(13))  # of the mean to the standard deviation
ELEMENTS, CHANNELS = 4096, 64
EXPONENTS = (1, 2, 3, *range(4, 27, 2))  # of 2: elements per channel
SIZE_RATIOS = (10.0, 1000.0)
SWEEPS = ("mean", "devices", "size")
QUANTITIES = ("output", "gradient")
ERRORS = ("largest", "rms")
# jaxbn is level with the best if its error is below twice the best's (one bit), or below what the
# formula costs however exact the statistics are: it rounds four times, each by at most about the
# rounding of the result, and subtracts a mean that the statistics hold in float32. For the output
# the four are the difference, the factor, the product and the sum; for the gradient two
# differences, the factor and the product. Without the mean, luck would decide in a lone channel.
FACTOR = 2.0
ROUNDINGS = 4.0
Row = dict[str, Any]


class Exact(NamedTuple):
  """What a layer should give, in float64, and what bounds its accuracy."""

  y: np.ndarray
  gradient: np.ndarray
  size: np.ndarray  # of the gradient, per channel
  mean_error: np.ndarray  # the most that a mean in float32 may cost the output, per channel


class Panel(NamedTuple):
  """One curve per library: which quantity, over what, at what."""

  quantity: str
  sweep: str  # "mean", "size" or "devices"
  dtype: str
  ratio: float | None = None  # in the sweep over sizes

  def __str__(self) -> str:
    over = "mean" if self.ratio is None else f"batch size at mean {self.ratio:g}"
    devices = f" on {DEVICES} devices" if self.sweep == "devices" else ""
    return f"{self.quantity}, {self.dtype}, over the {over}{devices}"


def main() -> None:
  """Measures, prints where jaxbn stands in every panel, and writes the rows."""
  parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
  parser.add_argument("--quick", action="store_true", help="few points; written nowhere")
  parser.add_argument("--largest", type=int, default=EXPONENTS[-1], help="exponent of the sizes")
  parser.add_argument("--json", type=pathlib.Path, help="where to write the rows")
  arguments = parser.parse_args()
  whole = not arguments.quick and arguments.largest == EXPONENTS[-1]
  output = arguments.json or (stored.FOLDER / "numerics.json" if whole else None)
  ratios = RATIOS[::6] if arguments.quick else RATIOS
  exponents = [e for e in EXPONENTS[:: 6 if arguments.quick else 1] if e <= arguments.largest]
  rows = run(ratios, [2**e for e in exponents])
  console = Console()
  for line in standings(rows):
    console.print(line, markup=False)
  if output:
    stored.write("numerics", COMMAND, rows, output)
    console.print(f"Wrote {os.path.relpath(output)}.")


def run(ratios: tuple[float, ...], sizes: list[int]) -> list[Row]:
  """The rows of both sweeps, with a bar."""
  rows: list[Row] = []
  columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
  with Progress(*columns) as progress:
    names = []
    for name in FRAMEWORKS:
      if name not in COMPARED:
        continue
      if sentence := missing(name):
        progress.console.print(sentence)
      else:
        names.append(name)
    for task, total, found in (
      ("over the mean", len(DTYPES) * len(ratios), over_means(names, ratios)),
      ("over the mean, on devices", len(ratios), over_devices(names, ratios)),
      ("over the batch size", len(sizes) * len(SIZE_RATIOS), over_sizes(names, sizes)),
    ):
      bar = progress.add_task(task, total=total)
      for some in found:
        rows += some
        progress.advance(bar)
  return rows


def over_means(names: list[str], ratios: tuple[float, ...]) -> Iterator[list[Row]]:
  """Each dtype and ratio; a float16 overflows beyond some ratio, and the sweep ends there."""
  shape = (ELEMENTS, CHANNELS)
  for dtype in DTYPES:
    layers = _layers(names, shape, dtype)
    for ratio in ratios:
      x, cotangent = data(shape, dtype, ratio)
      rows = []
      if np.isfinite(x.astype(np.float64)).all():
        rows = rows_of(layers, x, cotangent)
      yield [{"sweep": "mean", "dtype": dtype, "ratio": ratio, **row} for row in rows]


def over_devices(names: list[str], ratios: tuple[float, ...]) -> Iterator[list[Row]]:
  """Each ratio, in float32, of what is there; PyTorch's formula always is."""
  shape = (ELEMENTS, CHANNELS)
  dtype = jnp.dtype("float32")
  found = {k: v for k, v in SHARED.items() if k in names or k not in FRAMEWORKS}
  layers = {name: framework.build(shape, dtype) for name, framework in found.items()}
  for ratio in ratios:
    rows = rows_of(layers, *data(shape, "float32", ratio))
    yield [{"sweep": "devices", "dtype": "float32", "ratio": ratio, **row} for row in rows]


def over_sizes(names: list[str], sizes: list[int]) -> Iterator[list[Row]]:
  """Each size and ratio; small batches in many channels, that the curves be as smooth."""
  for size in sizes:
    shape = (size, max(1, min(CHANNELS, 2**18 // size)))
    layers = _layers(names, shape, "float32")
    for ratio in SIZE_RATIOS:
      rows = rows_of(layers, *data(shape, "float32", ratio))
      yield [
        {"sweep": "size", "dtype": "float32", "ratio": ratio, "size": size, **row} for row in rows
      ]


def data(shape: tuple[int, int], dtype: str, ratio: float) -> tuple[np.ndarray, np.ndarray]:
  """x, whose mean is about `ratio` or -`ratio` and whose standard deviation is 1, and a cotangent.

  The means differ by up to a tenth between the channels, that none of what rounding does to a
  certain number decides the figure.
  """
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape)
  x -= x.mean(0)
  x /= x.std(0)
  x += ratio * rng.uniform(1, 1.1, size=shape[1]) * rng.choice((-1, 1), size=shape[1])
  cotangent = rng.normal(size=shape)
  with np.errstate(over="ignore"):  # whoever calls looks for it
    return _round(x, dtype), _round(cotangent, dtype)


def reference(x: np.ndarray, cotangent: np.ndarray) -> Exact:
  """Batch normalization and the gradient of x, from the formulas, per column, in float64.

  With r = 1 / sqrt(var + epsilon), z = (x - mean) r and g the cotangent:

    y = z,   gradient = r (g - mean(g) - z mean(g z))
  """
  wide, g = x.astype(np.float64), cotangent.astype(np.float64)
  mean = wide.mean(0)
  wide -= mean
  # Of a constant channel the mean itself is rounded: take out what it left.
  wide[:, x.max(0) == x.min(0)] = 0
  r = 1 / np.sqrt(np.square(wide).mean(0) + EPSILON)
  wide *= r
  size = r * np.sqrt(np.square(g).mean(0))
  of_g, of_gz = g.mean(0), (g * wide).mean(0)
  g -= of_g
  g -= wide * of_gz
  g *= r
  single = mean.astype(np.float32)
  mean_error = np.where(single == mean, 0, np.spacing(np.abs(single)) / 2 * r)
  return Exact(wide, g, size, mean_error)


def rows_of(layers: dict[str, Layer], x: np.ndarray, cotangent: np.ndarray) -> list[Row]:
  """The errors of every library at one point, and the two lines of what could be expected."""
  exact = reference(x, cotangent)
  rows: list[Row] = []
  for name, layer in layers.items():
    y, (gradient, *_), _ = layer.gradients(layer.put(x), layer.put(cotangent))
    rows += _both(name, exact, layer.get(y), layer.get(gradient))
    del y, gradient
  return [*rows, *_floors(exact, x.dtype)]


def standings(rows: list[Row]) -> list[str]:
  """For each panel and each error, in a line: jaxbn's at its worst beside the best other one."""
  lines = []
  for panel in panels_of(rows):
    for error in ERRORS:
      ratio, ours, best, name, point = worst_of(rows, panel, error)
      verdict = "level or best" if ratio <= 1 else "NOT level"
      lines.append(
        f"{panel}, {error}: {verdict}; at worst jaxbn {ours:.2g}, {name} {best:.2g} at {point}"
      )
  return lines


def worst_of(rows: list[Row], panel: Panel, error: str) -> tuple[float, float, float, str, str]:
  """Where jaxbn compares worst: its error over what would be level, both errors, whose, and where.

  Above 1 in the first, another library is more exact there by more than FACTOR and by more than the
  roundings of the formula.
  """
  found = []
  for point, at in points(rows, panel).items():
    ours = _finite(at["jaxbn"][error])
    others = {k: _finite(at[k][error]) for k in COMPARED if k in at and not k.startswith("jaxbn")}
    name = min(others, key=lambda k: others[k])
    budget = ROUNDINGS * at[RESULT_FLOOR][error]
    if panel.quantity == "output":
      budget += at[MEAN_FLOOR][error]
    level = max(FACTOR * others[name], budget)
    ratio = ours / level if level else (math.inf if ours else 0.0)
    found.append((ratio, ours, others[name], name, _point(panel, point)))
  return max(found, key=lambda one: one[0])


def panels_of(rows: list[Row]) -> list[Panel]:
  """The panels that the rows fill: over the mean first, outputs before gradients."""
  keys = {
    Panel(r["quantity"], r["sweep"], r["dtype"], r["ratio"] if r["sweep"] == "size" else None)
    for r in rows
  }

  def order(panel: Panel) -> tuple[Any, ...]:
    quantity, sweep, dtype, ratio = panel
    return SWEEPS.index(sweep), QUANTITIES.index(quantity), DTYPES.index(dtype), ratio or 0

  return sorted(keys, key=order)


def points(rows: list[Row], panel: Panel) -> dict[float, dict[str, Row]]:
  """The rows of a panel by where on its axis they are, and by library."""
  found: dict[float, dict[str, Row]] = {}
  for row in rows:
    of_panel = (row["quantity"], row["sweep"], row["dtype"]) == panel[:3]
    if of_panel and (panel.sweep != "size" or row["ratio"] == panel.ratio):
      at = row["size"] if panel.sweep == "size" else row["ratio"]
      found.setdefault(at, {})[row["framework"]] = row
  return found


def section(results: dict[str, Any]) -> str:
  """The chapter of docs/benchmarks.md."""
  rows = results["rows"]
  names = [name for name in COMPARED if any(row["framework"] == name for row in rows)]
  absent = [name for name in COMPARED if name not in names and name in FRAMEWORKS]
  left_out = [name for name in absent if not name.startswith("jaxbn")]
  parts = [_INTRODUCTION, "![Errors by mean and batch size](benchmarks-numerics.png)"]
  every = SHARED | FRAMEWORKS
  notes = " ".join(every[name].note for name in names if every[name].note)
  if notes:
    parts.append(notes)
  if left_out:
    parts.append(f"Not installed where this was measured: {', '.join(left_out)}.")
  parts += [_TABLE, _table(rows, "mean"), _SHARED_TABLE, _table(rows, "devices")]
  parts += [_STANDING, _standing_text(rows)]
  return "\n\n".join(parts) + "\n"


def draw(results: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
  """benchmarks-numerics.png: the largest errors, a panel for each sweep, quantity and dtype."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  rows = results["rows"]
  panels = [p for p in panels_of(rows) if (p.quantity, p.ratio) != ("gradient", SIZE_RATIOS[1])]
  figure, axes = plt.subplots(
    -(-len(panels) // 3), 3, figsize=(15, 13), layout="constrained", squeeze=False
  )
  for axis, panel in zip(axes.flat, panels, strict=False):
    _draw_panel(axis, panel, points(rows, panel))
  for axis in axes.flat[len(panels) :]:
    axis.set_axis_off()
  lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
  figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines) // 2 + 1)
  figure.suptitle("On the lower edge: no error, or too small to show. On the upper: not finite.")
  path = folder / "benchmarks-numerics.png"
  figure.savefig(path, dpi=100)
  plt.close(figure)
  return [path]


_INTRODUCTION = f"""## Exactness

Errors in training against float64, of the output (in standard deviations) and of the gradient of x
(relative to the cotangent's root mean square over the standard deviation). In the first sweep the
mean goes from 1 to 10^6 standard deviations in batches of {ELEMENTS}, in {CHANNELS} channels, in
the second the batch grows. The third is the first in float32, cut over {DEVICES} devices that share
their statistics in their first step. The reference is computed from the same rounded input. In half
precision every library returns half precision and is given float32 parameters; a channel with a
large mean is constant there after rounding, and its exact output is 0. float16 ends at 65504, and
its curves where the input would overflow. All of this ran on the CPU. On accelerators a jaxbn layer
that tracks statistics takes bfloat16 without a pivot, since it costs a TPU a pass over the data and
bfloat16 has lost the data before it is needed (see docs/design.md): its curve there leaves the best
at a mean of some 300 deviations. "jaxbn without state" is the function without running statistics.

"{RESULT_FLOOR}" is half the spacing of the result's dtype at the exact result, and
"{MEAN_FLOOR}" what rounding the mean to float32 may cost a computation that is otherwise exact."""
_TABLE = "The largest error of the output over the mean:"
_SHARED_TABLE = f"And with statistics of {DEVICES} devices together, in the first step:"
_STANDING = f"""jaxbn against the best other library at every point, for the largest error and
for the root mean square. Level means an error below {FACTOR:g} times the best, or below what the
formula costs with exact statistics: {ROUNDINGS:g} times the rounding of the result (it rounds so
often) and, of the output, the mean in float32:"""
_UNIFORM = 1 / math.sqrt(3)  # root mean square of errors uniform between -1 and 1
_STYLES: dict[str, dict[str, Any]] = {
  "jaxbn": {"color": "black", "linewidth": 2.5, "zorder": 3},
  "jaxbn without state": {"color": "black", "linestyle": ":", "linewidth": 2.5, "zorder": 3},
  "flax.linen": {"color": "tab:red", "linewidth": 3.5, "alpha": 0.5},
  "flax.linen two-pass": {"color": "tab:red", "linestyle": "--"},
  "haiku": {"color": "tab:orange"},
  "equinox": {"color": "tab:green", "linewidth": 3.5, "alpha": 0.5},
  "keras": {"color": "tab:purple", "linestyle": ":", "linewidth": 2.5},
  "torch": {"color": "tab:blue"},
  "torch channels-first": {"color": "tab:blue", "linestyle": "--"},
  "torch SyncBatchNorm": {"color": "tab:blue", "linestyle": "-."},
  RESULT_FLOOR: {"color": "grey", "linewidth": 1},
  MEAN_FLOOR: {"color": "grey", "linewidth": 1, "linestyle": "--"},
}


def _layers(names: list[str], shape: tuple[int, int], dtype: str) -> dict[str, Layer]:
  return {name: FRAMEWORKS[name].build(shape, jnp.dtype(dtype)) for name in names}


def _round(x: np.ndarray, dtype: str) -> np.ndarray:
  return x.astype(jnp.dtype(dtype))


def _both(name: str, exact: Exact, y: np.ndarray, gradient: np.ndarray) -> Iterator[Row]:
  """The row of the output and that of the gradient."""
  of_y, of_gradient = y.astype(np.float64), gradient.astype(np.float64)
  of_y -= exact.y
  of_gradient -= exact.gradient
  of_gradient /= exact.size
  yield {"framework": name, "quantity": "output", **_sizes(of_y)}
  yield {"framework": name, "quantity": "gradient", **_sizes(of_gradient)}


def _floors(exact: Exact, dtype: np.dtype[Any]) -> Iterator[Row]:
  """RESULT_FLOOR for both quantities, MEAN_FLOOR for the output."""
  for quantity, result, size in (("output", exact.y, 1), ("gradient", exact.gradient, exact.size)):
    half = np.spacing(np.abs(result).astype(dtype)).astype(np.float64) / 2 / size
    yield {"framework": RESULT_FLOOR, "quantity": quantity, **_sizes(half, _UNIFORM)}
  # Not as if uniform: it is the same for all elements of a channel, and there may be one channel.
  yield {"framework": MEAN_FLOOR, "quantity": "output", **_sizes(exact.mean_error)}


def _sizes(error: np.ndarray, of_rms: float = 1) -> Row:
  """The largest and the root mean square, to four digits; None if any element is not finite."""
  sizes = max(error.max(), -error.min()), of_rms * math.sqrt(np.vdot(error, error) / error.size)
  return {
    name: float(f"{size:.4g}") if np.isfinite(size) else None
    for name, size in zip(ERRORS, sizes, strict=True)
  }


def _finite(error: float | None) -> float:
  return math.inf if error is None else error


def _point(panel: Panel, at: float) -> str:
  return f"{at:.0f} elements" if panel.sweep == "size" else f"mean {at:.3g}"


def _table(rows: list[Row], sweep: str) -> str:
  there = {row["framework"] for row in rows if row["sweep"] == sweep}
  lines = [["dtype", "mean", *(name for name in COMPARED if name in there), RESULT_FLOOR]]
  for panel in panels_of(rows):
    if (panel.quantity, panel.sweep) == ("output", sweep):
      for at, cell in points(rows, panel).items():
        if math.log10(at) % 1 < 1e-9:  # whole powers of ten
          values = [_number(cell[name]["largest"]) for name in lines[0][2:]]
          lines.append([panel.dtype, f"{at:.0e}".replace("e+0", "e"), *values])
  return stored.table(lines, right=range(1, len(lines[0])))


def _number(error: float | None) -> str:
  return "not finite" if error is None else f"{error:.1e}"


def _standing_text(rows: list[Row]) -> str:
  """A list of where another library is better, or one sentence that there is none."""
  panels = panels_of(rows)
  compared = [(panel, error, worst_of(rows, panel, error)) for panel in panels for error in ERRORS]
  lost = [one for one in compared if one[2][0] > 1]
  text = f"- jaxbn is the best or level with the best in {len(compared) - len(lost)} of "
  text += f"{len(compared)} comparisons, each at every point of its axis."
  for panel, error, (_, ours, best, name, point) in lost:
    text += f"\n- {name} is more exact in {panel} ({error}), at worst at {point}, where jaxbn's "
    text += f"error is {ours:.2g} and its own {best:.2g}."
  return text


def _draw_panel(axis: Any, panel: Panel, found: dict[float, dict[str, Row]]) -> None:
  """Between limits that the libraries set: what is beyond them is drawn on the edge."""
  errors = [r["largest"] for cell in found.values() for k, r in cell.items() if k in COMPARED]
  drawable = [error for error in errors if error]
  low, high = (min(drawable) / 4, max(drawable) * 4) if drawable else (1e-9, 1)
  low = max(low, 1e-8)
  for name, style in _STYLES.items():
    xs = [at for at, cell in found.items() if name in cell]
    ys = [_finite(found[at][name]["largest"]) for at in xs]
    if xs:
      axis.plot(xs, np.clip(ys, low, high), label=name, **style)
  axis.set_ylim(low, high)
  axis.set_xscale("log", base=2 if panel.sweep == "size" else 10)
  axis.set_yscale("log")
  axis.set_title(str(panel))
  axis.set_xlabel("elements" if panel.sweep == "size" else "mean, in standard deviations")
  axis.set_ylabel("largest error" + (", relative" if panel.quantity == "gradient" else ""))
  axis.grid(alpha=0.25)


if __name__ == "__main__":
  main()
