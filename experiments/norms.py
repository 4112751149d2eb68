"""Each norm on one task: accuracy, divergence and step time, against batch sizes and depths.

  python -m experiments.norms           minutes on two cores
  python -m experiments.norms --long    more data and batch sizes, and three seeds

A small ResNet on Fashion-MNIST, with the trainer's own step (`examples.steps`) in a scan over the
batches. Every run sees the same number of examples. Each norm has the learning rate, of `RATES`,
that is best for it at the reference batch on training images held out; other batch sizes have it in
proportion (Goyal et al. 2017), other depths as it is. All of `examples.norms` take part, and the
normalizer-free ResNet.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import math
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

from benchmarks import results as stored
from benchmarks.frameworks import cores
from examples import data, models, settings, steps
from examples.norms import NORMS

FOLDER = pathlib.Path(__file__).resolve().parent / "results"
REFERENCE_BATCH = 128
RATES, MOMENTUM = (0.05, 0.2, 0.8), 0.9  # at the reference batch
HELD_OUT = 5_000  # training images, by which a rate is chosen
CHANCE = 0.1
WIDTHS, PATCH = (8, 16), 4
TIMED_BATCHES = (32, 512)
TIMINGS = 15


class Case(NamedTuple):
  """Training runs that differ in nothing but the seed."""

  norm: str
  batch_size: int = REFERENCE_BATCH
  depth: int = 1  # blocks in each of the two stages
  skip: bool = True
  seeds: int = 1
  examples: int = 40_960
  rate: float = RATES[0]
  dataset: str = "fashion_mnist"


class Setting(NamedTuple):
  """How much is run."""

  batch_sizes: tuple[int, ...] = (2, 8, 32, 128, 512)
  depths: tuple[int, ...] = (1, 4)
  seeds: int = 1
  examples: int = 40_960


QUICK = Setting()
LONG = Setting((2, 4, 8, 32, 128, 512), seeds=3, examples=61_440)


def main() -> None:
  parser = argparse.ArgumentParser(description="Compares all norms on Fashion-MNIST.")
  parser.add_argument("--long", action="store_true", help="more data, batch sizes and seeds")
  setting = LONG if parser.parse_args().long else QUICK
  command = "make compare-norms" + (" ARGS=--long" if setting is LONG else "")
  console = Console()
  started = time.perf_counter()
  try:
    data.load(
      Case._field_defaults["dataset"]
    )  # whatever is wrong with the files is said here, once
  except OSError as error:
    raise SystemExit(f"error: {error}") from None
  bases = [Case(norm, seeds=setting.seeds, examples=setting.examples) for norm in names()]
  rates = in_parallel(best_rate, bases, "Choosing learning rates", console)
  bases = [base._replace(rate=rate) for base, rate in zip(bases, rates, strict=True)]
  cases = [case for base in bases for case in departures(base, setting)]
  rows = [row for rows in in_parallel(run, cases, "Training", console) for row in rows]
  rows += step_times(console)
  stored.write("norms", command, rows, FOLDER / "norms.json")
  console.print(f"It took {(time.perf_counter() - started) / 60:.1f} minutes.")


def names() -> list[str]:
  """The norms that are compared, and the network without any."""
  return [*NORMS, "nf_resnet"]


def departures(base: Case, setting: Setting) -> Iterator[Case]:
  """A norm at every batch size, and at every depth with and without skip connections."""
  for size in setting.batch_sizes:
    yield base._replace(batch_size=size)  # the base among them
  for depth, skip in itertools.product(setting.depths, (True, False)):
    case = base._replace(depth=depth, skip=skip)
    if case != base:
      yield case


def in_parallel(work: Any, cases: list[Case], what: str, console: Console) -> Iterator[Any]:
  """What `work` gives for each case, on as many processes as there are cores."""
  context = multiprocessing.get_context("spawn")
  with (
    concurrent.futures.ProcessPoolExecutor(cores(), context, _on_one_core) as pool,
    Progress(console=console) as progress,
  ):
    task = progress.add_task(what, total=len(cases))
    for result in pool.map(work, cases):
      progress.advance(task)
      yield result


def _on_one_core() -> None:
  os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def network(case: Case, image_shape: Sequence[int]) -> Any:
  """The network of a case, by the trainer's config."""
  config = settings.defaults(case.dataset)
  config.widths, config.blocks, config.patch = WIDTHS, (case.depth, case.depth), PATCH
  config.skip = case.skip
  if case.norm in models.MODELS:
    config.model, config.norm = case.norm, "none"
  else:
    config.norm = case.norm
  return models.create(config, image_shape, 10, None)


