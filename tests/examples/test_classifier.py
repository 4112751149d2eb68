"""The few lines that train a classifier."""

import flax.linen as nn
import numpy as np
import optax

from examples import classifier, data


def test_it_learns_and_counts_what_it_gets_right():
  class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train):
      return nn.Dense(10)(images.reshape(len(images), -1))

  dataset, model, optimizer = data.load("digits"), Linear(), optax.adam(1e-2)
  start = classifier.initialize(model, dataset.train_images)
  step = classifier.training_step(model, optimizer)
  state = optimizer.init(start["params"])
  *_, (variables, _) = classifier.training(step, start, state, dataset, steps=60, batch=64)
  predict = lambda given, x: model.apply(given, x, train=False)  # noqa: E731
  batches = np.array_split(classifier.scaled(dataset.test_images), 2)
  found = classifier.accuracy(predict, variables, batches, dataset.test_labels)
  logits = predict(variables, dataset.test_images / 255)
  assert found == np.mean(logits.argmax(-1) == dataset.test_labels, dtype=np.float32) > 0.7
