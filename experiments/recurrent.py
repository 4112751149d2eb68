"""Recurrent batch normalization (Cooijmans et al. 2016) beside a plain LSTM, on rows of pixels.

  python -m experiments.recurrent [folder]

An LSTM reads scikit-learn's digits row by row, pixel by pixel, and pixel by pixel in a random order
that is the same for all, and says at the end which digit it was (the paper's sequential MNIST, in
little). Writes recurrent.json, recurrent.md and recurrent.png to folder (docs): the accuracy in
evaluation, on the test set, over the training, of several seeds. Takes some minutes.
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

import jaxbn.linen
from benchmarks import results as stored
from experiments import recurrent_cost as cost
from experiments.splits import Split, batches, splits
from jaxbn.variants.recurrent import forget_gates_at_one

FOLDER = Path("docs")
PLAIN, LAYER, GAIN_SMALL, GAIN_ONE = "LSTM", "layer norm", "batch norm, 0.1", "batch norm, 1"
METHODS = {PLAIN: "0.35", LAYER: "#5a9e6f", GAIN_SMALL: "#c8452c", GAIN_ONE: "#9bb8d3"}
ROWS, PIXELS, PERMUTED = "row by row", "pixel by pixel", "pixels permuted"
TASKS = (ROWS, PIXELS, PERMUTED)
CLASSES = 10
# Test accuracy in % of the plain LSTM and the normalized one, in the paper's table of this.
PAPER = {PIXELS: (98.9, 99.0), PERMUTED: (90.2, 95.4)}
NOISE = 0.1  # of the first hidden state: where all inputs are equal, something must differ
CLIP = 1.0  # of the gradient's norm


class Plan(NamedTuple):
  """What is run; the defaults are those of the page."""

  units: int = 48
  batch_size: int = 64
  steps: int = 600
  evaluations: int = 12
  seeds: int = 3
  # For all methods; that of the best validation accuracy in the end, per task and method, counts.
  learning_rates: tuple[float, ...] = (0.002, 0.01)


class LSTMCell(nn.RNNCellBase):
  """A plain LSTM, or with layer normalization where `jaxbn.linen.LSTMCell` has the batch's.

  It starts as that does, forget gates at 1. (Flax's own cells start them at 0.)
  """

  features: int
  layer_norm: bool = False

  @nn.compact
  def __call__(self, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    c, h = carry
    dense = functools.partial(nn.Dense, 4 * self.features, use_bias=False)
    from_input, from_hidden = dense()(x), dense(kernel_init=nn.initializers.orthogonal())(h)
    bias = self.param("bias", forget_gates_at_one, (4 * self.features,))
    if self.layer_norm:
      from_input = nn.LayerNorm(use_bias=False)(from_input)
      from_hidden = nn.LayerNorm(use_bias=False)(from_hidden)
    i, f, g, o = jnp.split(from_input + from_hidden + bias, 4, -1)
    c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
    h = nn.sigmoid(o) * jnp.tanh(nn.LayerNorm()(c) if self.layer_norm else c)
    return (c, h), h

  @property
  def num_feature_axes(self) -> int:
    return 1


class Classifier(nn.Module):
  """The class of a sequence, from the last hidden state."""

  method: str
  units: int
  max_length: int

  @nn.compact
  def __call__(self, x: jax.Array, noise: jax.Array, training: bool) -> jax.Array:
    cell: nn.RNNCellBase
    if self.method in (PLAIN, LAYER):
      cell = LSTMCell(self.units, layer_norm=self.method == LAYER)
      carry: Any = (jnp.zeros_like(noise), noise)
    else:
      gain = nn.initializers.constant(0.1 if self.method == GAIN_SMALL else 1.0)
      cell = jaxbn.linen.LSTMCell(
        self.units,
        self.max_length,
        use_running_average=not training,
        momentum=None,  # a plain average: see `population`
        scale_init=gain,
      )
      carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)._replace(h=noise)
    if training:
      layer = nn.RNN(cell, variable_carry="batch_stats")
    else:
      layer = nn.RNN(cell, variable_broadcast=("params", "batch_stats"))
    _, outputs = layer(x, initial_carry=carry, return_carry=True)
    return nn.Dense(CLASSES)(outputs[:, -1])


def sequences(task: str, images: np.ndarray) -> np.ndarray:
  """(examples, steps, features)."""
  n, height, width, _ = images.shape
  if task == ROWS:
    return images.reshape(n, height, width)
  pixels = images.reshape(n, height * width, 1)
  if task == PERMUTED:
    pixels = pixels[:, np.random.default_rng(0).permutation(height * width)]
  return pixels


def train(
  method: str,
  plan: Plan,
  train: Split,
  tests: list[Split],
  key: jax.Array,
  order: jax.Array,
  rate: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One training: the loss of every step, and now and then the accuracies of `tests`."""
  images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
  model = Classifier(method, plan.units, images.shape[1])
  of_start, of_noise, of_tests = jax.random.split(key, 3)
  optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam())

  def noise(key: jax.Array, examples: int) -> jax.Array:
    return NOISE * jax.random.normal(key, (examples, plan.units))

  def step(carry: Any, t_and_batch: Any) -> tuple[Any, jax.Array]:
    params, state = carry
    t, batch = t_and_batch

    def loss(params: Any) -> jax.Array:
      variables = {"params": params, "batch_stats": fresh}
      h = noise(jax.random.fold_in(of_noise, t), len(batch))
      logits, _ = model.apply(variables, images[batch], h, True, mutable=["batch_stats"])
      each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
      return each.mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return (params, state), value

  def accuracy(params: Any, stats: Any, split: Split) -> jax.Array:
    variables = {"params": params, "batch_stats": stats}
    x = jnp.asarray(split.images)
    logits: Any = model.apply(variables, x, noise(of_tests, len(x)), False)
    return jnp.mean(jnp.argmax(logits, -1) == split.labels)

  variables = model.init(of_start, images[:2], noise(of_noise, 2), True)
  params, fresh = variables["params"], variables.get("batch_stats", {})

  def population(params: Any) -> Any:
    """The average of the statistics of batches of the whole training set, as in the paper."""
    whole = len(labels) // plan.batch_size
    every = jnp.arange(whole * plan.batch_size).reshape(whole, plan.batch_size)

    def follow(stats: Any, batch: jax.Array) -> tuple[Any, None]:
      h = noise(of_tests, len(batch))
      variables = {"params": params, "batch_stats": stats}
      _, new = model.apply(variables, images[batch], h, True, mutable=["batch_stats"])
      return new["batch_stats"], None

    return lax.scan(follow, fresh, every)[0] if fresh else fresh

  def period(carry: Any, steps: Any) -> tuple[Any, Any]:
    carry, losses = lax.scan(step, carry, steps)
    params, *_ = carry
    stats = population(params)
    return carry, (losses, jnp.stack([accuracy(params, stats, split) for split in tests]))

  numbered = jnp.arange(plan.steps), order
  periods = jax.tree.map(lambda a: a.reshape(plan.evaluations, -1, *a.shape[1:]), numbered)
  start = params, optimizer.init(params)
  _, (losses, accuracies) = lax.scan(period, start, periods)
  return losses.reshape(-1), accuracies


