"""A small job for the tests of the trainer's parts."""

import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from examples import models, optimizers, settings, steps

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

  def __init__(self, config: Any, count: int, axis_name: str | None = steps.AXIS):
    self.devices = jax.local_devices()[:count]
    self.model = models.create(config, IMAGE_SHAPE, CLASSES, axis_name)
    self.optimizer = optimizers.create(config)
    self.state = steps.init_state(self.model, self.optimizer, config.seed, IMAGE_SHAPE)
    self.train_body = functools.partial(
      steps.train_step,
      model=self.model,
      optimizer=self.optimizer,
      label_smoothing=config.label_smoothing,
    )
    self.eval_body = functools.partial(steps.eval_step, model=self.model)

  def train(self, count: int) -> tuple[steps.TrainState, list[float]]:
    """The state (still on the devices) after `count` steps, and the mean loss of each."""
    step = steps.pmap_step(self.train_body, self.devices, donate_state=True)
    state, losses = steps.replicate(self.state, self.devices), []
    for i in range(count):
      state, sums = step(state, steps.shard(batch(32, seed=i), self.devices))
      sums = steps.unreplicate(sums)
      losses.append(float(sums.loss) / int(sums.count))
    return state, losses
