"""By what gradients grow from a layer to the one before it in wide networks with batch norm.

Of the squared norm, with random weights, for n examples to a batch (Yang et al. 2019).
"""

from __future__ import annotations

import math

RELU_LIMIT = math.pi / (math.pi - 1)  # of large batches


def linear(n: float) -> float:
  return (n - 2) / (n - 3)


def relu(n: float) -> float:
  """E |C D J|^2 / (n - 1), exactly.

  J is the derivative of batch norm, D the mask of the ReLU, C the centring of the next batch norm.
  Deep inside, what comes into batch norm is Gaussian, and alike in all n - 1 directions whose mean
  over the examples is zero.
  """
  correlation = -1 / (n - 1)  # of two examples, normalized
  angle = math.acos(correlation)
  both_pass = (math.pi - angle) / (2 * math.pi)
  product = (math.sin(angle) + (math.pi - angle) * correlation) / (2 * math.pi)
  variance = 1 / 2 - product
  passed = n / 2 - 1 + (1 / 2 + (n - 1) * both_pass) / n
  lost_to_the_variance = 1 / 2 - (1 / 2 + (n - 1) * product) / n
  return n * (passed - lost_to_the_variance) / (variance * (n - 1) * (n - 3))
