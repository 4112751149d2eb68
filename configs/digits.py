"""scikit-learn's 8x8 handwritten digits with a small ResNet: under a minute on two cores."""

import ml_collections

from examples import settings


def get_config() -> ml_collections.ConfigDict:
  config = settings.defaults("digits")
  config.augment = "none"
  config.widths = (16, 32)
  config.blocks = (1, 1)
  config.batch_size = 128
  config.steps = 400
  config.eval_batch_size = 360
  return config
