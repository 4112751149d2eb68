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

The statistics are taken between the steps, and no gradient goes through them: that needs care which
batch normalization does not. If c is moved and b is not, the function moves, and whatever the next
gradient does the next statistics undo: Ioffe & Szegedy (2015, section 2) show a bias that grows for
ever while the loss stays as it is. Here every change of c and U is paid for in b and V.

U = (S + epsilon I)^(-1/2) is the symmetric root (ZCA). Any rotation of it would whiten as well, and
plain gradient descent cannot tell them apart. But this one moves little if S does, while
eigenvectors change signs and places, which would scramble an optimizer's state.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import _checks
from jaxbn._dtypes import accumulation_dtype
from jaxbn.variants._covariance import covariance, real, share
from jaxbn.variants._inverse_root import whitening_matrix

if TYPE_CHECKING:
  import chex

__all__ = [
  "Statistics",
  "Whitening",
  "init",
  "reparametrize",
  "rewhiten",
  "rewhiten_optimizer_state",
  "statistics",
  "whitened_conv",
  "whitened_dense",
]

# Between steps, accuracy is worth more than speed: accelerators round products otherwise.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_KERNEL, _BIAS = "kernel", "bias"


class Whitening(NamedTuple):
  """What a layer does to its input first: z = (x - center) matrix. No path for gradients.

  Attributes:
    center: c, of shape (inputs,).
    matrix: U, of shape (inputs, inputs), invertible.
  """

  center: chex.Array
  matrix: chex.Array


class Statistics(NamedTuple):
  """Of a layer's input.

  Attributes:
    mean: of shape (inputs,), float32 at least.
    cov: E[(x - mean)(x - mean)^T], of shape (inputs, inputs).
  """

  mean: chex.Array
  cov: chex.Array


def init(inputs: int, dtype: Any = jnp.float32) -> Whitening:
  """The whitening that does nothing: with it a whitened layer is the plain one.

  Args:
    inputs: how many inputs (of a convolution: input channels) the layer has.
    dtype: of both leaves.

  Returns:
    Whitening with center 0 and the identity.

  >>> from jaxbn.variants import natural
  >>> natural.init(2).matrix.tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  (inputs,) = _checks.channel_shape(inputs)
  return Whitening(jnp.zeros(inputs, dtype), jnp.eye(inputs, dtype=dtype))


def statistics(
  x: chex.Array,
  *,
  mask: chex.Array | None = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Statistics:
  """Mean and covariance of a layer's input, over all axes but the last.

  In two passes, the second around the mean that the first has found: nothing cancels.

  Args:
    x: real input of shape (..., inputs).
    mask: boolean, broadcasts against x, with size 1 on the last axis: which examples exist.
    axis_name: name (or names) of the axis of pmap, shard_map or vmap whose members share. Under jit
      with sharded arrays none is needed.
    axis_index_groups: as in `jaxbn.sync`.

  Returns:
    Statistics; 0 if no example exists.

  Raises:
    TypeError: integer or complex x; a mask that is not boolean.
    ValueError: an empty batch; a mask that does not broadcast or that differs between inputs;
      axis_name not bound; groups that do not partition it, or without axis_name.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import natural
  >>> natural.statistics(jnp.array([[1.0, 0.0], [3.0, 4.0]])).cov.tolist()
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
  x: chex.Array,
  kernel: chex.Array,
  bias: chex.Array,
  whitening: Whitening,
  *,
  precision: Any = None,
) -> jax.Array:
  r"""y = (x - c) U V + b.

  U V is formed first: as a function of V that is the same, and nothing of the batch's size is kept
  for the derivative that a plain layer does not keep.

  Args:
    x: of shape (..., inputs).
    kernel: V, of shape (inputs, outputs).
    bias: b, of shape (outputs,).
    whitening: c and U; no gradient goes through them.
    precision: of the product with x, as in `jax.lax.dot_general`.

  Returns:
    y, of shape (..., outputs), of the dtype to which x, kernel and bias promote.

  Raises:
    TypeError: integer x.
    ValueError: shapes that do not fit.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import natural
  >>> whitening = natural.Whitening(jnp.array([1.0]), jnp.array([[0.5]]))
  >>> natural.whitened_dense(jnp.array([[5.0]]), jnp.array([[3.0]]), jnp.ones(1), whitening).item()
  7.0
  """
  x, W, bias = _prepare(x, kernel, bias, whitening)
  if W.ndim != 2:
    raise ValueError(
      f"kernel has shape {W.shape}, but (inputs, outputs) is needed: whitened_conv is for "
      "convolutions."
    )
  y = jnp.matmul(_centred(x, whitening, W.dtype), W, precision=precision)
  return y + _checks.widen(bias, y)


