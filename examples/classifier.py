"""A classifier trained in a few lines, for the examples of `jaxbn.surgery`."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def scaled(images: np.ndarray) -> np.ndarray:
  """uint8 images as float32 in 0..1."""
  return images.astype(np.float32) / 255


def initialize(model: Any, images: np.ndarray) -> Any:
  init = jax.jit(model.init, static_argnames="train")
  return init(jax.random.key(0), scaled(images[:1]), train=False)


def training_step(model: Any, optimizer: Any) -> Callable[..., Any]:
  """A function of (variables, opt_state, images, labels): new variables and state, and the loss."""

  @jax.jit
  def step(variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
    stats = [name for name in variables if name != "params"]

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
      given = variables | {"params": params}
      logits, new = model.apply(given, images, train=True, mutable=stats)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(variables["params"], updates)
    return {**variables, **new, "params": params}, opt_state, loss

  return step


def training(
  step: Callable[..., Any],
  variables: Any,
  opt_state: Any,
  dataset: Any,
  steps: int,
  batch: int,
  seed: int = 0,
) -> Iterator[tuple[Any, jax.Array]]:
  """The variables after each of so many steps, and the loss of the step."""
  rng = np.random.default_rng(seed)
  for _ in range(steps):
    chosen = rng.choice(len(dataset.train_images), batch)
    images, labels = scaled(dataset.train_images[chosen]), dataset.train_labels[chosen]
    variables, opt_state, loss = step(variables, opt_state, images, labels)
    yield variables, loss


def accuracy(
  predict: Callable[..., jax.Array],
  variables: Any,
  batches: list[np.ndarray],
  labels: np.ndarray,
) -> float:
  """The share of images whose label has the largest logit; `predict` takes (variables, images)."""
  found = [predict(variables, images).argmax(-1) for images in batches]
  return float((jnp.concatenate(found) == labels).mean())
