r"""Whitening at intervals: natural neural networks (Desjardins et al. 2015).

A dense or convolutional layer is written with its input centred and whitened,

    y = (x - c) U V + b,

where c and U (the whitening) are constants to the gradient, and V and b are learned. Every T steps
c and U are set anew, from statistics of the input, and V and b such that the function stays as it
was: with W = U V the kernel of the plain layer,

    V' = U'^-1 W,   b' = b + (c' - c) W.

Gradient descent on V and b then sees a Hessian (for least squares, and a block of the Fisher matrix
in general) that is about the identity on the side of the inputs: an approximation of natural
gradient descent. A step is one of the plain layer whose gradient is multiplied by the inverse of
E[(x, 1)^T (x, 1)], as Povey et al. (2014) do without changing the parameters. Setting c alone is
mean-normalized SGD (Wiesler et al. 2014).

No gradient goes through the statistics, which needs care: if c moves and b does not, the function
moves, and the next statistics undo what the gradient does. A bias then grows for ever while the
loss stays (Ioffe & Szegedy 2015, section 2). Here b and V make up for every change of c and U.

U = (S + epsilon I)^(-1/2) is the symmetric root (ZCA). Any rotation of it would whiten as well. But
this one moves little if S does, while eigenvectors change signs and places, which would scramble an
optimizer's state: `jaxbn.alternatives.rewhitening_optimizer` takes that along.
"""

from __future__ import annotations

import functools
import operator
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import _checks
from jaxbn._dtypes import accumulation_dtype
from jaxbn._names import shown
from jaxbn._types import Array, Numeric
from jaxbn.variants._covariance import covariance, real, share
from jaxbn.variants._inverse_root import whitening_matrix

__all__ = [
  "Statistics",
  "Whitening",
  "init",
  "reparametrize",
  "rewhiten",
  "statistics",
  "whitened_conv",
  "whitened_dense",
]


def __dir__() -> list[str]:
  return __all__


# Between steps, accuracy is worth more than speed: accelerators round products otherwise.
exact_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Whitening(NamedTuple):
  """What a layer does to its input first: z = (x - center) matrix. No path for gradients.

  Attributes:
    center: c, of shape (inputs,).
    matrix: U, of shape (inputs, inputs), invertible.
  """

  center: jax.Array
  matrix: jax.Array


class Statistics(NamedTuple):
  """Of a layer's input.

  Attributes:
    mean: of shape (inputs,), float32 at least.
    cov: E[(x - mean)(x - mean)^T], of shape (inputs, inputs).
  """

  mean: jax.Array
  cov: jax.Array


