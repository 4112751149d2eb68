"""A trained run at work: restored from its directory, tested, and asked about one image.

  python -m examples.predict runs/digits 5
  python -m examples.predict runs/digits image.png

The image is one of the test set, by its number, or a picture of the network's size.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from examples import checkpoints, data, models, parallelism, run_directory, steps
from examples.settings import UserError


def predict(directory: Path, image: str) -> np.ndarray:
  """Tests the run in `directory` and gives the probabilities of each class for `image`."""
  config = run_directory.read_config(directory)
  dataset = data.load(config.dataset, config.data_dir or None, download=config.download)
  model = models.create(config, dataset.test_images.shape[1:], len(dataset.class_names), None)
  step, variables = checkpoints.read(directory / "checkpoints")

  parallel = parallelism.Jit(jax.devices()[:1])
  test = parallel.step(lambda *args, axis_name: steps.eval_step(*args, model=model))
  state = parallel.replicate(steps.TrainState(step, **variables, opt_state=()))
  batches = data.test_batches(dataset, config.eval_batch_size)
  loss, accuracy, count = steps.evaluate(test, state, batches, parallel)
  print(f"{directory} after step {step}: test loss {loss:.4f}, accuracy {accuracy:.2%} of {count}.")

  images = data.standardizer(dataset.train_images)(pixels(image, dataset)[None])
  probabilities = np.asarray(jax.nn.softmax(model.apply(variables, images, train=False)[0]))
  best = np.argsort(-probabilities)[:3]
  print(f"{image}:", ", ".join(f"{dataset.class_names[i]} {probabilities[i]:.1%}" for i in best))
  return probabilities


def pixels(image: str, dataset: data.Dataset) -> np.ndarray:
  """(H, W, C) uint8, of a test image or a file."""
  examples, height, width, channels = dataset.test_images.shape
  if image.isdecimal() and int(image) < examples:
    return dataset.test_images[int(image)]
  if image.isdecimal():
    raise UserError(f"there is no test image {image}: they are 0 to {examples - 1}")
  picture = Image.open(image).convert("L" if channels == 1 else "RGB")
  if picture.size != (width, height):
    raise UserError(f"{image} is {picture.size} pixels large, but must be {(width, height)}")
  return np.asarray(picture).reshape(height, width, channels)


if __name__ == "__main__":
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  try:
    predict(Path(sys.argv[1]), sys.argv[2])
  except (UserError, OSError, ValueError) as error:
    sys.exit(f"error: {error}")
