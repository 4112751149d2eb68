"""Batch renormalization (Ioffe 2017) beside batch normalization, where batches are small.

  python -m experiments.renorm [folder]

Small networks learn scikit-learn's digits with batches of 2 to 32 examples, drawn evenly or from
two classes at a time (the paper has experiments on small minibatches and on some that are not
i.i.d.). Writes renorm.json, renorm.md and renorm.png to folder (docs): the accuracy in evaluation,
on the test set, over several seeds. Takes some minutes.
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

import jaxbn
from benchmarks import results as stored
from experiments.splits import Split, batches, splits
from jaxbn.variants import renorm

FOLDER = Path("docs")
METHODS = {"batch norm": "#9bb8d3", "batch renorm": "#c8452c", "no norm": "0.55"}
CONVOLUTIONAL, CONNECTED = "convolutional", "fully connected"
# Layer by layer: a patch of so many positions squared becomes one, of so many channels.
NETWORKS = {
  CONVOLUTIONAL: ((2, 32), (1, 32), (2, 64)),
  CONNECTED: ((8, 64), (1, 64), (1, 64)),
}


class Setting(NamedTuple):
  """A network, and whether a batch's examples are of two classes, or drawn evenly."""

  network: str
  two_classes: bool

  @property
  def title(self) -> str:
    return f"{self.network}, {'two classes in a batch' if self.two_classes else 'drawn evenly'}"


SETTINGS = (Setting(CONVOLUTIONAL, False), Setting(CONVOLUTIONAL, True), Setting(CONNECTED, False))
MOMENTUM = 0.9  # of the gradients


class Plan(NamedTuple):
  """What is run; the defaults are those of the page."""

  batch_sizes: tuple[int, ...] = (2, 4, 8, 32)
  epochs: int = 6
  seeds: int = 3
  # Of batches of 32; for others proportional. That of the best validation accuracy counts.
  learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)


# The network


def start(key: jax.Array, kind: str, outputs: int) -> tuple[list[Any], list[Any]]:
  """Parameters and running statistics."""
  parameters, states, channels = [], [], 1
  for patch, size in (*NETWORKS[kind], (1, outputs)):
    key, of_layer = jax.random.split(key)
    inputs, channels = patch**2 * channels, size
    weights = jax.random.normal(of_layer, (inputs, size)) * np.sqrt(2 / inputs)
    parameters.append({"weights": weights, "scale": jnp.ones(size), "bias": jnp.zeros(size)})
    states.append(jaxbn.init(size, debias=True))
  return parameters, states[:-1]


