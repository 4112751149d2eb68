"""Synchronized batch normalization in plain JAX: a small network learns to read digits.

  python -m examples.minimal

Each device gets its part of every batch; the statistics are those of the whole batch.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxbn
from examples import data

CHANNELS = 1, 16, 32, 64
BATCH, STEPS, LOG_EVERY = 128, 300, 50
optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))


@jax.jit
def init(key: jax.Array) -> tuple[Any, Any]:
  """Parameters and running statistics."""
  params, stats = [], []
  for inputs, outputs in itertools.pairwise(CHANNELS):
    key, layer_key = jax.random.split(key)
    kernel = jax.random.normal(layer_key, (3, 3, inputs, outputs)) / jnp.sqrt(9 * inputs / 2)
    params.append({"kernel": kernel, "scale": jnp.ones(outputs), "bias": jnp.zeros(outputs)})
    stats.append(jaxbn.init(outputs))
  classifier = jax.random.normal(key, (CHANNELS[-1], 10)) / jnp.sqrt(CHANNELS[-1])
  return (params, classifier), stats


def network(params: Any, stats: Any, images: jax.Array, training: bool) -> tuple[jax.Array, Any]:
  """Logits, and the new running statistics."""
  normalize = functools.partial(
    jaxbn.batch_norm,
    use_running_average=not training,
    axis_name="devices",
    momentum=0.9,
    activation=jax.nn.relu,
  )
  x, new_stats = images, list[Any]()
  layers, classifier = params
  for layer, old in zip(layers, stats, strict=True):
    x = lax.conv_general_dilated(
      x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, new = normalize(x, layer["scale"], layer["bias"], old)
    new_stats.append(new)
  return x.mean((1, 2)) @ classifier, new_stats


@functools.partial(jax.pmap, axis_name="devices", in_axes=(None, None, None, 0, 0), out_axes=None)
def step(params: Any, stats: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
  """What each device does with its part of the batch; all end with the same parameters."""

  def loss_fn(params: Any) -> tuple[jax.Array, Any]:
    logits, new_stats = network(params, stats, images, training=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new_stats

  (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  loss, grads = lax.pmean((loss, grads), "devices")
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), stats, opt_state, loss


@jax.jit
def accuracy(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
  """By the running statistics: no example depends on another."""
  logits, _ = network(params, stats, images, training=False)
  return (logits.argmax(-1) == labels).mean()


def main() -> None:
  digits = data.load("digits")
  train_images, test_images = digits.train_images / 255.0, digits.test_images / 255.0
  params, stats = init(jax.random.key(0))
  opt_state = optimizer.init(params)
  rng = np.random.default_rng(0)
  for number in range(1, STEPS + 1):
    batch = rng.choice(len(train_images), (jax.device_count(), BATCH // jax.device_count()))
    params, stats, opt_state, loss = step(
      params, stats, opt_state, train_images[batch], digits.train_labels[batch]
    )
    if number % LOG_EVERY == 0:
      tested = accuracy(params, stats, test_images, digits.test_labels)
      print(f"step {number}: training loss {loss:.4f}, test accuracy {tested:.2%}")


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 4)  # where there is no accelerator
  main()
