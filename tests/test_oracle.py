"""The oracle itself: its gradient by finite differences, its running average by the recurrence."""

import numpy as np
import pytest

from tests import oracle


def batch(kept):
  rng = np.random.default_rng(0)
  x = rng.normal(2.0, 1.5, (4, 3, 5))
  return x, {
    "all": {},
    "mask": {"mask": rng.random((4, 1, 5)) < 0.7},
    "weights": {"weights": rng.integers(0, 4, (4, 3, 1)).astype(np.float64)},
  }[kept]


@pytest.mark.parametrize("axis", [1, (0, -1)])
@pytest.mark.parametrize("kept", ["all", "mask", "weights"])
def test_gradients_are_central_differences(axis, kept):
  x, kept = batch(kept)
  rng = np.random.default_rng(1)
  shape = oracle.moments(x, axis).mean.shape
  values = {"x": x, "scale": rng.normal(size=shape), "bias": rng.normal(size=shape)}
  cotangent = np.where(oracle.weights_of(x, **kept) > 0, rng.normal(size=x.shape), 0)

  def loss(x, scale, bias):
    return np.sum(cotangent * oracle.batch_norm(x, scale, bias, axis=axis, **kept))

  got = oracle.gradients(x, values["scale"], cotangent, axis=axis, **kept)._asdict()
  # Rounding of 1e-16 / step, and step^2 times a third derivative of order one (the variances are).
  step = 1e-5
  for name, value in values.items():
    direction = rng.normal(size=value.shape)
    ends = [loss(**{**values, name: value + s * direction}) for s in (step, -step)]
    slope = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(np.vdot(got[name], direction), slope, rtol=1e-7, atol=1e-8)


def test_moments_are_those_of_the_elements_repeated_and_removed():
  x, kept = batch("weights")
  count = kept["weights"][:, 0, 0].astype(int)
  plain = oracle.moments(np.repeat(x[:, :1], count, axis=0))
  weighted = oracle.moments(x[:, :1], weights=count[:, None, None])
  for a, b in zip(plain, weighted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_debiased_average_is_the_weighted_average_of_the_batches(momentum):
  stats = [oracle.Stats(np.float64(4), np.float64(m), np.float64(v)) for m, v in [(1, 2), (5, 3)]]
  shares = np.array([momentum, 1.0]) / (momentum + 1)
  mean, var = oracle.running(stats, momentum, debias=True)
  np.testing.assert_allclose(mean, shares @ [1, 5], rtol=1e-15)
  np.testing.assert_allclose(var, shares @ [2, 3], rtol=1e-14)
