"""How exact batch normalization is: jaxbn and the others against float64.

  python -m benchmarks.numerics                 some minutes, and 6 GB of memory for the largest
                                                batch; writes benchmarks/results/numerics.json
  python -m benchmarks.numerics --largest 20    batches up to 2^20 only; written nowhere

Three sweeps, each of one forward and backward pass in training per point, the first of training:
docs/templates/numerics.md says over what. Every channel's standard deviation is 1 before the input
is rounded to its dtype, scale is 1 and bias 0, so that the output is in standard deviations. The
reference is computed in float64 from the rounded input that the libraries get, with the same
epsilon. Errors of the gradient of x are relative to the root mean square of the cotangent over the
standard deviation, which but for the smallest batches is that of the gradient.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import results as stored
from benchmarks.frameworks import DEVICES, EPSILON, FRAMEWORKS, SHARED, Layer, missing
from benchmarks.results import Row, of

COMMAND = "python -m benchmarks.numerics"
COMPARED = (
  *("jaxbn", "jaxbn without state", "flax.linen", "flax.linen two-pass", "haiku", "equinox"),
  *("keras", "torch", "torch channels-first", "torch SyncBatchNorm"),
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
UNIFORM = 1 / math.sqrt(3)  # root mean square of errors uniform between -1 and 1


class Point(NamedTuple):
  """What the libraries are given."""

  sweep: str
  dtype: str
  ratio: float
  size: int = ELEMENTS

  @property
  def shape(self) -> tuple[int, int]:
    """Small batches are in many channels, that the curves be as smooth."""
    return self.size, max(1, min(CHANNELS, 2**18 // self.size))


class Exact(NamedTuple):
  """What a layer should give, in float64, and per channel what its accuracy is measured by."""

  y: np.ndarray
  gradient: np.ndarray
  size: np.ndarray  # of the gradient
  mean_error: np.ndarray  # the most that a mean in float32 may cost the output


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
  parser = stored.parser(__doc__, COMMAND)
  parser.add_argument("--largest", type=int, default=EXPONENTS[-1], help="exponent of the sizes")
  arguments = parser.parse_args()
  few = 6 if arguments.quick else 1
  sizes = [2**e for e in EXPONENTS[::few] if e <= arguments.largest]
  absent = {name: missing(name) for name in COMPARED if name in FRAMEWORKS}
  for sentence in filter(None, absent.values()):
    print(sentence)
  names = tuple(name for name in FRAMEWORKS if name in absent and not absent[name])
  every = points(RATIOS[::few], sizes)
  rows = [row for point in track(every, "Points") for row in rows_at(point, names)]
  whole = arguments.largest == EXPONENTS[-1]
  stored.conclude("numerics", COMMAND, rows, parts, arguments, whole)


def points(ratios: tuple[float, ...], sizes: list[int]) -> list[Point]:
  return [
    *(Point("mean", dtype, ratio) for dtype in DTYPES for ratio in ratios),
    *(Point("devices", "float32", ratio) for ratio in ratios),
    *(Point("size", "float32", ratio, size) for size in sizes for ratio in SIZE_RATIOS),
  ]


def rows_at(point: Point, names: tuple[str, ...]) -> list[Row]:
  """The errors of every library; none where the input overflows its dtype, as float16 may."""
  x, cotangent = data(point.shape, point.dtype, point.ratio)
  if not np.isfinite(x.astype(np.float64)).all():
    return []
  where: Row = {"sweep": point.sweep, "dtype": point.dtype, "ratio": point.ratio}
  where |= {"size": point.size} if point.sweep == "size" else {}
  layers = layers_of(names, point.shape, point.dtype, point.sweep == "devices")
  return [where | row for row in rows_of(layers, x, cotangent)]


@functools.lru_cache(maxsize=1)  # whole sweeps share what is compiled
def layers_of(
  names: tuple[str, ...], shape: tuple[int, int], dtype: str, devices: bool = False
) -> dict[str, Layer]:
  """The libraries' layers; over devices those that can share, and PyTorch's formula always."""
  shared = {k: v for k, v in SHARED.items() if k in names or k not in FRAMEWORKS}
  found = shared if devices else {name: FRAMEWORKS[name] for name in names}
  return {name: build(shape, jnp.dtype(dtype)) for name, build in found.items()}


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
    return x.astype(jnp.dtype(dtype)), cotangent.astype(jnp.dtype(dtype))


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

  def add(name: str, quantity: str, error: np.ndarray, of_rms: float = 1) -> None:
    sizes = max(error.max(), -error.min()), of_rms * math.sqrt(np.vdot(error, error) / error.size)
    known = [stored.short(size) if np.isfinite(size) else None for size in sizes]
    rows.append({"framework": name, "quantity": quantity, **dict(zip(ERRORS, known, strict=True))})

  for name, layer in layers.items():
    y, (gradient, *_), _ = layer.gradients(layer.put(x), layer.put(cotangent))
    add(name, "output", layer.get(y).astype(np.float64) - exact.y)
    error = layer.get(gradient).astype(np.float64)
    error -= exact.gradient
    add(name, "gradient", np.divide(error, exact.size, out=error))
    del y, gradient, error
  for quantity, result, size in (("output", exact.y, 1), ("gradient", exact.gradient, exact.size)):
    half = np.spacing(np.abs(result).astype(x.dtype)).astype(np.float64) / 2 / size
    add(RESULT_FLOOR, quantity, half, UNIFORM)
  # Not as if uniform: it is the same for all elements of a channel, and there may be one channel.
  add(MEAN_FLOOR, "output", exact.mean_error)
  return rows


# What the rows say.


def parts(results: Row) -> Row:
  rows = results["rows"]
  missing = [n for n in COMPARED if n in FRAMEWORKS and not of(rows, framework=n)]
  return {
    "elements": ELEMENTS,
    "channels": CHANNELS,
    "devices": DEVICES,
    "result_floor": RESULT_FLOOR,
    "mean_floor": MEAN_FLOOR,
    "factor": f"{FACTOR:g}",
    "roundings": f"{ROUNDINGS:g}",
    "left_out": stored.absent([name for name in missing if not name.startswith("jaxbn")]),
    "means": _table(rows, "mean"),
    "on_devices": _table(rows, "devices"),
    "standing": standing(rows),
  }


def standing(rows: list[Row]) -> str:
  """A list of where another library is better, or one sentence that there is none."""
  compared = [(p, error, worst_of(rows, p, error)) for p in panels_of(rows) for error in ERRORS]
  lost = [
    f"\n- {name} is more exact in {panel} ({error}), at worst at {point}, where jaxbn's error is "
    f"{ours:.2g} and its own {best:.2g}."
    for panel, error, (ratio, ours, best, name, point) in compared
    if ratio > 1
  ]
  text = f"- jaxbn is the best or level with the best in {len(compared) - len(lost)} of "
  return text + "".join([f"{len(compared)} comparisons, each at every point of its axis.", *lost])


def worst_of(rows: list[Row], panel: Panel, error: str) -> tuple[float, float, float, str, str]:
  """Where jaxbn compares worst: its error over what would be level, both errors, whose, and where.

  Above 1 in the first, another library is more exact there by more than FACTOR and by more than the
  roundings of the formula.
  """
  found = []
  for place, at in along(rows, panel).items():
    ours = finite(at["jaxbn"][error])
    others = {k: finite(at[k][error]) for k in COMPARED if k in at and not k.startswith("jaxbn")}
    name = min(others, key=lambda k: others[k])
    budget = ROUNDINGS * at[RESULT_FLOOR][error]
    if panel.quantity == "output":
      budget += at[MEAN_FLOOR][error]
    level = max(FACTOR * others[name], budget)
    ratio = ours / level if level else (math.inf if ours else 0.0)
    where = f"{place:.0f} elements" if panel.sweep == "size" else f"mean {place:.3g}"
    found.append((ratio, ours, others[name], name, where))
  return max(found, key=lambda one: one[0])


def finite(error: float | None) -> float:
  return math.inf if error is None else error


def panels_of(rows: list[Row]) -> list[Panel]:
  """The panels that the rows fill: over the mean first, outputs before gradients."""
  ratios = {"mean": (None,), "devices": (None,), "size": SIZE_RATIOS}
  every = itertools.product(SWEEPS, QUANTITIES, DTYPES)
  panels = [Panel(q, sweep, dtype, r) for sweep, q, dtype in every for r in ratios[sweep]]
  return [panel for panel in panels if along(rows, panel)]


def along(rows: list[Row], panel: Panel) -> dict[float, dict[str, Row]]:
  """The rows of a panel by where on its axis they are, and by library."""
  found: dict[float, dict[str, Row]] = {}
  where = {"ratio": panel.ratio} if panel.sweep == "size" else {}
  for row in of(rows, quantity=panel.quantity, sweep=panel.sweep, dtype=panel.dtype, **where):
    at = row["size"] if panel.sweep == "size" else row["ratio"]
    found.setdefault(at, {})[row["framework"]] = row
  return found


def _table(rows: list[Row], sweep: str) -> str:
  names = [name for name in COMPARED if of(rows, sweep=sweep, framework=name)]
  lines = [["dtype", "mean", *names, RESULT_FLOOR]]
  for panel in panels_of(of(rows, quantity="output", sweep=sweep)):
    for at, cell in along(rows, panel).items():
      if math.log10(at) % 1 < 1e-9:  # whole powers of ten
        errors = [cell[name]["largest"] for name in lines[0][2:]]
        values = ["not finite" if error is None else f"{error:.1e}" for error in errors]
        lines.append([panel.dtype, f"{at:.0e}".replace("e+0", "e"), *values])
  return stored.table(lines, right=range(1, len(lines[0])))


if __name__ == "__main__":
  main()