def patches(x: jax.Array, size: int) -> jax.Array:
  """Squares of positions, which do not overlap, as the channels of one position."""
  n, height, width, channels = x.shape
  x = x.reshape(n, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // size, width // size, -1)


def network(
  kind: str, method: str, parameters: list[Any], states: list[Any], x: jax.Array, limits: Any = None
) -> tuple[jax.Array, list[Any]]:
  """Logits and new states; limits are r_max and d_max in training, None in evaluation."""
  new_states = []
  for (patch, _), layer, state in zip(NETWORKS[kind], parameters[:-1], states, strict=True):
    x = patches(x, patch) @ layer["weights"]
    x, new_state = normalized(method, x, layer["scale"], layer["bias"], state, limits)
    x = jax.nn.relu(x)
    new_states.append(new_state)
  return x.mean((1, 2)) @ parameters[-1]["weights"] + parameters[-1]["bias"], new_states


def normalized(
  method: str, x: jax.Array, scale: jax.Array, bias: jax.Array, state: Any, limits: Any
) -> tuple[jax.Array, Any]:
  """One layer of normalization, or none."""
  if method == "no norm":
    return x * scale + bias, state
  options: dict[str, Any] = {"use_running_average": limits is None, "debias": True}
  if method == "batch norm" or limits is None:
    return jaxbn.batch_norm(x, scale, bias, state, **options)
  r_max, d_max = limits
  return renorm.batch_renorm(x, scale, bias, state, r_max=r_max, d_max=d_max, **options)


def limits(steps: int) -> tuple[optax.Schedule, optax.Schedule]:
  """The paper's r_max and d_max, in shares of the training instead of its thousands of steps."""
  first, d_end, r_end = (round(share * steps) for share in (0.05, 0.25, 0.4))
  return (
    optax.linear_schedule(1.0, 3.0, max(r_end - first, 1), first),
    optax.linear_schedule(0.0, 5.0, max(d_end - first, 1), first),
  )


def train(
  kind: str,
  method: str,
  train: Split,
  tests: list[Split],
  key: jax.Array,
  order: jax.Array,
  rate: jax.Array,
) -> list[jax.Array]:
  """One training, and the accuracies that it leads to."""
  images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
  steps, size = order.shape
  r_max, d_max = limits(steps)
  falling = optax.cosine_decay_schedule(1.0, steps)
  parameters, states = start(key, kind, int(train.labels.max()) + 1)

  def step(carry: Any, t_and_batch: Any) -> tuple[Any, None]:
    parameters, states, velocity = carry
    t, batch = t_and_batch

    def loss(parameters: Any) -> tuple[jax.Array, Any]:
      limits = r_max(t), d_max(t)
      logits, new_states = network(kind, method, parameters, states, images[batch], limits)
      each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
      return each.mean(), new_states

    gradient, states = jax.grad(loss, has_aux=True)(parameters)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradient)
    now = rate * size / 32 * falling(t)
    parameters = jax.tree.map(lambda p, v: p - now * v, parameters, velocity)
    return (parameters, states, velocity), None

  carry = parameters, states, jax.tree.map(jnp.zeros_like, parameters)
  (parameters, states, _), _ = lax.scan(step, carry, (jnp.arange(steps), order))

  def accuracy(split: Split) -> jax.Array:
    logits, _ = network(kind, method, parameters, states, jnp.asarray(split.images))
    return jnp.mean(jnp.argmax(logits, -1) == split.labels)

  return [accuracy(split) for split in tests]


# What came of it


def run(plan: Plan, splits: dict[str, Split], say: Callable[[str], None]) -> list[dict[str, Any]]:
  """A row for each setting, batch size and method."""
  rows, labels = [], splits["train"].labels
  for setting in SETTINGS:
    for size in plan.batch_sizes:
      steps = plan.epochs * len(labels) // size
      of_seeds = [
        batches(setting.two_classes, labels, size, steps, seed) for seed in range(plan.seeds)
      ]
      for method in METHODS:
        found = best_of_rates(setting.network, method, plan, splits, np.stack(of_seeds))
        row = {"setting": setting.title, "batch_size": size, "steps": steps, "method": method}
        rows.append(row | found)
        say(f"{setting.title}, {size} examples, {method}: {spread(rows[-1])}")
  return rows


def best_of_rates(
  kind: str, method: str, plan: Plan, splits: dict[str, Split], order: np.ndarray
) -> dict[str, Any]:
  """The learning rate of the best validation accuracy (the mean of the seeds), and its test."""
  tests = [splits["validation"], splits["test"]]
  of_rates = jax.vmap(
    functools.partial(train, kind, method, splits["train"], tests), (None, None, 0)
  )
  of_seeds = jax.jit(jax.vmap(of_rates, (0, 0, None)))
  keys = jax.random.split(jax.random.key(0), plan.seeds)
  validation, test = of_seeds(keys, jnp.asarray(order), jnp.asarray(plan.learning_rates))
  best = int(np.argmax(np.mean(validation, axis=0)))
  return {
    "learning_rate": plan.learning_rates[best],
    "accuracies": [round(float(a), 4) for a in np.asarray(test)[:, best]],
  }


def spread(row: dict[str, Any]) -> str:
  """Mean and standard deviation over the seeds, in percent."""
  accuracies = 100 * np.asarray(row["accuracies"])
  return f"{accuracies.mean():.1f} ± {accuracies.std(ddof=1):.1f}"


def by_size(rows: list[dict[str, Any]], title: str) -> Iterator[list[str]]:
  """The lines of a table: batch size and steps, then the methods."""
  cells = {(r["batch_size"], r["method"]): r for r in rows if r["setting"] == title}
  for size in dict.fromkeys(size for size, _ in cells):
    found = [cells[size, method] for method in METHODS]
    yield [str(size), str(found[0]["steps"]), *map(spread, found)]


