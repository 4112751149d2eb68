"""Direction and length: the paper's steps, its rate, and that this is what batch norm computes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.alternatives import gdnp

N, INPUTS = 200, 4
SPREAD = np.array([1.0, 1.5, 2.0, 3.0])


def run(problem, start, steps):
  return jax.jit(lambda start: gdnp.gdnp(problem, start, steps)[1])(start)


@pytest.fixture(autouse=True)
def _double_precision():
  with jax.enable_x64(True):
    yield


def regression():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(N, INPUTS)) * SPREAD
  x -= x.mean(0)
  return x, x @ np.array([1.0, -2.0, 0.5, 1.0]) + rng.normal(size=N)


MEAN, COVARIANCE = np.array([-0.5, 0.3, 0.0, -0.8]), np.diag([0.5, 1.0, 2.0, 3.0])
START = np.array([1.0, 1.0, -1.0, 2.0])


def test_the_split_is_what_batch_norm_computes():
  x, _ = regression()
  w, g = jnp.array([0.3, -1.0, 2.0, 0.1]), 1.7
  y, _ = jaxbn.batch_norm((x @ w)[:, None], jnp.array([g]), use_running_average=False, epsilon=0.0)
  v = gdnp.combine(gdnp.Split(w, g), x.T @ x / N)
  np.testing.assert_allclose(x @ v, y[:, 0], rtol=0, atol=1e-12)


# Least squares, in NumPy from the paper: rho(w) = -(u^T w)^2 / (w^T S w), u = E[y x].


def rayleigh_descent(S, u, w, steps):
  """w <- w - eta grad rho(w), eta = w^T S w / (2 L |rho(w)|)."""
  L, directions = np.linalg.eigvalsh(S)[-1], []
  for _ in range(steps):
    norm = w @ S @ w
    rho = -((u @ w) ** 2) / norm
    gradient = -2 * ((u @ w) * u + rho * S @ w) / norm
    w = w - norm / (2 * L * abs(rho)) * gradient
    directions.append(w)
  return np.stack(directions)


def unit(w):
  return w / np.linalg.norm(w, axis=-1, keepdims=True)


def test_least_squares_takes_the_paper_s_steps():
  x, y = regression()
  S, u = x.T @ x / N, x.T @ y / N
  weights = run(gdnp.least_squares(x, y), START, 8)
  w = rayleigh_descent(S, u, START, 8)
  expected = w * ((w @ u) / np.einsum("ti,ij,tj->t", w, S, w))[:, None]  # with the best length
  np.testing.assert_allclose(weights[1:], expected, rtol=1e-9)


def test_least_squares_converges_linearly_by_1_minus_mu_over_L_squared():
  x, y = regression()
  problem = gdnp.least_squares(x, y)
  eigenvalues = np.linalg.eigvalsh(problem.second_moment)
  best = np.linalg.lstsq(x, y)[0]
  weights = run(problem, START, 120)
  losses = np.asarray(jax.vmap(problem.loss)(weights))
  gap = losses - problem.loss(best)
  above_rounding = gap[1:] > 1e-12
  rate = (1 - eigenvalues[0] / eigenvalues[-1]) ** 2
  assert np.sum(above_rounding) > 10
  assert np.all(gap[1:][above_rounding] <= rate * gap[:-1][above_rounding] * (1 + 1e-3))
  np.testing.assert_allclose(weights[-1], best, rtol=1e-6)


# Halfspaces, by an integral of NumPy's: Gauss-Hermite.


def expectation(f, v):
  nodes, weights = np.polynomial.hermite_e.hermegauss(100)
  t = MEAN @ v + np.sqrt(v @ COVARIANCE @ v) * nodes
  return f(t) @ weights / np.sqrt(2 * np.pi)


def sigmoid(t):
  return 1 / (1 + np.exp(-t))


def test_the_population_s_loss_and_curvature_are_the_integrals():
  problem = gdnp.gaussian_halfspace(MEAN, COVARIANCE)
  for v in (START / 4, -START / 3):
    loss = expectation(lambda t: np.logaddexp(0, t), v)
    curvature = expectation(lambda t: sigmoid(t) * sigmoid(-t), v)
    np.testing.assert_allclose(problem.loss(v), loss, rtol=1e-10)
    np.testing.assert_allclose(problem.curvature(v), curvature, rtol=1e-10)


def test_a_halfspace_s_steps_are_the_paper_s():
  # s = -||w||_S^3 / (L g h), h = E[phi'] u^T w - E[phi''] (u^T v) (u^T w); by Stein's lemma the
  # gradient in w is g / ||w||_S (E[phi'] - E[phi''] u^T v) (u - S w (u^T w) / ||w||_S^2).
  S = COVARIANCE + np.outer(MEAN, MEAN)
  L = np.linalg.eigvalsh(S)[-1]
  problem = gdnp.gaussian_halfspace(MEAN, COVARIANCE)
  weights = run(problem, START, 3)
  w = START
  for v, new in zip(np.asarray(weights[:-1]), np.asarray(weights[1:]), strict=True):
    norm = np.sqrt(w @ S @ w)
    g = v @ S @ w / norm
    first = expectation(sigmoid, v)
    second = expectation(lambda t: sigmoid(t) * sigmoid(-t), v)
    c1 = first - second * (MEAN @ v)
    s = -(norm**3) / (L * g * c1 * (MEAN @ w))
    w = w - s * g / norm * c1 * (MEAN - S @ w * (MEAN @ w) / norm**2)
    np.testing.assert_allclose(unit(new) * np.sign(new @ w), unit(w), rtol=1e-8)
    slope = expectation(lambda t: sigmoid(t) * t, new)  # along the length: 0 at the best one
    np.testing.assert_allclose(slope, 0, atol=1e-10)


def test_a_halfspace_is_found_like_least_squares_and_faster_than_by_gradient_descent():
  # As far away as this the loss is flat: its curvature is little of the 1/4 it has at most.
  mean = 4 * MEAN
  problem = gdnp.gaussian_halfspace(mean, COVARIANCE)
  S = problem.second_moment
  eigenvalues = np.linalg.eigvalsh(S)
  weights = run(problem, START, 300)
  losses = jax.vmap(problem.loss)(weights)
  best = losses[-1]
  assert jnp.linalg.norm(jax.grad(problem.loss)(weights[-1])) < 1e-9
  np.testing.assert_allclose(unit(weights[-1]), -unit(np.linalg.solve(S, mean)), atol=1e-8)

  w = rayleigh_descent(np.asarray(S), mean, START, 8)  # the same directions
  np.testing.assert_allclose(np.abs(np.sum(unit(w) * unit(weights[1:9]), -1)), 1, rtol=1e-12)

  @jax.jit
  def descend(v):
    step = 4 / eigenvalues[-1]
    return jax.lax.fori_loop(0, 300, lambda _, v: v - step * jax.grad(problem.loss)(v), v)

  assert problem.loss(descend(weights[0])) - best > 1e3 * (losses[100] - best)


def test_examples_of_a_halfspace_are_descended_too():
  rng = np.random.default_rng(0)
  x = rng.exponential(size=(N, INPUTS)) * SPREAD  # not Gaussian
  y = np.sign(x @ np.array([1.0, -1.0, 0.5, -0.2]) + rng.normal(size=N))
  problem = gdnp.halfspace(x, y)
  weights = run(problem, START, 1000)
  losses, v = jax.vmap(problem.loss)(weights), weights[-1]
  assert np.all(np.diff(losses) < 1e-12)
  z = -y[:, None] * x
  np.testing.assert_allclose(losses[-1], np.mean(np.logaddexp(0, z @ v)), rtol=1e-12)
  assert np.linalg.norm(z.T @ sigmoid(z @ v)) / N < 1e-5


def test_it_compiles_once():
  chex.clear_trace_counter()
  problem = gdnp.least_squares(*regression())

  @jax.jit
  @chex.assert_max_traces(n=1)
  def once(direction):
    return gdnp.gdnp(problem, direction, 5)[1]

  starts = jnp.stack([START, -2 * START])
  both = jax.jit(jax.vmap(lambda d: gdnp.gdnp(problem, d, 5)[1]))(starts)
  np.testing.assert_allclose(once(starts[0]), both[0], rtol=1e-12)
  np.testing.assert_allclose(once(starts[1]), both[1], rtol=1e-12)


PROBLEM = gdnp.Problem(jnp.eye(2), jnp.sum, jnp.sum, lambda w: w[0])


@pytest.mark.parametrize(
  ("call", "error", "says"),
  [
    (lambda: gdnp.gdnp(jnp.sum, START, 1), TypeError, "least_squares"),
    (lambda: gdnp.gdnp(PROBLEM, START, 1), ValueError, r"direction has shape \(4,\).*\(2, 2\)"),
    (lambda: gdnp.gdnp(PROBLEM, jnp.array([0.0, 1.0]), 1), ValueError, r"best length 0\.0"),
    (lambda: gdnp.gdnp(PROBLEM, jnp.array([1, 1]), 1), TypeError, "direction has dtype int"),
    (lambda: gdnp.least_squares(np.ones((3, 2)), np.ones(2)), ValueError, r"y \(2,\)"),
    (lambda: gdnp.halfspace(np.ones((2, 2)), np.array([0, 1])), ValueError, r"2 \* y - 1"),
    (lambda: gdnp.gaussian_halfspace(MEAN, np.eye(2)), ValueError, r"\(4,\) and .*\(2, 2\)"),
  ],
  ids=["no problem", "shape", "no slope", "integer", "examples", "labels", "covariance"],
)
def test_what_cannot_work_is_refused(call, error, says):
  with pytest.raises(error, match=says):
    call()
