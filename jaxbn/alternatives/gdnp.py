r"""Batch norm as a reparametrization, and gradient descent in it: GDNP (Kohler et al. 2019).

Of a unit x^T w with centred input, batch normalization computes, with S = E[x x^T],

    g x^T w / ||w||_S,   ||w||_S = sqrt(w^T S w)

which is x^T v of the weights v = g w / ||w||_S: their length is g, their direction is w's, and both
can be learned by themselves. Where weight normalization (`jaxbn.alternatives.weight_norm`) has the
Euclidean norm, batch normalization has that of the data. "Exponential convergence rates for batch
normalization: the power of length-direction decoupling in non-convex optimization" shows for two
problems that this helps: gradient descent on the direction, with the best length for each, brings
the error of the direction down by (1 - mu/L)^2 in every step, with mu and L the smallest and the
largest eigenvalue of S: for least squares at least as fast as gradient descent in v, although the
problem is no longer convex, and for halfspaces whatever the curvature of the loss, on which the
speed in v depends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import _checks
from jaxbn._types import Array, Numeric

__all__ = [
  "Problem",
  "Split",
  "combine",
  "gaussian_halfspace",
  "gdnp",
  "halfspace",
  "least_squares",
]


def __dir__() -> list[str]:
  return __all__


class Split(NamedTuple):
  """Weights as a direction and a length.

  Attributes:
    direction: w, of shape (n,), not 0; only where it points matters.
    length: g, a number: the weights' norm in the metric S, with a sign.
  """

  direction: jax.Array
  length: jax.Array | float


class Problem(NamedTuple):
  """What `gdnp` minimizes: the mean of some function of x^T v, over the weights v.

  Attributes:
    second_moment: S = E[x x^T], of shape (n, n), positive definite.
    loss: from the weights v, of shape (n,), to their loss.
    curvature: from the weights to the mean second derivative of the function of x^T v.
    length: from a direction to the best length for it.
  """

  second_moment: jax.Array
  loss: Callable[[jax.Array], jax.Array]
  curvature: Callable[[jax.Array], jax.Array]
  length: Callable[[jax.Array], jax.Array]


def combine(split: Split, second_moment: Array) -> jax.Array:
  """The weights: v = length * direction / sqrt(direction^T S direction).

  Args:
    split: direction and length.
    second_moment: S, of shape (n, n).

  Returns:
    v, of shape (n,).

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import gdnp
  >>> gdnp.combine(gdnp.Split(jnp.array([0.0, 5.0]), 3.0), 4 * jnp.eye(2)).tolist()
  [0.0, 1.5]
  """
  w = jnp.asarray(split.direction)
  return split.length * w / jnp.sqrt(w @ second_moment @ w)


def gdnp(
  problem: Problem,
  direction: Array,
  steps: int,
  *,
  smoothness: Numeric | None = None,
) -> tuple[Split, jax.Array]:
  r"""Gradient descent in normalized parametrization (Kohler et al. 2019, Algorithm 1).

      w <- w - s grad_w loss(g w / ||w||_S),   s = ||w||_S^2 / (L g^2 curvature)
      g <- the best length for w

  At the best length this s is what the paper has for each of its two problems. For least squares it
  is ||w||_S^2 / (2 L rho), for g^2 = rho and the curvature is 2. For halfspaces of Gaussian inputs
  it is -||w||_S^3 / (L g h), h = (E[phi'] - E[phi''] u^T v) u^T w with u = E[z] and phi the loss,
  for there g^2 E[phi''] = -g h / ||w||_S. Written in this way it is positive for any data.

  Args:
    problem: from `least_squares`, `halfspace` or `gaussian_halfspace`, or your own.
    direction: where to start, of shape (n,): not 0, nor such that its best length is 0.
    steps: how many; a Python integer.
    smoothness: L, the largest eigenvalue of S or a bound of it; None computes it.

  Returns:
    (split, weights): the last direction and length; and the weights before the first step and after
    each, of shape (steps + 1, n).

  Raises:
    TypeError: problem is no Problem; an integer direction.
    ValueError: a direction that is not of S's shape, or whose best length is 0, where that can be
      seen.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import gdnp
  >>> x = jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
  >>> problem = gdnp.least_squares(x, x @ jnp.array([3.0, -1.0]))
  >>> split, weights = gdnp.gdnp(problem, jnp.array([1.0, 0.0]), steps=50)
  >>> jnp.allclose(weights[-1], jnp.array([3.0, -1.0]), atol=1e-5)
  Array(True, dtype=bool)
  """
  if not isinstance(problem, Problem):
    raise TypeError(
      f"problem is a {type(problem).__name__}: make one with gdnp.least_squares(...)."
    )
  w, S = _checks.inexact(direction, "direction"), jnp.asarray(problem.second_moment)
  if w.ndim != 1 or S.shape != (w.size, w.size):
    raise ValueError(
      f"direction has shape {w.shape}, but the problem's second_moment {S.shape}: pass one number "
      "for each input."
    )
  L = jnp.linalg.eigvalsh(S)[-1] if smoothness is None else smoothness
  start = Split(w, jnp.asarray(problem.length(w), w.dtype))
  if _checks.concrete(start.length) and not np.abs(start.length) > 0:
    raise ValueError(
      f"direction={w} has the best length {start.length}: there is no slope from there; start from "
      "another direction, such as E[x y]."
    )

  def step(split: Split, _: None) -> tuple[Split, jax.Array]:
    w, g = split
    gradient = jax.grad(lambda w: problem.loss(combine(Split(w, g), S)))(w)
    v = combine(split, S)
    s = (w @ S @ w) / (L * g**2 * problem.curvature(v))
    w = w - s * gradient
    new = Split(w, jnp.asarray(problem.length(w), w.dtype))
    return new, combine(new, S)

  last, weights = lax.scan(step, start, length=steps)
  return last, jnp.concatenate([combine(start, S)[None], weights])


def least_squares(x: Array, y: Array) -> Problem:
  r"""E[(y - x^T v)^2], whose best length is known: g = E[y x]^T w / ||w||_S.

  With it, what is left is the generalized Rayleigh quotient -(E[y x]^T w)^2 / (w^T S w), up to a
  constant (Kohler et al. 2019).

  Args:
    x: inputs, of shape (examples, n); batch norm would centre them first.
    y: targets, of shape (examples,).

  Returns:
    Problem.

  Raises:
    TypeError: integer x.
    ValueError: shapes that do not fit.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import gdnp
  >>> problem = gdnp.least_squares(jnp.array([[1.0], [1.0]]), jnp.array([2.0, 4.0]))
  >>> float(problem.length(jnp.array([7.0]))), float(problem.loss(jnp.array([3.0])))
  (3.0, 1.0)
  """
  x, y = _examples(x, y)
  S, u = x.T @ x / len(x), x.T @ y / len(x)
  return Problem(
    S,
    loss=lambda v: jnp.mean((y - x @ v) ** 2),
    curvature=lambda v: jnp.full((), 2, x.dtype),
    length=lambda w: u @ w / jnp.sqrt(w @ S @ w),
  )


def halfspace(
  x: Array,
  y: Array,
  *,
  loss: Callable[[jax.Array], jax.Array] = jax.nn.softplus,
  max_length: float = 64.0,
  bisections: int = 60,
) -> Problem:
  r"""E[loss(-y x^T v)]: which side of a hyperplane x is on, by examples.

  The paper's guarantee is for Gaussian inputs (`gaussian_halfspace`); of others this is the
  problem all the same, with a descent of which nothing is proved.

  Args:
    x: inputs, of shape (examples, n).
    y: which side each is on, -1 or 1, of shape (examples,).
    loss: elementwise function, increasing; the default gives logistic regression.
    max_length: lengths are sought from minus this to this. Separable data have no best length, and
      get this one.
    bisections: how often the interval is halved.

  Returns:
    Problem.

  Raises:
    TypeError: integer x.
    ValueError: shapes that do not fit; labels other than -1 and 1, where they can be seen.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import gdnp
  >>> problem = gdnp.halfspace(jnp.array([[1.0], [1.0], [1.0]]), jnp.array([1.0, 1.0, -1.0]))
  >>> round(float(problem.length(jnp.array([5.0]))), 4)  # log of the odds, 2 to 1
  0.6931
  """
  x, y = _examples(x, y)
  if _checks.concrete(y) and not np.all(np.abs(y) == 1):
    raise ValueError("y holds other labels than -1 and 1: pass 2 * y - 1 if they are 0 and 1.")
  z = -y[:, None] * x
  return _expected(lambda f, v: jnp.mean(f(z @ v)), z.T @ z / len(z), loss, max_length, bisections)


def gaussian_halfspace(
  mean: Array,
  covariance: Array,
  *,
  loss: Callable[[jax.Array], jax.Array] = jax.nn.softplus,
  max_length: float = 64.0,
  bisections: int = 60,
) -> Problem:
  r"""E[loss(z^T v)] with z = -y x Gaussian, exactly: the population, not a sample of it.

  z^T v is Gaussian, so that the mean is an integral over the line. By Stein's lemma its gradient is
  c1 E[z] + c2 S v with numbers c1 and c2: all critical points have the direction S^-1 E[z], and
  GDNP finds it like that of least squares (Kohler et al. 2019).
  The integral is taken by the trapezoidal rule, which for a smooth function times a Gaussian
  converges geometrically: its 401 points leave nothing of an error in double precision while
  z^T v has a standard deviation below about 10.

  Args:
    mean: E[z], of shape (n,), not 0.
    covariance: of z, of shape (n, n), positive definite.
    loss: elementwise function, increasing and smooth.
    max_length: lengths are sought from minus this to this.
    bisections: how often the interval is halved.

  Returns:
    Problem, with S = E[z z^T].

  Raises:
    TypeError: an integer mean.
    ValueError: shapes that do not fit.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import gdnp
  >>> problem = gdnp.gaussian_halfspace(jnp.array([-1.0, 0.0]), jnp.diag(jnp.array([1.0, 9.0])))
  >>> split, weights = gdnp.gdnp(problem, jnp.array([1.0, 1.0]), steps=60)
  >>> jnp.abs(weights[-1] - jnp.array([2.0, 0.0])).max() < 1e-3  # 2 mean / variance
  Array(True, dtype=bool)
  """
  mean = _checks.inexact(mean, "mean")
  covariance = jnp.asarray(covariance)
  if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
    raise ValueError(
      f"mean has shape {mean.shape} and covariance {covariance.shape}: (n,) and (n, n) are needed."
    )
  points = np.linspace(-10, 10, 401)
  density = np.exp(-(points**2) / 2)
  nodes, share = (jnp.asarray(a, mean.dtype) for a in (points, density / density.sum()))

  def expect(f: Callable[[jax.Array], jax.Array], v: jax.Array) -> jax.Array:
    deviation = jnp.sqrt(v @ covariance @ v)
    return f(mean @ v + deviation * nodes) @ share

  S = covariance + jnp.outer(mean, mean)
  return _expected(expect, S, loss, max_length, bisections)


def _expected(expect: Any, S: jax.Array, loss: Any, max_length: float, bisections: int) -> Problem:
  """The problem of minimizing expect(loss, v)."""
  second_derivative = _derivative(_derivative(loss))

  def length(w: jax.Array) -> jax.Array:
    # By the slope along the unit vector, which rises through 0 where the loss is least.
    unit = combine(Split(w, 1.0), S)
    slope = jax.grad(lambda g: expect(loss, g * unit))

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      low, high = interval
      middle = (low + high) / 2
      rising = slope(middle) > 0
      return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    # Not around 0, where a standard deviation of 0 has no derivative.
    ends = jnp.asarray(-max_length, w.dtype), jnp.asarray(max_length * (1 + 1e-3), w.dtype)
    low, high = lax.fori_loop(0, bisections, halve, ends)
    return (low + high) / 2

  return Problem(
    S, functools.partial(expect, loss), functools.partial(expect, second_derivative), length
  )


def _derivative(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
  """Of an elementwise function."""
  return lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def _examples(x: Array, y: Array) -> tuple[jax.Array, jax.Array]:
  x = _checks.inexact(x)
  y = jnp.asarray(y, x.dtype)
  if x.ndim != 2 or y.shape != x.shape[:1]:
    raise ValueError(
      f"x has shape {x.shape} and y {y.shape}: (examples, n) and (examples,) are needed."
    )
  return x, y
