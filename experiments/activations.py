"""What an activation does to what goes into it, layer by layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.classification import Look
from experiments.networks import Perceptron
from experiments.splits import splits

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def inside(model: Perceptron, dataset: str, read: int, steepest: float) -> Look:
  """What is seen in each hidden layer of a perceptron.

  `asleep`: where the activation's slope is below a tenth of its greatest, as a share of units and
  images; `dead`: units that are so on all images. `read_before`, `read_after`: the accuracy on test
  images of a linear readout of what goes into the activation and of what comes out. `recovered`:
  the share of the former's variance that is linear in the latter. `scale`, `bias`: quantiles over
  the units.

  Args:
    model: the perceptron.
    dataset: its name.
    read: how many images held out the readouts are fitted to, and how many test images they read.
    steepest: the activation's greatest slope.
  """
  held_out, test = splits(dataset)["validation"], splits(dataset)["test"]
  images = jnp.asarray(np.concatenate([held_out.images[:read], test.images[:read]]))
  classes = jax.nn.one_hot(held_out.labels[:read], model.classes)
  right = jnp.asarray(test.labels[:read])
  fitted = len(classes)

  def layer(into: jax.Array) -> dict[str, jax.Array]:
    out, slope = jax.jvp(model.activation, (into,), (jnp.ones_like(into),))
    asleep = slope < steepest / 10

    def accuracy(x: jax.Array) -> jax.Array:
      return (linear(x[:fitted], classes, x[fitted:]).argmax(-1) == right).mean()

    missed = into[fitted:] - linear(out[:fitted], into[:fitted], out[fitted:])
    return {
      "asleep": asleep.mean(),
      "dead": asleep.all(0).mean(),
      "read_before": accuracy(into),
      "read_after": accuracy(out),
      "recovered": 1 - jnp.square(missed).sum() / (into[fitted:].var(0) * len(missed)).sum(),
    }

  def look(variables: Any) -> dict[str, jax.Array]:
    _, seen = model.apply(variables, images, False, mutable=["intermediates"])
    found = jax.vmap(layer)(jnp.stack(seen["intermediates"]["input"]))
    norms = [v for k, v in sorted(variables["params"].items()) if k.startswith("BatchNorm")]
    for name in ("scale", "bias") if norms else ():
      learned = jnp.stack([norm[name] for norm in norms])
      found[name] = jnp.quantile(learned, jnp.array(QUANTILES), axis=-1).T
    return found

  return look


def linear(x: jax.Array, target: jax.Array, new: jax.Array) -> jax.Array:
  """The least-squares fit to the target that is linear in x, with a constant, at new x."""
  mean, std = x.mean(0), x.std(0) + 1e-6
  x, new = (x - mean) / std, (new - mean) / std
  ridge = 1e-4 * jnp.eye(x.shape[1])
  weights = jnp.linalg.solve(x.T @ x / len(x) + ridge, x.T @ (target - target.mean(0)) / len(x))
  return new @ weights + target.mean(0)
