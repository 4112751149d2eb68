"""A tiny network whose running statistics are those of its batches: nothing is wrong with it."""

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jaxbn.surgery

WIDTH = 4
ONE = jax.devices()[:1]
RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(1, 2, (32, 3)).astype(np.float32) for _ in range(8)]
QUIET = {"devices": ONE, "progress": lambda text: None}


def init(key, shape, dtype=None):
  """Without the compilation that jax.random takes."""
  return jax.numpy.asarray(np.random.default_rng(shape[0]).normal(0, 1, shape), np.float32)


class Net(nn.Module):
  """Product, norm, ReLU, twice; with peculiarities of the second norm."""

  biased: bool = False
  frozen: bool = False
  twice: bool = False

  @nn.compact
  def __call__(self, x, train=False, mask=None):
    for i in range(2):
      here = i == 1
      x = nn.Dense(WIDTH, use_bias=here and self.biased, kernel_init=init)(x)
      evaluates = not train or (here and self.frozen)
      norm = nn.BatchNorm(momentum=0.9, use_running_average=evaluates)
      h = norm(x, mask=mask)
      if here and self.twice:
        h = h + norm(3 * x + 2)
      x = nn.relu(h)
    return nn.Dense(2, kernel_init=init)(x)


class NnxNet(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.layers = nnx.List(
      [
        nnx.Linear(width, WIDTH, use_bias=False, kernel_init=init, rngs=rngs)
        for width in (3, WIDTH)
      ]
    )
    self.norms = nnx.List([nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs) for _ in range(2)])

  def __call__(self, x):
    for layer, norm in zip(self.layers, self.norms, strict=True):
      x = nnx.relu(norm(layer(x)))
    return x


def healthy(model):
  variables = model.init(jax.random.key(0), BATCHES[0])
  return jaxbn.surgery.recalibrate(model, variables, BATCHES, **QUIET)


def healthy_nnx():
  model = jaxbn.surgery.recalibrate(NnxNet(), None, BATCHES, **QUIET)
  model.eval()
  return model


def names(report):
  return [(f.fault, f.layer) for f in report.findings]
