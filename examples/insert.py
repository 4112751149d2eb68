"""Batch norm enters a trained VGG that has none: which of the two is better trained on?

  python -m examples.insert [DIRECTORY]

Both are fine-tuned from the same weights, each at its own best rate of a few, and their curves are
drawn into the directory. The rate is the one with the least training loss over the last steps; the
test data only show what came of it.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples import classifier, data
from examples.models import VGG
from jaxbn.linen import BatchNorm
from jaxbn.surgery import insert

WIDTHS, BLOCKS = (16, 32), (2, 2)
STEPS, BATCH, TEST_EVERY = 100, 128, 10
BEFORE = 3e-3  # the rate before the norms are there
RATES = 1e-3, 3e-3, 1e-2, 3e-2
LAST = 20  # steps that tell which rate is best


class Curve(NamedTuple):
  """Training loss of each step, and test accuracy of some."""

  rate: float
  losses: list[float]
  accuracies: list[float]

  @property
  def last_loss(self) -> float:
    return float(np.mean(self.losses[-LAST:]))


def trainer(model: Any, digits: Any) -> Callable[..., tuple[Any, Curve]]:
  """A function of variables, rate and seed that trains: new variables, and how it went."""
  optimizer = optax.inject_hyperparams(optax.adam)(1.0)

  step = classifier.training_step(model, optimizer)

  @jax.jit
  def accuracy(variables: Any) -> jax.Array:
    logits = model.apply(variables, digits.test_images / 255.0, train=False)
    return (logits.argmax(-1) == digits.test_labels).mean()

  def train(variables: Any, rate: float, seed: int = 0) -> tuple[Any, Curve]:
    opt_state = optimizer.init(variables["params"])
    opt_state.hyperparams["learning_rate"] = jnp.asarray(rate)
    losses, accuracies = [], [accuracy(variables)]
    steps = classifier.training(step, variables, opt_state, digits, STEPS, BATCH, seed)
    for number, (variables, loss) in enumerate(steps, 1):
      losses.append(loss)
      if number % TEST_EVERY == 0:
        accuracies.append(accuracy(variables))
    return variables, Curve(rate, [float(v) for v in losses], [float(v) for v in accuracies])

  return train


def draw(curves: dict[str, Curve], file: Path) -> None:
  """Writes a PNG of training losses and test accuracies."""
  figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)  # no window system, no global state
  loss, accuracy = figure.subplots(1, 2)
  for name, curve in curves.items():
    label = f"{name}, rate {curve.rate:g}"
    loss.plot(range(1, STEPS + 1), curve.losses, label=label)
    accuracy.plot(range(0, STEPS + 1, TEST_EVERY), curve.accuracies, label=label)
  loss.set_title("Training loss")
  loss.set_ylabel("cross entropy per example (nats, log scale)")
  loss.set_yscale("log")
  accuracy.set_title("Test accuracy")
  accuracy.legend(loc="lower right", frameon=False)
  for axes in (loss, accuracy):
    axes.set_xlabel("steps of fine-tuning")
    axes.grid(alpha=0.25)
  file.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(file)


def main(directory: str = "runs/insert") -> dict[str, Curve]:
  digits = data.load("digits")
  batches = [jnp.asarray(b) / 255.0 for b in np.array_split(digits.train_images, 8)]
  plain = VGG(classes=10, widths=WIDTHS, blocks=BLOCKS, norm="none")
  variables = jax.jit(plain.init, static_argnames="train")(
    jax.random.key(0), batches[0], train=False
  )
  train = trainer(plain, digits)
  variables, curve = train(variables, BEFORE)
  print(f"trained without norm: loss {curve.last_loss:.4f}, accuracy {curve.accuracies[-1]:.2%}")
  norm = functools.partial(BatchNorm, momentum=0.9)
  inserted = insert(plain, variables, batches, norm=norm, train=False)
  print(
    f"{len(inserted.layers)} norm(s) inserted: outputs differ by {inserted.evaluation:.1e} of the "
    f"largest in evaluation, and by {inserted.training:.1e} in training"
  )
  found = {}
  for name, trains, start in (
    ("without norm", train, variables),
    ("norms inserted", trainer(inserted.model, digits), inserted.variables),
  ):
    curves = [trains(start, rate)[1] for rate in RATES]
    for curve in curves:
      print(
        f"{name}, rate {curve.rate:g}: loss {curve.last_loss:.4f}, "
        f"accuracy {curve.accuracies[-1]:.2%}"
      )
    found[name] = min(curves, key=lambda c: np.nan_to_num(c.last_loss, nan=np.inf))
  file = Path(directory) / "curves.png"
  draw(found, file)
  for name, curve in found.items():
    print(f"best {name}: rate {curve.rate:g}, accuracy {curve.accuracies[-1]:.2%}")
  print(f"The curves are in {file}.")
  return found


if __name__ == "__main__":
  main(*sys.argv[1:])
