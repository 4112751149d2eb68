"""Two problems and three descents on them, with length and direction apart (Kohler et al. 2019).

Least squares on real data (scikit-learn's diabetes study), and a halfspace with Gaussian inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from sklearn.datasets import load_diabetes

from experiments.experiment import WITH, WITHOUT
from jaxbn.alternatives import gdnp

NEAR = 1e-6  # of the first gap
COLOURS = {
  "gradient descent": WITHOUT,
  "accelerated gradient descent": "#9bb8d3",
  "GDNP": WITH,
}
BOUND = "bound"


class Task(NamedTuple):
  """A problem, the direction to start from and the best one, S^-1 E[x y] up to its length."""

  title: str
  problem: gdnp.Problem
  start: jax.Array
  best: jax.Array
  greatest_curvature: float  # of the function of x^T v

  @property
  def smoothness(self) -> jax.Array:
    """What gradient descent may divide its steps by."""
    return self.greatest_curvature * jnp.linalg.eigvalsh(self.problem.second_moment)[-1]


def diabetes() -> Task:
  """Least squares; inputs and target standardized."""
  x, y = load_diabetes(return_X_y=True)
  x, y = ((a - a.mean(0)) / a.std(0) for a in (x, y))
  start, best = jnp.asarray(x.T @ y), jnp.asarray(np.linalg.lstsq(x, y)[0])
  return Task("Least squares: diabetes", gdnp.least_squares(x, y), start, best, 2.0)


def halfspace(inputs: int = 20) -> Task:
  """Logistic regression between two Gaussians that lie well apart, where the loss is flat."""
  mean = -np.random.default_rng(0).normal(size=inputs)
  covariance = np.diag(np.geomspace(0.5, 5, inputs))
  problem = gdnp.gaussian_halfspace(mean, covariance)
  start = jnp.asarray(np.random.default_rng(1).normal(size=inputs))
  best = jnp.linalg.solve(problem.second_moment, mean)
  return Task("Halfspace: Gaussian inputs", problem, start, best, 0.25)


def gradient_descent(task: Task, v: jax.Array, steps: int, accelerated: bool) -> jax.Array:
  """The weights before the first step and after each; accelerated: by Nesterov's momentum."""
  gradient = jax.grad(task.problem.loss)

  def step(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple, jax.Array]:
    v, last = carry
    ahead = v + (t / (t + 3) if accelerated else 0) * (v - last)
    new = ahead - gradient(ahead) / task.smoothness
    return (new, v), new

  _, weights = lax.scan(step, (v, v), jnp.arange(steps))
  return jnp.concatenate([v[None], weights])


def gaps(task: Task, steps: int) -> dict[str, np.ndarray]:
  """By method: how far the loss is from the least, as a share of the first gap, step by step."""
  by_gdnp = jax.jit(lambda start: gdnp.gdnp(task.problem, start, steps)[1])(task.start)
  start = by_gdnp[0]
  runs = {
    "gradient descent": gradient_descent(task, start, steps, accelerated=False),
    "accelerated gradient descent": gradient_descent(task, start, steps, accelerated=True),
    "GDNP": by_gdnp,
  }
  losses = {name: np.asarray(jax.vmap(task.problem.loss)(w)) for name, w in runs.items()}
  best = gdnp.Split(task.best, task.problem.length(task.best))
  least = float(task.problem.loss(gdnp.combine(best, task.problem.second_moment)))
  curves = {name: (loss - least) / (loss[0] - least) for name, loss in losses.items()}
  eigenvalues = np.linalg.eigvalsh(task.problem.second_moment)
  return curves | {BOUND: (1 - eigenvalues[0] / eigenvalues[-1]) ** (2 * np.arange(steps + 1))}


def steps_until_near(gap: np.ndarray) -> int | None:
  """The first step after which the gap stays below NEAR."""
  far = np.flatnonzero(gap > NEAR)
  return int(far[-1]) + 1 if far[-1] + 1 < len(gap) else None
