"""The measuring functions against closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.diagnostics import measures

RNG = np.random.default_rng(0)


def test_covariate_shift_is_the_divergence_of_gaussians():
  (m0, v0), (m1, v1) = (
    (RNG.normal(size=5), RNG.uniform(0.5, 2, 5)),
    (RNG.normal(size=5), np.ones(5)),
  )
  # The integral of p1 log(p1 / p0), by quadrature of p1 = N(m1, 1).
  nodes, weights = np.polynomial.hermite_e.hermegauss(20)
  x = m1 + nodes[:, None]
  log_ratio = 0.5 * (np.log(v0 / v1) + (x - m0) ** 2 / v0 - (x - m1) ** 2 / v1)
  expected = weights @ log_ratio / weights.sum()
  given = jaxbn.RunningStats(m0, v0), jaxbn.Moments(9, m1, v1)
  np.testing.assert_allclose(measures.covariate_shift(*given), expected, rtol=1e-5, atol=1e-6)


def test_noise_of_independent_and_of_repeated_elements():
  batches, n = 2000, 16
  x = RNG.normal(3, 2, (batches, n, 2)).astype(np.float32)
  both = np.concatenate([x, np.repeat(x[:, : n // 4], 4, axis=1)], -1)  # these are worth n / 4
  mean, var = measures.batch_noise(jax.vmap(jaxbn.moments)(jnp.asarray(both)))
  error = 4 / np.sqrt(2 * batches)  # four standard errors of a standard deviation
  np.testing.assert_allclose(mean, np.sqrt([1 / n, 1 / n, 4 / n, 4 / n]), rtol=error)
  np.testing.assert_allclose(var[:2], np.sqrt(2 * (n - 1)) / n, rtol=2 * error)
  with pytest.raises(ValueError, match="two batches or more"):
    measures.batch_noise(jaxbn.moments(x[0]))


def test_gradient_shift_of_a_chain_of_products():
  # loss = a b c^2 / 2: the gradient of c is a b c, and with the steps of a and b made a' b' c.
  def loss(w):
    return 0.5 * jnp.sum(w[0] * w[1]["b"] * w[2] ** 2)

  before = [jnp.array([1.0, 2.0]), {"b": jnp.array([3.0, 5.0])}, jnp.array([1.0, 1.0])]
  after = [jnp.array([2.0, 2.0]), {"b": jnp.array([3.0, 1.0])}, jnp.array([9.0, 9.0])]
  (zero, one), (second, _), (third, cosine) = measures.gradient_shift(loss, before, after)
  assert (float(zero), float(one)) == (0.0, pytest.approx(1.0))
  assert float(second) == pytest.approx(0.5)  # c^2 (a' - a) / 2
  a, b = np.array([3.0, 10.0]), np.array([6.0, 2.0])
  assert float(third) == pytest.approx(np.linalg.norm(a - b))
  assert float(cosine) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
  with pytest.raises(ValueError, match="before has 3 layers and after 2"):
    measures.gradient_shift(loss, before, after[:2])


def test_smoothness_of_a_quadratic():
  curvature = np.array([1.0, 4.0])
  w, steps = np.array([1.0, 1.0]), np.array([0.1, 0.5, 1.0])
  found = measures.smoothness(
    lambda tree: 0.5 * jnp.sum(curvature * tree["w"] ** 2), {"w": w}, steps
  )
  gradient = curvature * w
  there = w - steps[:, None] * gradient
  np.testing.assert_allclose(found.loss, 0.5 * (curvature * there**2).sum(1), rtol=1e-5)
  distance = np.linalg.norm(curvature * gradient)  # per step
  np.testing.assert_allclose(found.gradient_distance, steps * distance, rtol=1e-5)
  np.testing.assert_allclose(found.beta, distance / np.linalg.norm(gradient), rtol=1e-5)


def test_beta_is_the_largest_so_far():
  # The gradient of log cosh is tanh, which turns most at the start.
  found = measures.smoothness(lambda w: jnp.log(jnp.cosh(w)), 0.5, jnp.array([1.0, 8.0]))
  gradient = np.tanh(0.5)
  change = abs(np.tanh(0.5 - gradient) - gradient) / gradient
  np.testing.assert_allclose(found.beta, [change, change], rtol=1e-5)


@pytest.mark.parametrize(("normalized", "power"), [(False, 2), (True, 1)])
def test_weights_turn_as_the_effective_rate_says(normalized, power):
  """A step of lr at length a turns the direction as one of lr / a^power does at length 1."""

  def loss(w):
    return jnp.sum(jnp.arange(3.0)[:, None] * w / jnp.linalg.norm(w, axis=0))

  def turned(w, rate):
    gradient = jax.grad(loss)(w)
    size = jnp.linalg.norm(gradient, axis=0) if normalized else 1.0
    new = w - rate * gradient / size
    return new / jnp.linalg.norm(new, axis=0)

  w = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
  unit = w / jnp.linalg.norm(w, axis=0)
  rate = measures.effective_learning_rate(0.1, w, normalized=normalized)
  np.testing.assert_allclose(rate, 0.1 / np.linalg.norm(w, axis=0) ** power, rtol=1e-6)
  np.testing.assert_allclose(turned(w, 0.1), turned(unit, rate), rtol=1e-5, atol=1e-6)


def test_gradients_grow_with_depth_as_the_theory_says():
  """By sqrt(pi / (pi - 1)) per layer of dense, batch norm and ReLU (Yang et al. 2019)."""
  depth, width = 12, 128

  class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i in range(depth):
        weights = np.random.default_rng(i).normal(size=(width, width)) / np.sqrt(width)
        norm = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
        x = nn.relu(norm(x @ jnp.asarray(weights, jnp.float32)))
      return x

  x = RNG.normal(size=(128, width)).astype(np.float32)
  model = Deep()
  norms = measures.gradient_norms(model, model.init(jax.random.key(0), x), x)
  log = np.log(list(norms.values()))[: depth - 2]
  # It holds for infinite width: here within the scatter of the layers, by three standard errors.
  slopes = -np.diff(log)
  error = 3 * slopes.std(ddof=1) / np.sqrt(len(slopes))
  assert abs(slopes.mean() - 0.5 * np.log(np.pi / (np.pi - 1))) < error < 0.05
  assert list(norms) == [f"BatchNorm_{i}" for i in range(depth)]
