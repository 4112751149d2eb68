"""Every file in configs/ is a config that the trainer takes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from examples import command_line, models, optimizers, settings

# ml_collections loads config files by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

FILES = sorted(Path("configs").glob("[a-z]*.py"))
SHAPES = {
  "digits": (8, 8, 1),
  "mnist": (28, 28, 1),
  "fashion_mnist": (28, 28, 1),
  "cifar10": (32, 32, 3),
}


def test_there_is_one_for_each_data_set():
  assert {file.stem for file in FILES} >= set(SHAPES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_describes_a_job(file):
  config = command_line.parse(["train.py", f"--config={file}"], "")
  settings.check(config, 4)
  assert config.workdir == f"runs/{file.stem}"
  shape = SHAPES[config.dataset]
  model = models.create(config, shape, 10, None)
  optimizers.create(config, decays=True)
  images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  init = functools.partial(model.init, train=False)
  assert jax.eval_shape(init, jax.random.key(0), images)["batch_stats"]