def init(inputs: int, dtype: Any = jnp.float32) -> Whitening:
  """The whitening that does nothing: with it a whitened layer is the plain one.

  Args:
    inputs: how many inputs (of a convolution: input channels) the layer has.
    dtype: of both leaves.

  Returns:
    Whitening with center 0 and the identity.

  >>> from jaxbn.alternatives import rewhitening
  >>> rewhitening.init(2).matrix.tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  (inputs,) = _checks.channel_shape(inputs)
  return Whitening(jnp.zeros(inputs, dtype), jnp.eye(inputs, dtype=dtype))


def statistics(
  x: Array,
  *,
  mask: Array | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Statistics:
  """Mean and covariance of a layer's input, over all axes but the last.

  In two passes, the second around the mean that the first has found: nothing cancels.

  Args:
    x: real input of shape (..., inputs).
    mask: boolean, broadcasts against x, with size 1 on the last axis: which examples exist.
    axis_name, axis_index_groups: as in `jaxbn.sync`. Under jit with sharded arrays none is needed.

  Returns:
    Statistics; 0 if no example exists.

  Raises:
    TypeError: integer or complex x; a mask that is not boolean.
    ValueError: an empty batch; a mask that does not broadcast or that differs between inputs; what
      `jaxbn.sync` refuses.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import rewhitening
  >>> rewhitening.statistics(jnp.array([[1.0, 0.0], [3.0, 4.0]])).cov.tolist()
  [[1.0, 2.0], [2.0, 4.0]]
  """
  x = real(x)
  (inputs,) = _checks.split_axes(x.ndim, -1).shape(x)
  axis_name, groups = _checks.sharing(axis_name, axis_index_groups)
  batch = covariance(x, inputs, mask=mask)
  if axis_name is not None:
    batch = share(batch, axis_name, groups)
  return Statistics(batch.mean, batch.cov[0])


def whitened_dense(
  x: Array,
  kernel: Array,
  bias: Array,
  whitening: Whitening,
  *,
  precision: Any = None,
) -> jax.Array:
  r"""y = (x - c) U V + b.

  U V is formed first: so the derivative keeps nothing of the batch's size that a plain layer's does
  not.

  Args:
    x: of shape (..., inputs).
    kernel, bias: V, of shape (inputs, outputs), and b, of shape (outputs,).
    whitening: c and U; no gradient goes through them.
    precision: of the product with x, as in `jax.lax.dot_general`.

  Returns:
    y, of shape (..., outputs), of the dtype to which x, kernel and bias promote.

  Raises:
    TypeError: integer x.
    ValueError: shapes that do not fit.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import rewhitening
  >>> whitening = rewhitening.Whitening(jnp.array([1.0]), jnp.array([[0.5]]))
  >>> x, kernel = jnp.array([[5.0]]), jnp.array([[3.0]])
  >>> rewhitening.whitened_dense(x, kernel, jnp.ones(1), whitening).item()
  7.0
  """
  x, W, bias = _plain(x, kernel, bias, whitening)
  if W.ndim != 2:
    raise ValueError(
      f"kernel has shape {W.shape}, but (inputs, outputs) is needed: whitened_conv is for "
      "convolutions."
    )
  y = jnp.matmul(_centred(x, whitening, W.dtype), W, precision=precision)
  return y + _checks.widen(bias, y)


def whitened_conv(
  x: Array,
  kernel: Array,
  bias: Array,
  whitening: Whitening,
  *,
  strides: int | Sequence[int] = 1,
  padding: str | Sequence[tuple[int, int]] = "SAME",
  kernel_dilation: int | Sequence[int] = 1,
  precision: Any = None,
) -> jax.Array:
  r"""A convolution whose input is whitened across its channels, the same at every position.

  Padding is with zeros of x, before centring: with zeros of the whitened input, that is with c, the
  function could not stay when c changes.

  Args:
    x: of shape (examples, *positions, channels).
    kernel, bias: V, of shape (*window, channels, outputs), and b, of shape (outputs,).
    whitening: c and U of the channels; no gradient goes through them.
    strides, kernel_dilation: one for all axes of positions, or one for each.
    padding: "SAME", "VALID", or (low, high) for each axis of positions.
    precision: of the convolution, as in `jax.lax.conv_general_dilated`.

  Returns:
    y, of shape (examples, *positions, outputs), of the dtype to which x, kernel and bias promote.

  Raises:
    TypeError: integer x.
    ValueError: shapes that do not fit, or another padding.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import rewhitening
  >>> kernel = jnp.ones((3, 1, 1))  # sums of three neighbours
  >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1)
  >>> rewhitening.whitened_conv(x, kernel, jnp.zeros(1), rewhitening.init(1))[0, :, 0].tolist()
  [3.0, 6.0, 5.0]
  """
  x, W, bias = _plain(x, kernel, bias, whitening)
  positions = x.ndim - 2
  if positions < 1 or W.ndim != positions + 2:
    raise ValueError(
      f"kernel has shape {W.shape} and x {x.shape}: (*window, channels, outputs) and "
      "(examples, *positions, channels) are needed, with a window for each axis of positions."
    )
  strides = _each("strides", strides, positions)
  dilation = _each("kernel_dilation", kernel_dilation, positions)
  window = [(k - 1) * d + 1 for k, d in zip(W.shape, dilation, strict=False)]
  x = jnp.pad(x, [(0, 0), *_pads(padding, x.shape[1:-1], window, strides), (0, 0)])
  letters = string.ascii_lowercase[:positions]
  y = lax.conv_general_dilated(
    _centred(x, whitening, W.dtype),
    W,
    strides,
    "VALID",
    rhs_dilation=dilation,
    dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    precision=precision,
  )
  return y + _checks.widen(bias, y)


def reparametrize(params: Mapping[str, Any], old: Whitening, new: Whitening) -> dict[str, Any]:
  r"""The parameters with which a layer is the same function under another whitening.

      V' = U'^-1 U V,   b' = b + (c' - c) U V   (of a convolution, summed over its window)

  With `init(inputs)` for the new one they are those of the plain layer, for instance to export it.

  Args:
    params: `kernel`, dense or convolutional, and `bias`; others stay as they are.
    old: the whitening that they belong to.
    new: another.

  Returns:
    The new params, of the same dtypes. The function stays to rounding, u times the norms of U' and
    V', however it was that U' came about: the solution is backward stable.

  Raises:
    ValueError: params without a kernel or a bias; shapes that do not fit.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import rewhitening
  >>> whitening = rewhitening.Whitening(jnp.array([1.0]), jnp.array([[0.5]]))
  >>> params = {"kernel": jnp.array([[3.0]]), "bias": jnp.ones(1)}
  >>> plain = rewhitening.reparametrize(params, whitening, rewhitening.init(1))
  >>> plain["kernel"].item(), plain["bias"].item()
  (1.5, -0.5)
  """
  for name in ("kernel", "bias"):
    if params.get(name) is None:
      raise ValueError(
        f"params holds {sorted(params)}, but no {name}: a whitened layer needs a kernel, and a "
        "bias to take up what the centre changes."
      )
  kernel, bias = jnp.asarray(params["kernel"]), jnp.asarray(params["bias"])
  _check_whitening(old, kernel)
  _check_whitening(new, kernel)
  wide = accumulation_dtype(jnp.result_type(kernel, bias))
  (c, U), (c_new, U_new) = ((jnp.asarray(a, wide) for a in w) for w in (old, new))
  W = exact_matmul(U, kernel.astype(wide))
  V = jnp.linalg.solve(jnp.broadcast_to(U_new, (*W.shape[:-2], *U.shape)), W)
  b = bias + jnp.sum(exact_matmul(c_new - c, W).reshape(-1, bias.size), 0)
  return {**params, "kernel": V.astype(kernel.dtype), "bias": b.astype(bias.dtype)}


def rewhiten(
  params: Mapping[str, Any],
  whitening: Whitening,
  statistics: Statistics,
  *,
  epsilon: Numeric = 1e-3,
  decorrelate: bool = True,
) -> tuple[dict[str, Any], Whitening]:
  r"""Whitens a layer's input anew, and leaves its function as it is.

      c' = mean,   U' = (cov + epsilon I)^(-1/2)

  (Desjardins et al. 2015, Algorithm 1.) Call it every T steps, outside of the gradient, and let the
  optimizer's state follow: `jaxbn.alternatives.rewhitening_optimizer`.

  Args:
    params: `kernel` and `bias`, as in `reparametrize`.
    whitening: what they belong to.
    statistics: of the input, from `statistics`.
    epsilon: added to the variances: directions of less variance are left with less. A step in one
      of them is up to 1/epsilon times as long as in the plain layer; with fewer examples than
      inputs there are directions of which the statistics know nothing.
    decorrelate: False only centres: mean-normalized SGD (Wiesler et al. 2014).

  Returns:
    (params, whitening), new.

  Raises:
    TypeError: a decorrelate that is not a Python bool.
    ValueError: as `reparametrize`; epsilon out of range.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import rewhitening
  >>> x = jnp.array([[3.0, 1.0], [5.0, 1.0], [3.0, 2.0], [5.0, 2.0]])
  >>> params, whitening = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}, rewhitening.init(2)
  >>> statistics = rewhitening.statistics(x)
  >>> params, whitening = rewhitening.rewhiten(params, whitening, statistics, epsilon=0.0)
  >>> print(whitening.center, jnp.diag(whitening.matrix))
  [4.  1.5] [1. 2.]
  >>> jnp.allclose(rewhitening.whitened_dense(x, params["kernel"], params["bias"], whitening), x)
  Array(True, dtype=bool)
  """
  _checks.epsilon_in_range(epsilon)
  dtype = jnp.asarray(whitening.center).dtype
  matrix = whitening.matrix
  if _checks.static_bool("decorrelate", decorrelate):
    matrix = whitening_matrix(statistics.cov, epsilon=epsilon).astype(dtype)
  new = Whitening(jnp.asarray(statistics.mean, dtype), matrix)
  return reparametrize(params, whitening, new), new


def _plain(x: Any, kernel: Any, bias: Any, whitening: Whitening) -> tuple[jax.Array, ...]:
  """x; the plain layer's kernel W = U V, and the bias, of the dtype of the result."""
  x = real(x)
  kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)
  _check_whitening(whitening, kernel)
  if x.shape[-1:] != kernel.shape[-2:-1] or bias.shape != kernel.shape[-1:]:
    raise ValueError(
      f"x has shape {x.shape}, kernel {kernel.shape} and bias {bias.shape}: the last axis of x "
      "must be the kernel's last but one, and that of bias its last."
    )
  dtype = jnp.result_type(x, kernel, bias)
  wide = accumulation_dtype(dtype)
  U = lax.stop_gradient(whitening.matrix).astype(wide)
  return x, exact_matmul(U, kernel.astype(wide)).astype(dtype), bias.astype(dtype)


