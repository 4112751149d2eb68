"""What papers on batch normalization measure: of moments, of a loss, of weights, of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._types import Moments

__all__ = [
  "Noise",
  "Smoothness",
  "batch_noise",
  "covariate_shift",
  "effective_learning_rate",
  "gradient_norms",
  "gradient_shift",
  "smoothness",
]


def __dir__() -> list[str]:
  return __all__


def covariate_shift(before: Any, after: Any, *, epsilon: float = 0.0) -> jax.Array:
  r"""How far the distribution of a layer's input has moved, by its first two moments.

  Internal covariate shift is the change in the distribution of a layer's inputs that a change of
  the network's parameters makes (Ioffe & Szegedy 2015, section 2). Of the distributions as
  Gaussian, it is the Kullback-Leibler divergence of the new one from the old one,

      KL = (log(v0 / v1) + (v1 + |m1 - m0|^2) / v0 - 1) / 2,

  which a layer that still normalizes by m0 and v0 loses. For small changes it is half the squared
  shift in standard deviations plus a quarter of the squared relative change of the variance.

  Args:
    before: moments (`jaxbn.moments`, or RunningStats) on some data with the old parameters.
    after: moments on the same data with the new ones.
    epsilon: added to both variances.

  Returns:
    In nats per element, of the channels' shape; infinite where v0 is zero.

  >>> import jax.numpy as jnp
  >>> from jaxbn import Moments
  >>> from jaxbn.diagnostics import covariate_shift
  >>> still, moved = Moments(9, jnp.zeros(1), jnp.ones(1)), Moments(9, jnp.ones(1), jnp.ones(1))
  >>> covariate_shift(still, moved).tolist()
  [0.5]
  """
  old, new = jnp.asarray(before.var) + epsilon, jnp.asarray(after.var) + epsilon
  shift = jnp.square(jnp.abs(jnp.asarray(after.mean) - before.mean))
  return 0.5 * (jnp.log(old / new) + (new + shift) / old - 1)


class Noise(NamedTuple):
  """What batch statistics inject, of the channels' shape.

  Attributes:
    mean: standard deviation of the batch means, in standard deviations of an element.
    var: that of the batch variances, relative to the variance.
  """

  mean: jax.Array
  var: jax.Array


def batch_noise(batches: Moments) -> Noise:
  r"""The noise that normalization by a batch's statistics injects, from the moments of batches.

  A batch of n independent elements has a mean that scatters by s / sqrt(n), and of Gaussian ones a
  variance that scatters by v sqrt(2 (n - 1)) / n (Teye et al. 2018 and Luo et al. 2019 build on
  these). What is measured includes that elements of one image are alike: 1 / mean^2 is how many
  independent elements a batch is worth.

  Args:
    batches: moments with a first axis of batches, two or more, of one size.

  Returns:
    `Noise`; NaN in channels without variance.

  Raises:
    TypeError: batches that are not Moments.
    ValueError: fewer than two batches.

  >>> import jax, jaxbn
  >>> from jaxbn.diagnostics import batch_noise
  >>> x = jax.random.normal(jax.random.key(0), (500, 25, 8))
  >>> noise = batch_noise(jax.vmap(jaxbn.moments)(x))
  >>> print(f"{noise.mean.mean():.2f}")  # one over the square root of 25
  0.20
  """
  _checks.is_moments(batches)
  if jnp.ndim(batches.mean) < 2 or len(batches.mean) < 2:
    raise ValueError(
      f"batches.mean has shape {jnp.shape(batches.mean)}: noise needs a first axis of two batches "
      "or more, as jax.vmap(jaxbn.moments)(x) gives."
    )
  scatter = jnp.var(jnp.asarray(batches.mean), axis=0, ddof=1)
  element = jnp.mean(jnp.asarray(batches.var), axis=0) + scatter * (1 - 1 / len(batches.mean))
  relative = jnp.std(jnp.asarray(batches.var), axis=0, ddof=1) / element
  return Noise(jnp.sqrt(scatter / element), relative)


def gradient_shift(
  loss: Callable[[Sequence[Any]], Any], before: Sequence[Any], after: Sequence[Any]
) -> list[tuple[jax.Array, jax.Array]]:
  r"""Internal covariate shift as a change of gradients, of each layer.

  How much the gradient of layer i changes when all layers before it have made their step and it
  has not:

      |G_i - G'_i|,   G_i  = grad_i loss(w_1, ..., w_k)
                      G'_i = grad_i loss(w'_1, ..., w'_(i-1), w_i, ..., w_k)

  (Santurkar et al. 2018, definition 2.1.)

  Args:
    loss: of the layers' parameters, on one batch.
    before: parameters of each layer, trees, in the order in which data goes through them.
    after: the same after a step.

  Returns:
    For each layer the norm, in units of the gradient, and the cosine of the angle between both
    gradients, which is 1 without a shift.

  Raises:
    ValueError: lists of different lengths.

  >>> import jax.numpy as jnp
  >>> from jaxbn.diagnostics import gradient_shift
  >>> product = lambda w: w[0] * w[1]
  >>> shifts = gradient_shift(product, [2.0, 3.0], [1.5, 3.0])
  >>> [float(norm) for norm, _ in shifts]
  [0.0, 0.5]
  """
  before, after = list(before), list(after)
  if len(before) != len(after):
    raise ValueError(
      f"before has {len(before)} layers and after {len(after)}: give the same layers, in order."
    )
  gradient = jax.jit(jax.grad(loss))
  old = gradient(before)
  result = []
  for i in range(len(before)):
    mixed = gradient([*after[:i], *before[i:]])
    a, b = _flat(old[i]), _flat(mixed[i])
    cosine = jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    result.append((jnp.linalg.norm(a - b), cosine))
  return result


class Smoothness(NamedTuple):
  """What a loss does along its gradient, for each step size.

  Attributes:
    loss: after a step of that size.
    gradient_distance: norm of the difference of the gradients there and here: predictiveness.
    beta: the largest ratio, up to there, of that difference to the length of the step.
  """

  loss: jax.Array
  gradient_distance: jax.Array
  beta: jax.Array


def smoothness(loss: Callable[[Any], Any], params: Any, steps: Any) -> Smoothness:
  r"""The loss and its gradient g along -g: w - eta g for each eta.

      loss(w - eta g),   d = |g(w - eta g) - g(w)|,   beta = max over eta of d / (eta |g|)

  (Santurkar et al. 2018, figure 4: loss landscape, gradient predictiveness, "effective"
  beta-smoothness. beta is a Lipschitz constant of the gradient along this line, in units of one
  over eta: gradient descent with steps below 2 / beta does not go up.)

  Args:
    loss: of the parameters, on one batch.
    params: a tree.
    steps: step sizes, increasing, above 0; in the paper from half the learning rate to 4 times it.

  Returns:
    `Smoothness`, each of the shape of steps.

  >>> import jax.numpy as jnp
  >>> from jaxbn.diagnostics import smoothness
  >>> bowl = lambda w: 1.5 * w**2  # its second derivative is 3
  >>> smoothness(bowl, 1.0, jnp.array([0.25, 0.5])).beta.tolist()
  [3.0, 3.0]
  """
  params = jax.tree.map(jnp.asarray, params)
  here = jax.grad(loss)(params)
  length = jnp.linalg.norm(_flat(here))

  def at(step: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, there = jax.value_and_grad(loss)(jax.tree.map(lambda w, g: w - step * g, params, here))
    return value, jnp.linalg.norm(_flat(there) - _flat(here))

  steps = jnp.asarray(steps)
  losses, distances = jax.lax.map(at, steps)
  return Smoothness(losses, distances, jax.lax.cummax(distances / (steps * length)))


def _flat(tree: Any) -> jax.Array:
  return jnp.concatenate([jnp.ravel(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def effective_learning_rate(
  learning_rate: jax.typing.ArrayLike, weights: jax.typing.ArrayLike, *, normalized: bool = False
) -> jax.Array:
  r"""The learning rate of the direction of weights whose scale does not matter.

  Behind w there is a batch norm, so that the loss depends on w / |w| alone, and its gradient is
  orthogonal to w and shrinks as 1 / |w|. A step of gradient descent turns the direction as one with

      lr / |w|^2

  does at |w| = 1 (van Laarhoven 2017, equation 4). An optimizer whose steps do not depend on the
  gradient's size, such as Adam, has lr / |w|.

  Args:
    learning_rate: of the optimizer, now.
    weights: (..., channels), of which each channel is normalized by itself: a kernel of Flax.
    normalized: whether the optimizer's steps do not depend on the gradient's size.

  Returns:
    One for each channel, of shape (channels,).

  >>> import jax.numpy as jnp
  >>> from jaxbn.diagnostics import effective_learning_rate
  >>> effective_learning_rate(0.5, jnp.array([[3.0], [4.0]])).tolist()
  [0.019999999552965164]
  """
  weights = _checks.inexact(weights, "weights")
  square = jnp.sum(jnp.square(jnp.abs(weights)), axis=tuple(range(weights.ndim - 1)))
  return jnp.asarray(learning_rate) / (jnp.sqrt(square) if normalized else square)


def gradient_norms(
  model: Any,
  variables: Any,
  batch: Any,
  *,
  loss: Callable[[Any, Any], Any] | None = None,
  **arguments: Any,
) -> dict[str, float]:
  r"""The norm of the gradient at the output of each batch norm, in training mode.

  With random weights the squared norm grows from a layer to the one before it by a factor, which is
  pi / (pi - 1) for dense layers with ReLU and large batches (Yang et al. 2019, "A mean field theory
  of batch normalization"): by depth, gradients explode.

  Args:
    model: a module of Flax Linen or NNX.
    variables: of a Linen module all collections; of an NNX module None.
    batch: what it is called with: an array, or a tuple of arguments.
    loss: of the output and the batch; default, a random sum of the outputs, of signs.
    **arguments: further arguments of `module.apply`, or of the NNX module.

  Returns:
    By the path of each layer, in the order of their first calls, the norm of the derivative of the
    loss with respect to its output: in units of the loss.

  Raises:
    TypeError: variables that are not a dict.
    ValueError: no batch norm.

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> from jaxbn.diagnostics import gradient_norms
  >>> model = nn.BatchNorm(use_running_average=True)
  >>> x = jnp.arange(8.0).reshape(4, 2)
  >>> norms = gradient_norms(model, model.init(jax.random.key(0), x), x, loss=lambda y, x: y.sum())
  >>> print(f"{norms['']:.3f}")  # the square root of eight ones
  2.828
  """
  from jaxbn.diagnostics import _observe
  from jaxbn.surgery._network import Network

  network = Network(model, variables, inputs=None, foreign=None, partial=True, arguments=arguments)
  args = network.args(batch)
  run = _observe.flow(model, network.layers, network.foreign, arguments, (), loss)
  squares = jax.jit(run)(network.tree, args, batch).at
  return {v.path: float(np.sqrt(np.sum(squares[v.path]))) for v in network.layers}
