"""A small job for the tests of the trainer's parts."""

import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from examples import microbatches, models, optimizers, parallelism, settings, steps

IMAGE_SHAPE = (8, 8, 1)
CLASSES = 10


def config(**changes: Any) -> ml_collections.ConfigDict:
  """Digits with a network that compiles in a second, over four of the eight test devices."""
  result = settings.defaults("digits")
  result.update(
    widths=(4,),
    blocks=(1,),
    batch_size=32,
    steps=10,
    warmup_steps=2,
    devices=4,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    eval_batch_size=120,
    log_every=5,
    eval_every=10,
    save_every=5,
  )
  result.update(changes)
  return result


def batch(size: int, seed: int = 0) -> dict[str, np.ndarray]:
  """A batch of noise: (size, 8, 8, 1) images with a mean, (size,) labels, all valid."""
  random = np.random.default_rng(seed)
  return {
    "image": random.normal(1.0, 2.0, (size, *IMAGE_SHAPE)).astype(np.float32),
    "label": random.integers(0, CLASSES, size).astype(np.int32),
    "mask": np.ones(size, bool),
  }


class Job:
  """Model, first state and steps of a config, on the first `count` devices."""

  def __init__(self, config: Any, count: int):
    self.parallel = parallelism.create(config, jax.devices()[:count])
    accumulation = config.microbatches, config.microbatch_statistics
    axes = microbatches.axes(self.parallel.axis_name, *accumulation)
    virtual = settings.virtual_batch_size(config, count)
    self.model = models.create(config, IMAGE_SHAPE, CLASSES, axes, virtual)
    self.optimizer = optimizers.create(config, models.decays(self.model, IMAGE_SHAPE))
    self.state = steps.init_state(self.model, self.optimizer, config.seed, IMAGE_SHAPE)
    self.train_body = functools.partial(
      steps.train_step,
      model=self.model,
      optimizer=self.optimizer,
      label_smoothing=config.label_smoothing,
      accumulate=microbatches.create(*accumulation),
      skip_nonfinite=optimizers.skips(config),
    )
    self.eval_body = functools.partial(steps.eval_step, model=self.model)

  @functools.cached_property
  def step(self) -> Any:
    """The training step on all devices."""
    return self.parallel.step(self.train_body, donate_state=True)

  def train(self, batches: Any) -> tuple[steps.TrainState, list[steps.Sums]]:
    """The state and the sums, on the host, after a step with each of `batches`.

    A number stands for so many batches of noise.
    """
    if isinstance(batches, int):
      batches = [batch(32, seed=i) for i in range(batches)]
    state, results = self.parallel.replicate(self.state), []
    for each in batches:
      state, sums = self.step(state, self.parallel.shard(each))
      results.append(steps.unreplicate(sums))
    return steps.unreplicate(state), results


def mean_losses(results: list[steps.Sums]) -> list[float]:
  """The mean loss of each step."""
  return [float(sums.loss) / int(sums.count) for sums in results]