def whitened_conv(
  x: chex.Array,
  kernel: chex.Array,
  bias: chex.Array,
  whitening: Whitening,
  *,
  strides: int | Sequence[int] = 1,
  padding: str | Sequence[tuple[int, int]] = "SAME",
  kernel_dilation: int | Sequence[int] = 1,
  precision: Any = None,
) -> jax.Array:
  r"""A convolution whose input is whitened across its channels, the same at every position.

  Padding is with zeros of x, before centring, as in the plain convolution. Were it with zeros of
  the whitened input, that is with c, the function could not stay as it is when c changes.

  Args:
    x: of shape (examples, *positions, channels).
    kernel: V, of shape (*window, channels, outputs).
    bias: b, of shape (outputs,).
    whitening: c and U of the channels; no gradient goes through them.
    strides: of the window, one for all axes of positions or one for each.
    padding: "SAME", "VALID", or (low, high) for each axis of positions.
    kernel_dilation: one for all axes of positions or one for each.
    precision: of the convolution, as in `jax.lax.conv_general_dilated`.

  Returns:
    y, of shape (examples, *positions, outputs), of the dtype to which x, kernel and bias promote.

  Raises:
    TypeError: integer x.
    ValueError: shapes that do not fit, or another padding.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import natural
  >>> kernel = jnp.ones((3, 1, 1))  # sums of three neighbours
  >>> x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1)
  >>> natural.whitened_conv(x, kernel, jnp.zeros(1), natural.init(1))[0, :, 0].tolist()
  [3.0, 6.0, 5.0]
  """
  x, W, bias = _prepare(x, kernel, bias, whitening)
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
  letters = "".join(chr(ord("a") + i) for i in range(positions))
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

  With `init(inputs)` for the new one they are those of the plain layer, for instance to evaluate it
  or to export it.

  Args:
    params: `kernel`, dense or convolutional, and `bias`; others stay as they are.
    old: the whitening that they belong to.
    new: another.

  Returns:
    The new params, of the same dtypes. The solution is backward stable: the function stays as it is
    to rounding, u times the norms of U' and V', however it was that U' came about.

  Raises:
    ValueError: params without a kernel or a bias; shapes that do not fit.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import natural
  >>> whitening = natural.Whitening(jnp.array([1.0]), jnp.array([[0.5]]))
  >>> params = {"kernel": jnp.array([[3.0]]), "bias": jnp.ones(1)}
  >>> plain = natural.reparametrize(params, whitening, natural.init(1))
  >>> plain["kernel"].item(), plain["bias"].item()
  (1.5, -0.5)
  """
  for name in (_KERNEL, _BIAS):
    if params.get(name) is None:
      raise ValueError(
        f"params holds {sorted(params)}, but no {name}: a whitened layer needs a kernel, and a "
        "bias to take up what the centre changes."
      )
  kernel, bias = jnp.asarray(params[_KERNEL]), jnp.asarray(params[_BIAS])
  _check_whitening(old, kernel)
  _check_whitening(new, kernel)
  wide = accumulation_dtype(jnp.result_type(kernel, bias))
  (c, U), (c_new, U_new) = ((jnp.asarray(a, wide) for a in w) for w in (old, new))
  W = _matmul(U, kernel.astype(wide))
  V = jnp.linalg.solve(jnp.broadcast_to(U_new, (*W.shape[:-2], *U.shape)), W)
  b = bias + jnp.sum(_matmul(c_new - c, W).reshape(-1, bias.size), 0)
  return {**params, _KERNEL: V.astype(kernel.dtype), _BIAS: b.astype(bias.dtype)}


def rewhiten(
  params: Mapping[str, Any],
  whitening: Whitening,
  statistics: Statistics,
  *,
  epsilon: chex.Numeric = 1e-3,
  decorrelate: bool = True,
) -> tuple[dict[str, Any], Whitening]:
  r"""Whitens a layer's input anew, and leaves its function as it is.

      c' = mean,   U' = (cov + epsilon I)^(-1/2)

  (Desjardins et al. 2015, Algorithm 1.) Call it every T steps, outside of the gradient, and let the
  optimizer's state follow (`rewhiten_optimizer_state`).

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
  >>> from jaxbn.variants import natural
  >>> x = jnp.array([[3.0, 1.0], [5.0, 1.0], [3.0, 2.0], [5.0, 2.0]])
  >>> params, whitening = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}, natural.init(2)
  >>> params, whitening = natural.rewhiten(params, whitening, natural.statistics(x), epsilon=0.0)
  >>> print(whitening.center, jnp.diag(whitening.matrix))
  [4.  1.5] [1. 2.]
  >>> jnp.allclose(natural.whitened_dense(x, params["kernel"], params["bias"], whitening), x)
  Array(True, dtype=bool)
  """
  _checks.epsilon_in_range(epsilon)
  dtype = jnp.asarray(whitening.center).dtype
  matrix = whitening.matrix
  if _checks.static_bool("decorrelate", decorrelate):
    matrix = whitening_matrix(statistics.cov, epsilon=epsilon).astype(dtype)
  new = Whitening(jnp.asarray(statistics.mean, dtype), matrix)
  return reparametrize(params, whitening, new), new


def rewhiten_optimizer_state(
  state: Any,
  old: Any,
  new: Any,
  *,
  gradients: Sequence[str] = ("mu", "trace", "acc_grads"),
  squares: Sequence[str] = ("nu", "nu_max", "sum_of_squares"),
) -> Any:
  r"""The optimizer's state after whitening anew.

  What is an average or a sum of gradients (a momentum, Adam's first moment) becomes what it would
  be had they been taken in the new parameters. V' and b' are linear in V and b, so that gradients
  are, the other way round (they are covariant):

      g'_V = U'^T (U^-T g_V - (c' - c)^T g_b),   g'_b = g_b

  Averages of squares of a gradient's entries cannot follow exactly: they do not know how the
  entries are correlated. They are transformed as if those were not:

      n'_V = (U'^T U^-T)^2 n_V + (U'^T (c' - c)^T)^2 n_b,   n'_b = n_b   (squares of each entry)

  which is exact for uncorrelated entries (and wherever only lengths change), never negative, and of
  the right size. Zeros instead would make Adam's next steps 1/sqrt(1 - b2) times too long, for it
  counts its steps.

  Args:
    state: an optimizer's of optax, or any tree of named tuples, whose fields hold trees like the
      parameters (or parts of them). What belongs to no whitened layer stays as it is.
    old: the whitenings before, in a tree with the structure of the parameters where each whitened
      layer has, in place of its kernel and bias, a `Whitening` or a mapping with its fields, such
      as the collection `whitening` of a Linen model. Of a single layer just that.
    new: those after, likewise.
    gradients: names of fields that hold sums or averages of gradients.
    squares: names of fields that hold those of squares.

  Returns:
    The new state, of the same structure.

  Raises:
    ValueError: a field with a kernel of a whitened layer in neither list; a kernel without its
      bias; old and new of different structures.

  >>> import jax.numpy as jnp, optax
  >>> from jaxbn.variants import natural
  >>> params = {"layer": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}}
  >>> state = optax.trace(0.9).init(params)._replace(trace=params)
  >>> twice = natural.Whitening(jnp.zeros(1), jnp.array([[2.0]]))
  >>> state = natural.rewhiten_optimizer_state(state, {"layer": natural.init(1)}, {"layer": twice})
  >>> state.trace["layer"]["kernel"].item()
  2.0
  """
  before, after = _whitenings(old), _whitenings(new)
  if before.keys() != after.keys():
    of = [["/".join(layer) for layer in tree] for tree in (before, after)]
    raise ValueError(
      f"old has the layers {of[0]}, but new has {of[1]}: pass both of the same network."
    )
  given, structure = jax.tree_util.tree_flatten_with_path(state)
  leaves = {_names(path): leaf for path, leaf in given}
  moved = dict(leaves)
  for path, leaf in leaves.items():
    field, where = _field(path)
    layer = where[:-1]
    if where[-1:] != (_KERNEL,) or layer not in before:
      continue
    if field not in (*gradients, *squares):
      raise ValueError(
        f"the optimizer's state has the kernel of layer {'/'.join(layer)!r} in its field "
        f"{field!r}, of which it is not known how it follows: name it in gradients or in squares."
      )
    of_bias = (*path[:-1], _BIAS)
    if of_bias not in leaves:
      raise ValueError(
        f"the optimizer's field {field!r} has the kernel of layer {'/'.join(layer)!r}, but not its "
        "bias, without which it cannot follow: give both to the same optimizer."
      )
    follow = _square if field in squares else _gradient
    moved[path] = follow(leaf, leaves[of_bias], before[layer], after[layer])
  return jax.tree.unflatten(structure, [moved[_names(path)] for path, _ in given])


def _gradient(g: jax.Array, of_bias: jax.Array, old: Whitening, new: Whitening) -> jax.Array:
  change, shift = _changes(g, old, new)
  return (_matmul(change, g) - _checks.widen(shift[:, None] * of_bias[None], g)).astype(g.dtype)


def _square(n: jax.Array, of_bias: jax.Array, old: Whitening, new: Whitening) -> jax.Array:
  change, shift = _changes(n, old, new)
  added = (shift**2)[:, None] * of_bias[None]
  return (_matmul(change**2, n) + _checks.widen(added, n)).astype(n.dtype)


def _changes(like: jax.Array, old: Whitening, new: Whitening) -> tuple[jax.Array, jax.Array]:
  """U'^T U^-T and U'^T (c' - c)^T."""
  dtype = accumulation_dtype(like.dtype)
  (c, U), (c_new, U_new) = ((jnp.asarray(a, dtype) for a in w) for w in (old, new))
  return jnp.linalg.solve(U, U_new).T, _matmul(c_new - c, U_new)


def _whitenings(tree: Any) -> dict[tuple[str, ...], Whitening]:
  """By the layer's path, whatever holds center and matrix there."""
  fields: dict[tuple[str, ...], dict[str, Any]] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    *layer, name = (key.removeprefix(_FIELD) for key in _names(path))
    fields.setdefault(tuple(layer), {})[name] = leaf
  return {layer: Whitening(**found) for layer, found in fields.items()}


_FIELD = "."  # before the names of what is no key of a mapping, but a field


def _names(path: Any) -> tuple[str, ...]:
  """The keys on a path, without the one by which NNX's variables hold their value."""
  fields = [isinstance(key, jax.tree_util.GetAttrKey) for key in path]
  names = [jax.tree_util.keystr((key,), simple=True) for key in path]
  marked = tuple(_FIELD * field + name for field, name in zip(fields, names, strict=True))
  return marked[:-1] if marked[-1:] == (_FIELD + "value",) else marked


def _field(path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
  """The field of an optimizer's state, and the path of the parameter in the tree that it holds."""
  last = max((i for i, key in enumerate(path) if key.startswith(_FIELD)), default=-1)
  field = path[last].removeprefix(_FIELD) if last >= 0 else ""
  where = path[last + 1 :]
  return field, where[1:] if where[:1] == ("params",) else where


def _prepare(
  x: Any, kernel: Any, bias: Any, whitening: Whitening
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
  return x, _matmul(U, kernel.astype(wide)).astype(dtype), bias.astype(dtype)


def _centred(x: jax.Array, whitening: Whitening, dtype: Any) -> jax.Array:
  center = lax.stop_gradient(whitening.center).astype(accumulation_dtype(x.dtype))
  return (x.astype(center.dtype) - _checks.widen(center, x)).astype(dtype)


def _pads(padding: Any, positions: Any, window: Any, strides: Any) -> Sequence[tuple[int, int]]:
  if isinstance(padding, str) and padding in ("SAME", "VALID"):
    return lax.padtype_to_pads(positions, window, strides, padding)
  if isinstance(padding, str) or np.shape(padding) != (len(positions), 2):
    raise ValueError(
      f"padding={padding!r}: 'SAME', 'VALID', or (low, high) for each of the {len(positions)} axes "
      "of positions: pad x itself for another."
    )
  return [(int(low), int(high)) for low, high in padding]


def _each(name: str, value: int | Sequence[int], positions: int) -> tuple[int, ...]:
  """One integer for each axis of positions."""
  values = (value,) * positions if np.ndim(value) == 0 else tuple(value)  # type: ignore[arg-type]
  if len(values) != positions:
    raise ValueError(f"{name}={value!r}: one integer, or one for each of {positions} axes.")
  return tuple(map(operator.index, values))  # type: ignore[arg-type]


def _check_whitening(whitening: Any, kernel: jax.Array) -> None:
  if not isinstance(whitening, Whitening):
    raise TypeError(
      f"a {type(whitening).__name__} was given; a natural.Whitening is needed, such as "
      "natural.init(inputs)."
    )
  inputs = kernel.shape[-2:-1]
  if jnp.shape(whitening.center) != inputs or jnp.shape(whitening.matrix) != inputs * 2:
    raise ValueError(
      f"whitening has a center of shape {jnp.shape(whitening.center)} and a matrix of "
      f"{jnp.shape(whitening.matrix)}, but kernel {kernel.shape} has {inputs} inputs: make it with "
      "natural.init(inputs)."
    )
