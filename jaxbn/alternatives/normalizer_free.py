"""Without batch norm: what normalizer-free networks are made of.

Batch normalization keeps the size of a signal by measuring it. A normalizer-free network (Brock et
al. 2021, "Characterizing signal propagation to close the performance gap in unnormalized ResNets"
and "High-performance large-scale image recognition without normalization") computes it beforehand:

- kernels are standardized, so that a layer of independent unit-variance inputs gives unit variance
  and no mean (`scaled_weight_standardization`);
- activations are scaled so that they keep it (`activation_gain`, `scaled_activation`);
- a residual block is x + alpha * f(x / beta), where f keeps the variance and beta² is the variance
  that x is expected to have (`expected_variances`);
- f starts at zero by a learned scalar (SkipInit, De & Smith 2020, "Batch normalization biases
  residual blocks towards the identity function in deep networks").

Nothing here depends on other examples: there is no state, and training and evaluation agree. The
layers are WSConv, SkipInit and WSDense (Linen) or WSLinear (NNX). Adaptive gradient clipping, the
second paper's, is `optax.adaptive_grad_clip`; leave the last linear layer out with `optax.masked`.
Optax clips the kernels of dense layers and of 2-D and 3-D convolutions by output, as the paper has
it, but takes a kernel of rank 3 for attention's: for a 1-D convolution pass it axis=(0, 1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks, batch_norm
from jaxbn._activation import hoist
from jaxbn._names import shown
from jaxbn._types import Array

__all__ = [
  "activation_gain",
  "expected_variances",
  "scaled_activation",
  "scaled_weight_standardization",
]


def __dir__() -> list[str]:
  return __all__


def scaled_weight_standardization(
  kernel: Array,
  gain: Array | None = None,
  *,
  axis: int | Sequence[int] = -1,
  epsilon: float = 1e-5,
) -> jax.Array:
  r"""A kernel whose weights for each output have mean 0 and squares that add up to gain².

      (kernel - mean) / sqrt(fan_in · var + epsilon) · gain

  where mean, var and their number fan_in are of the weights of one output. It is batch
  normalization of the kernel, and computed and differentiated as such: in float32 at least, under
  every transformation.

  Args:
    kernel: the weights, of any rank; in Flax's layout the outputs are on the last axis.
    gain: of the shape of `axis`, one for each output, or None for 1.
    axis: the axis or axes of the outputs. Of a grouped convolution too, the other axes hold an
      output's weights.
    epsilon: added to fan_in · var, which is about 1 for kernels of the usual initializers. The
      papers name none; their code takes the larger of fan_in · var and 1e-4 instead of a sum.

  Returns:
    An array of the kernel's shape and dtype.

  Raises:
    TypeError: if the kernel or the gain is of integers, or an argument is of the wrong kind.
    ValueError: if an output has one weight only (its mean is all of it), a shape does not fit, or
      epsilon is negative or not finite.

  Source: Brock et al. 2021, "Characterizing signal propagation ...", Scaled Weight Standardization;
  after Qiao et al. 2019, "Weight standardization", which lacks the 1 / sqrt(fan_in).

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives.normalizer_free import scaled_weight_standardization
  >>> kernel = jnp.array([[1.0, 8.0], [3.0, 2.0], [2.0, 5.0]])
  >>> print(scaled_weight_standardization(kernel, epsilon=0.0).round(3))
  [[-0.707  0.707]
   [ 0.707 -0.707]
   [ 0.     0.   ]]
  """
  kernel = _checks.inexact(kernel, "kernel")
  _checks.epsilon_in_range(epsilon)
  axes = _checks.split_axes(kernel.ndim, axis)
  shape = axes.shape(kernel)
  fan_in = math.prod(kernel.shape[a] for a in axes.reduced)
  if fan_in < 2:
    raise ValueError(
      f"kernel of shape {kernel.shape} has {fan_in} weight for each output on axis={shown(axis)}, "
      "and without its mean nothing is left of it: leave such a layer unstandardized, or name the "
      "outputs' axis."
    )
  if gain is None:
    gain = jnp.ones(shape, jnp.promote_types(jnp.finfo(kernel.dtype).dtype, jnp.float32))
  gain = _checks.inexact(gain, "gain")
  if gain.shape != shape:
    raise ValueError(
      f"gain has shape {gain.shape}, but kernel of shape {kernel.shape} has outputs of shape "
      f"{shape} on axis={shown(axis)}: pass one gain for each output, or name the outputs' axis."
    )
  standardized, _ = batch_norm(
    kernel,
    gain / math.sqrt(fan_in),
    use_running_average=False,
    axis=axis,
    epsilon=epsilon / fan_in,
    dtype=kernel.dtype,
  )
  return standardized


def activation_gain(activation: Callable[[jax.Array], jax.Array]) -> float:
  r"""The factor by which an activation keeps unit variance: 1 / sqrt(Var f(z)), z ~ N(0, 1).

  By Gauss's quadrature in float64 between each two neighbouring integers up to 12, beyond which
  there is nothing. Exact to about 12 digits for functions that are smooth in between, which the
  usual ones are: their kinks, if any, are at integers.

  Args:
    activation: an elementwise function, such as `jax.nn.relu`, that holds nothing traced. This
      function may be called under jit, vmap and the like: it computes when they trace.

  Returns:
    A Python number: sqrt(2 / (1 - 1/π)) = 1.713 for ReLU.

  Raises:
    TypeError: if `activation` is not a function, or holds a traced array.
    ValueError: if it is not elementwise, not finite somewhere, or constant.

  Source: Brock et al. 2021, "Characterizing signal propagation ...", the nonlinearity-specific
  constants gamma, which their code tabulates by sampling.

  >>> import jax
  >>> from jaxbn.alternatives.normalizer_free import activation_gain
  >>> round(activation_gain(jax.nn.relu), 6)
  1.712859
  """
  z, weights = _normal_quadrature()
  with jax.enable_x64(True), jax.ensure_compile_time_eval():
    if activation is None:
      raise TypeError("activation=None is not a function; the identity's gain is 1.")
    points = jnp.asarray(z)
    hoisted = hoist("activation", activation, points, points.dtype)
    if any(isinstance(c, jax.core.Tracer) for c in hoisted.constants):
      raise TypeError(
        f"activation={shown(activation)} holds an array that is traced, but its gain is a Python "
        "number: take the gain outside of the transformation, or of a function without the array."
      )
    # In a jit, since under vmap JAX gives a custom rule, as of jax.nn.relu, to the vmap.
    f = np.asarray(jax.jit(hoisted.function)(points, *hoisted.constants), np.float64)
  var = float(weights @ (f - weights @ f) ** 2)
  if not 0 < var < math.inf:
    raise ValueError(
      f"activation={shown(activation)} has variance {var} for standard normal input: no factor "
      "makes that 1: pass a function that is finite and not constant."
    )
  return 1 / math.sqrt(var)


@functools.cache
def _normal_quadrature() -> tuple[np.ndarray, np.ndarray]:
  """Nodes and weights of an expectation over N(0, 1), piecewise between integers."""
  nodes, weights = np.polynomial.legendre.leggauss(24)
  z = (np.arange(-12, 12)[:, None] + (nodes + 1) / 2).ravel()
  density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
  return z, np.tile(weights / 2, 24) * density


def scaled_activation(
  activation: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array], jax.Array]:
  """The activation times its gain: standard normal input gives unit variance.

  Make it once and keep it: each call gives a new function, for which jit traces anew where it is
  a static argument.

  Args:
    activation: an elementwise function, such as `jax.nn.relu`.

  Returns:
    A function of an array, which keeps the dtype that the activation gives.

  Raises:
    TypeError: if `activation` is not a function.
    ValueError: if `activation_gain` finds none.

  Source: Brock et al. 2021, "Characterizing signal propagation ...".

  >>> import jax, jax.numpy as jnp
  >>> from jaxbn.alternatives.normalizer_free import scaled_activation
  >>> print(scaled_activation(jax.nn.relu)(jnp.array([-1.0, 1.0])).round(3))
  [0.    1.713]
  """
  return functools.partial(_scaled, activation, activation_gain(activation))


def _scaled(activation: Callable[[jax.Array], jax.Array], gain: float, x: jax.Array) -> jax.Array:
  return activation(x) * gain


def expected_variances(
  transitions: Sequence[bool], *, alpha: float = 0.2, var: float = 1.0
) -> tuple[float, ...]:
  r"""The variance that a signal is expected to have before each residual block, and at the end.

      Var(x_{l+1}) = Var(x_l) + alpha²     x_{l+1} = x_l + alpha f(x_l / beta_l)
      Var(x_{l+1}) = 1 + alpha²            where the shortcut is a convolution of x_l / beta_l

  with beta_l = sqrt(Var(x_l)), if f and that convolution keep unit variance. It is of a block's f
  as it is without SkipInit, whose scalar starts at zero and grows in training.

  Args:
    transitions: for each block, whether it has such a shortcut (which is what changes the width
      or the resolution), instead of the identity.
    alpha: what the residual branches are multiplied by.
    var: variance before the first block.

  Returns:
    One number more than there are blocks; beta of block l is the square root of number l.

  Raises:
    TypeError: if alpha or var is not a number.
    ValueError: if var is not positive, or one of them is not finite.

  Source: Brock et al. 2021, "Characterizing signal propagation ...", on normalizer-free ResNets.

  >>> from jaxbn.alternatives.normalizer_free import expected_variances
  >>> expected_variances([True, False, False, True], alpha=1.0)
  (1.0, 2.0, 3.0, 4.0, 2.0)
  """
  for name, value in (("alpha", alpha), ("var", var)):
    _checks.scalar(name, value)
    if not math.isfinite(value):
      raise ValueError(f"{name}={shown(value)} is not finite: no block has such a variance.")
  if var <= 0:
    raise ValueError(
      f"var={shown(var)} is out of range: a signal's variance is positive; 1 is usual."
    )
  result: list[Any] = [var]
  for transition in transitions:
    result.append((1.0 if transition else result[-1]) + alpha**2)
  return tuple(result)