# What came of it


def run(plan: Plan, splits: dict[str, Split], say: Callable[[str], None]) -> list[dict[str, Any]]:
  """A row for each task and method."""
  labels = splits["train"].labels
  orders = [batches(False, labels, plan.batch_size, plan.steps, seed) for seed in range(plan.seeds)]
  rows = []
  for task in TASKS:
    of_task = {k: Split(sequences(task, s.images), s.labels) for k, s in splits.items()}
    for method in METHODS:
      found = best_of_rates(method, plan, of_task, np.stack(orders))
      rows.append({"task": task, "method": method} | found)
      say(f"{task}, {method}: {spread(rows[-1])} with a learning rate of {found['learning_rate']}")
  return rows


def best_of_rates(
  method: str, plan: Plan, splits: dict[str, Split], order: np.ndarray
) -> dict[str, Any]:
  """The learning rate of the best validation accuracy in the end, and its test accuracies."""
  tests = [splits["validation"], splits["test"]]
  of_rates = jax.vmap(
    functools.partial(train, method, plan, splits["train"], tests), (None, None, 0)
  )
  of_seeds = jax.jit(jax.vmap(of_rates, (0, 0, None)))
  keys = jax.random.split(jax.random.key(0), plan.seeds)
  losses, accuracies = of_seeds(keys, jnp.asarray(order), jnp.asarray(plan.learning_rates))
  validation, test = np.moveaxis(np.asarray(accuracies), -1, 0)  # (seeds, rates, evaluations)
  best = int(np.argmax(validation[..., -1].mean(0)))
  tail = np.asarray(losses)[:, best, -plan.steps // plan.evaluations :]
  return {
    "learning_rate": plan.learning_rates[best],
    "accuracies": np.round(test[:, best].astype(float), 4).tolist(),
    "losses": np.round(tail.mean(1).astype(float), 4).tolist(),
  }


def last(row: dict[str, Any]) -> np.ndarray:
  """The accuracy at the end of each seed, in percent."""
  return 100 * np.asarray(row["accuracies"])[:, -1]


def throughout(row: dict[str, Any]) -> np.ndarray:
  """The mean accuracy over the training of each seed, in percent: larger is sooner."""
  return 100 * np.asarray(row["accuracies"]).mean(1)


def spread(row: dict[str, Any], of: Callable[[dict[str, Any]], np.ndarray] = last) -> str:
  """Mean and standard deviation over the seeds."""
  return f"{of(row).mean():.1f} ± {of(row).std(ddof=1):.1f}"


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
  """The table: a heading, then a line for each task and method."""
  heading = ["task", "method", "learning rate", "in the end", "mean over training", "training loss"]
  return [heading] + [
    [
      row["task"],
      row["method"],
      str(row["learning_rate"]),
      spread(row),
      spread(row, throughout),
      f"{np.mean(row['losses']):.3f}",
    ]
    for row in rows
  ]


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
  """What the figures say of the paper's two claims, task by task."""
  cells = {(row["task"], row["method"]): row for row in rows}
  claims = [
    ("Batch normalization beside the plain LSTM", GAIN_SMALL, PLAIN),
    ("Batch normalization beside layer normalization", GAIN_SMALL, LAYER),
    ("A first gain of 0.1 beside 1", GAIN_SMALL, GAIN_ONE),
  ]
  said = []
  for claim, a, b in claims:
    parts = [
      f"{task} {_difference(cells[task, a], cells[task, b], last)} in the end and "
      f"{_difference(cells[task, a], cells[task, b], throughout)} over the training"
      for task in dict.fromkeys(task for task, _ in cells)
    ]
    said.append(f"{claim}, in points of accuracy: {'; '.join(parts)}.")
  return said


def _difference(
  a: dict[str, Any], b: dict[str, Any], of: Callable[[dict[str, Any]], np.ndarray]
) -> str:
  """The difference of the means, and whether it is more than the seeds' spread."""
  by = of(a).mean() - of(b).mean()
  if abs(by) <= of(a).std(ddof=1) + of(b).std(ddof=1):
    return f"{by:+.1f} (within the spread of the seeds)"
  return f"{by:+.1f}"


def show(rows: list[dict[str, Any]], console: Console) -> None:
  """Prints the table."""
  heading, *rest = lines(rows)
  table = Table(*heading, title="Test accuracy in %, mean ± standard deviation over the seeds")
  for line in rest:
    table.add_row(*line)
  console.print(table)


def draw(found: dict[str, Any], file: Path) -> None:
  """Writes a PNG with a panel for each task: mean and range of the seeds over the steps."""
  plan, rows = found["plan"], found["rows"]
  tasks = list(dict.fromkeys(row["task"] for row in rows))
  steps = plan["steps"] // plan["evaluations"] * np.arange(1, plan["evaluations"] + 1)
  figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)  # no window system, no global state
  figure.suptitle(f"LSTMs that read digits: test accuracy, mean and range of {plan['seeds']} seeds")
  (panels,) = figure.subplots(1, len(tasks), sharey=True, squeeze=False)
  for axes, task in zip(panels, tasks, strict=True):
    for method, colour in METHODS.items():
      (row,) = (r for r in rows if (r["task"], r["method"]) == (task, method))
      of_seeds = np.asarray(row["accuracies"])
      axes.plot(steps, of_seeds.mean(0), color=colour, linewidth=1.8, label=method)
      axes.fill_between(steps, of_seeds.min(0), of_seeds.max(0), color=colour, alpha=0.2, lw=0)
    axes.set(title=task, xlabel="steps")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel("test accuracy")
  panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
  panels[0].legend(frameon=False, loc="lower right")
  figure.savefig(file)


