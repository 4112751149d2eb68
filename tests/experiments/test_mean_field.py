"""The theory of exploding gradients, by sampling."""

import numpy as np
import pytest

from experiments import mean_field


@pytest.mark.parametrize("kind", ["relu", "linear"])
def test_theory_is_the_mean_of_random_layers(kind):
  """By the derivatives of batch norm and activation, written out, of 20,000 draws."""
  n = 8
  centre = np.eye(n) - 1 / n
  h = np.random.default_rng(0).normal(size=(20_000, n)) @ centre
  y = h / h.std(1, keepdims=True)
  mask = y > 0 if kind == "relu" else np.ones_like(y)
  variance = np.square(y * mask @ centre).sum(1).mean() / (n - 1)
  through = centre * mask[:, None]
  jacobian = through @ centre - np.einsum("nij,nj,nk->nik", through, y, y) / n
  each = np.square(jacobian).sum((1, 2)) / h.var(1) / variance / (n - 1)
  error = 4 * each.std() / np.sqrt(len(each))
  assert abs(each.mean() - getattr(mean_field, kind)(n)) < error < 0.05


def test_theory_of_large_batches():
  assert mean_field.relu(10**6) == pytest.approx(mean_field.RELU_LIMIT, rel=1e-5)