def _centred(x: jax.Array, whitening: Whitening, dtype: Any) -> jax.Array:
  center = lax.stop_gradient(whitening.center).astype(accumulation_dtype(x.dtype))
  return (x.astype(center.dtype) - _checks.widen(center, x)).astype(dtype)


def _pads(padding: Any, positions: Any, window: Any, strides: Any) -> Sequence[tuple[int, int]]:
  if isinstance(padding, str) and padding in ("SAME", "VALID"):
    return lax.padtype_to_pads(positions, window, strides, padding)
  if isinstance(padding, str) or np.shape(padding) != (len(positions), 2):
    raise ValueError(
      f"padding={shown(padding)}: 'SAME', 'VALID', or (low, high) for each of the {len(positions)} "
      "axes of positions: pad x itself for another."
    )
  return [(int(low), int(high)) for low, high in padding]


def _each(name: str, value: int | Sequence[int], positions: int) -> tuple[int, ...]:
  """One integer for each axis of positions."""
  values = (value,) * positions if np.ndim(value) == 0 else tuple(value)  # type: ignore[arg-type]
  if len(values) != positions:
    raise ValueError(f"{name}={shown(value)}: one integer, or one for each of {positions} axes.")
  return tuple(map(operator.index, values))  # type: ignore[arg-type]


def _check_whitening(whitening: Any, kernel: jax.Array) -> None:
  if not isinstance(whitening, Whitening):
    raise TypeError(
      f"a {type(whitening).__name__} was given; a rewhitening.Whitening is needed, such as "
      "rewhitening.init(inputs)."
    )
  inputs = kernel.shape[-2:-1]
  if jnp.shape(whitening.center) != inputs or jnp.shape(whitening.matrix) != inputs * 2:
    raise ValueError(
      f"whitening has a center of shape {jnp.shape(whitening.center)} and a matrix of "
      f"{jnp.shape(whitening.matrix)}, but kernel {kernel.shape} has {inputs} inputs: make it with "
      "rewhitening.init(inputs)."
    )
