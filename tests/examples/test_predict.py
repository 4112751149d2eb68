"""A run restored, tested and asked: the numbers of the training, whatever names the image."""

import jax
import numpy as np
import pytest
from PIL import Image

from examples import checkpoints, data, predict, reporting, train
from examples.settings import UserError
from tests.examples import helpers


def test_a_run_predicts(tmp_path, capsys):
  config = helpers.config(model="mlp", steps=4, workdir=str(tmp_path / "run"))
  assert train.run(config) == 0
  accuracy = reporting.latest(reporting.read_rows(tmp_path / "run"), "test/accuracy")
  capsys.readouterr()
  probabilities = predict.predict(tmp_path / "run", "5")
  said = capsys.readouterr().out
  assert f"{tmp_path / 'run'} after step 4: test loss " in said
  assert f", accuracy {accuracy:.2%} of 360.\n5: {probabilities.argmax()} " in said
  _, variables = checkpoints.read(tmp_path / "run" / "checkpoints")
  images = next(data.test_batches(data.load("digits"), 6))["image"]
  logits = helpers.Job(config, 1).model.apply(variables, images, train=False)
  np.testing.assert_allclose(probabilities, jax.nn.softmax(logits)[5], rtol=1e-5)

  Image.fromarray(data.load("digits").test_images[5, ..., 0]).save(tmp_path / "five.png")
  again = predict.predict(tmp_path / "run", str(tmp_path / "five.png"))
  np.testing.assert_array_equal(again, probabilities)


@pytest.mark.parametrize("image", ["360", "picture.png"])
def test_what_is_no_image_of_the_network(image, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Image.new("RGB", (9, 8)).save(tmp_path / "picture.png")
  message = "there is no test image 360: they are 0 to 359|picture.png is .9, 8. pixels large, but"
  with pytest.raises(UserError, match=message):
    predict.pixels(image, data.load("digits"))
