"""CIFAR-10 with a ResNet of the shape of He et al.'s (2016, section 4.2): three stages.

Sized for an accelerator. On a CPU, try --config.patch=2 --config.blocks=1,1,1.
"""

import ml_collections

from examples import settings


def get_config() -> ml_collections.ConfigDict:
  config = settings.defaults("cifar10")
  config.augment = "flip_shift"
  config.widths = (32, 64, 128)
  config.blocks = (2, 2, 2)
  config.optimizer = "sgd"
  config.learning_rate = 0.2
  config.weight_decay = 5e-4
  config.warmup_steps = 500
  config.label_smoothing = 0.1
  config.batch_size = 512
  config.steps = 3000  # thirty epochs
  config.log_every = 50
  config.eval_every = 200
  config.save_every = 200
  config.eval_batch_size = 1000
  return config
