"""MNIST with a small VGG."""

import ml_collections

from examples import settings


def get_config() -> ml_collections.ConfigDict:
  config = settings.defaults("mnist")
  config.augment = "shift"
  config.model = "vgg"
  config.widths = (16, 32, 64)
  config.blocks = (1, 1, 1)
  config.patch = 2
  config.warmup_steps = 100
  config.batch_size = 256
  config.steps = 1200  # five epochs
  config.log_every = 50
  config.eval_every = 200
  config.save_every = 200
  config.eval_batch_size = 1000
  return config