def optimizer(case: Case, rate: Any) -> optax.GradientTransformation:
  """Momentum SGD, warmed up over a twentieth of the examples, then half a cosine."""
  total = case.examples // case.batch_size
  unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(total // 20, 1), total)
  peak = rate * case.batch_size / REFERENCE_BATCH
  return optax.sgd(lambda step: peak * unit(step), momentum=MOMENTUM, nesterov=True)


def best_rate(case: Case) -> float:
  """Of `RATES`, the one with which the first seed does best on training images held out."""
  train, _ = arrays(case.dataset)
  kept = len(train["label"]) - HELD_OUT
  rest = jax.tree.map(lambda a: a[:kept], train)
  held_out = jax.tree.map(lambda a: a[kept:], train)
  training, testing = programs(case, train)
  accuracies = []
  for rate in RATES:
    state, _ = training(rate, 0, rest)
    accuracies.append(int(testing(state, held_out).correct))
  return RATES[int(np.argmax(accuracies))]


def run(case: Case) -> list[dict[str, Any]]:
  """Trains and tests once for every seed."""
  train, test = arrays(case.dataset)
  training, testing = programs(case, train)
  rows = []
  for seed in range(case.seeds):
    state, losses = training(case.rate, seed, train)
    sums = testing(state, test)
    accuracy, loss = int(sums.correct) / int(sums.count), float(sums.loss) / int(sums.count)
    finite = math.isfinite(loss) and bool(jnp.isfinite(losses).all())
    rows.append(
      {
        "kind": "training",
        **{k: v for k, v in case._asdict().items() if k != "seeds"},
        "seed": seed,
        "accuracy": accuracy,
        "loss": loss if math.isfinite(loss) else None,
        "diverged": not finite or accuracy < 2 * CHANCE,
      }
    )
  return rows


def programs(
  case: Case, train: dict[str, jax.Array]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """(rate, seed, examples) to the trained state and every loss; (state, examples) to test sums."""
  shape = train["image"].shape[1:]
  model = network(case, shape)

  @jax.jit
  def scan(rate: jax.Array, state: Any, train: Any, order: jax.Array) -> tuple[Any, jax.Array]:
    descent = optimizer(case, rate)

    def step(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
      batch = jax.tree.map(lambda a: a[index], train)
      state, sums = steps.train_step(state, batch, model=model, optimizer=descent)
      return state, sums.loss / sums.count

    return jax.lax.scan(step, state, order)

  def training(rate: float, seed: int, examples: Any) -> tuple[Any, jax.Array]:
    state = steps.init_state(model, optimizer(case, rate), seed, shape)
    order = shuffled(len(examples["label"]), case, seed)
    return scan(jnp.float32(rate), state, examples, order)

  @jax.jit
  def testing(state: Any, examples: dict[str, jax.Array]) -> Any:
    mask = jnp.ones(len(examples["label"]), bool)
    return steps.eval_step(state, examples | {"mask": mask}, model=model)

  return training, testing


def shuffled(size: int, case: Case, seed: int) -> jax.Array:
  """The indices of every batch, each epoch in an order of its own."""
  keys = jax.random.split(jax.random.key(seed), -(-case.examples // size))
  order = jnp.concatenate([jax.random.permutation(key, size) for key in keys])
  return order[: case.examples].reshape(-1, case.batch_size)


@functools.cache
def arrays(name: str) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """The training and the test set, standardized."""
  dataset = data.load(name)
  mean, std = dataset.train_images.mean(), dataset.train_images.std()

  def standardized(images: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
    return {"image": jnp.asarray((images - mean) / std, jnp.float32), "label": jnp.asarray(labels)}

  train = standardized(dataset.train_images, dataset.train_labels)
  return train, standardized(dataset.test_images, dataset.test_labels)


def step_times(console: Console) -> Iterator[dict[str, Any]]:
  """The time of a training step of each norm, measured in turn, so that a busy moment hits all."""
  for batch_size in TIMED_BATCHES:
    ready = {name: _step(Case(name, batch_size)) for name in names()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _, name in itertools.product(range(TIMINGS), ready):
      started = time.perf_counter()
      ready[name]()
      times[name].append((time.perf_counter() - started) * 1e3)
    console.print(f"Timed {len(ready)} norms at {batch_size} examples.")
    for name, measured in times.items():
      yield {
        "kind": "time",
        "norm": name,
        "batch_size": batch_size,
        "minimum_ms": min(measured),
        "median_ms": statistics.median(measured),
      }


def _step(case: Case) -> Callable[[], None]:
  """A training step, compiled and run once."""
  train, _ = arrays(case.dataset)
  batch = jax.tree.map(lambda a: a[: case.batch_size], train)
  shape = train["image"].shape[1:]
  model, descent = network(case, shape), optimizer(case, case.rate)
  state = steps.init_state(model, descent, 0, shape)
  step = jax.jit(lambda s, b: steps.train_step(s, b, model=model, optimizer=descent))

  def timed() -> None:
    jax.block_until_ready(step(state, batch))

  timed()
  return timed


if __name__ == "__main__":
  main()