def titles(rows: list[dict[str, Any]]) -> list[str]:
  """The settings, in their order."""
  return list(dict.fromkeys(row["setting"] for row in rows))


HEADING = ["examples per batch", "steps", *METHODS]


def show(rows: list[dict[str, Any]], console: Console) -> None:
  """Prints a table for each setting."""
  for title in titles(rows):
    table = Table(*HEADING, title=f"{title}: test accuracy in %, mean ± standard deviation")
    for line in by_size(rows, title):
      table.add_row(*line)
    console.print(table)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
  """Writes a PNG with a panel for each setting; a dot for each seed."""
  figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)  # no window system, no global state
  figure.suptitle("Digits, evaluated: batch renormalization where batches are small")
  (panels,) = figure.subplots(1, len(titles(rows)), sharey=True, squeeze=False)
  for axes, title in zip(panels, titles(rows), strict=True):
    for method, colour in METHODS.items():
      found = [r for r in rows if (r["setting"], r["method"]) == (title, method)]
      sizes = [r["batch_size"] for r in found]
      means = [np.mean(r["accuracies"]) for r in found]
      axes.plot(sizes, means, color=colour, linewidth=1.8, label=method)
      for row in found:
        every = row["accuracies"]
        axes.plot([row["batch_size"]] * len(every), every, "o", color=colour, markersize=3.5)
    axes.set(title=title, xlabel="examples per batch")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel("test accuracy")
  panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
  panels[-1].legend(frameon=False, loc="lower right")
  figure.savefig(file)


def _described() -> str:
  """The networks, in a sentence each."""
  described = []
  for kind, layers in NETWORKS.items():
    of = ", ".join(f"{patch}x{patch} to {channels}" for patch, channels in layers)
    described.append(f"The {kind} network: patches of {of} channels, then a mean over positions.")
  return " ".join(described)


def page(found: dict[str, Any]) -> str:
  """docs/renorm.md."""
  plan = found["plan"]
  rates = ", ".join(map(str, plan["learning_rates"]))
  parts = [
    "# Batch renormalization where batches are small",
    "Made by `python -m experiments.renorm` from what it found, renorm.json. Nothing here is "
    "typed by hand.",
    f"scikit-learn's digits, {plan['epochs']} epochs of stochastic gradient descent with momentum "
    "and a learning rate that falls as a cosine to 0. Each layer is normalized before its ReLU. "
    f"{_described()} Of the learning rates {rates} (for batches of 32; for others in proportion to "
    "the batch) each cell has the one that was best on a part of the training set that was held "
    "out. r_max and d_max follow the paper's schedules, in shares of the training: 1 and 0 for 5%, "
    "then up to 3 at 40% and 5 at 25%. Accuracy on the test set in evaluation, by the running "
    f"statistics: mean and standard deviation over {plan['seeds']} seeds, in %.",
    "Each channel of the fully connected network has as many elements as a batch has examples. Of "
    "two, batch normalization makes 1 and -1, whatever they were, so that no gradient comes "
    "through to what is before it. In batch renormalization r and d give the output its size "
    "again, but they are constants to the derivative: that gradient is 0 there, too.",
    "![Test accuracy over the batch size](renorm.png)",
    f"Run on {found['date']}, with "
    + ", ".join(f"{name} {found['versions'][name]}" for name in ("jax", "numpy"))
    + f"; {found['machine']['cpu']}, {found['machine']['cores']} cores.",
  ]
  for title in titles(found["rows"]):
    parts += [
      f"## {title.capitalize()}",
      stored.table([HEADING, *by_size(found["rows"], title)], range(5)),
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
  write(found, folder)
  show(rows, console)
  return found


def write(found: dict[str, Any], folder: Path) -> None:
  """The results, the page that they make, and its picture."""
  (folder / "renorm.json").write_text(json.dumps(found, indent=1) + "\n")
  (folder / "renorm.md").write_text(page(found))
  draw(found["rows"], folder / "renorm.png")


if __name__ == "__main__":
  main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