def page(found: dict[str, Any], costs: dict[str, Any] | None) -> str:
  """docs/recurrent.md."""
  plan = found["plan"]
  rates = " and ".join(map(str, plan["learning_rates"]))
  parts = [
    "# Recurrent batch normalization",
    "Made by `python -m experiments.recurrent` from what it found, recurrent.json, and from "
    "experiments/results/recurrent_cost.json. Nothing here is typed by hand.",
    f"## Learning\n\nAn LSTM of {plan['units']} units reads scikit-learn's 8x8 digits row by row "
    "(8 steps of 8 numbers), pixel by pixel (64 steps of 1), or pixel by pixel in a random order "
    "that is the same for all, and says from its last hidden state which digit it was. Beside the "
    "plain LSTM: one with layer normalization in the same places (gain 1, Flax's), and "
    "`jaxbn.linen.LSTMCell` with a first gain of 0.1, as Cooijmans et al. 2016 have it, and of 1. "
    "Everything else is the same for all: "
    "kernels, forget gates that start at 1, noise of standard deviation "
    f"{NOISE} for the first hidden state (the paper's mend for pixels that are equal in all "
    f"images), {plan['steps']} steps of Adam with batches of {plan['batch_size']} and gradients "
    f"clipped at norm {CLIP:g}. Of the learning rates {rates} each cell of the table has the one "
    "that was best on a part of the training set that was held out. For evaluation the statistics "
    "of each step are averaged over the training set with the parameters as they are then, as in "
    "the paper.",
    "![Test accuracy over the steps](recurrent.png)",
    "Test accuracy in %: mean and standard deviation over "
    f"{plan['seeds']} seeds. The mean over training says how soon it was learned; the training "
    f"loss is that of the last {plan['steps'] // plan['evaluations']} steps.",
    stored.table(lines(found["rows"]), right=range(2, 6)),
    "\n".join(f"- {verdict}" for verdict in verdicts(found["rows"])),
    "In the paper, with 784 steps of MNIST, 100 units and far longer training, the plain LSTM and "
    "the normalized one come to "
    + ", and ".join(f"{a} and {b} ({task})" for task, (a, b) in PAPER.items())
    + "; the normalized one learns sooner in both.",
    f"Run on {found['date']}, with "
    + ", ".join(f"{name} {found['versions'][name]}" for name in ("jax", "flax", "numpy"))
    + f"; {found['machine']['cpu']}, {found['machine']['cores']} cores.",
  ]
  if costs:
    size = costs["rows"][0]
    parts += [
      "## Cost",
      f"Microseconds per step of {size['units']} units on the CPU ({costs['machine']['cpu']}, "
      f"{costs['machine']['cores']} cores), for batches of {size['batch']} and {size['steps']} "
      "steps: the cells of jaxbn.linen and Flax's plain ones (OptimizedLSTMCell, GRUCell) under "
      "`nn.RNN`, in turns, the least of at least "
      f"{min(row['samples'] for row in costs['rows'])} times each "
      f"(`{costs['command']}`). The goal is at most {cost.GOAL} times; the most here is "
      f"{max(row['ratio_min'] for row in costs['rows']):.2f}.",
      cost.markdown(costs["rows"]),
    ]
  return "\n\n".join(parts) + "\n"


def main(
  folder: Path = FOLDER, plan: Plan | None = None, console: Console | None = None
) -> dict[str, Any]:
  """Trains all networks; writes the results, the page and its picture."""
  plan, console = plan or Plan(), console or Console()
  rows = run(plan, splits(), console.print)
  found = {
    "date": datetime.date.today().isoformat(),
    "versions": stored.versions(),
    "machine": stored.machine(),
    "plan": plan._asdict(),
    "rows": rows,
  }
  (folder / "recurrent.json").write_text(json.dumps(found, indent=1) + "\n")
  write(found, folder)
  show(rows, console)
  return found


def write(found: dict[str, Any], folder: Path) -> None:
  """The page that the results make, and its picture."""
  (folder / "recurrent.md").write_text(page(found, stored.read(cost.NAME, cost.FOLDER)))
  draw(found, folder / "recurrent.png")


if __name__ == "__main__":
  main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
