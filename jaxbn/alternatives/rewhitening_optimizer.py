"""An optimizer's state belongs to the parameters: it follows when layers are whitened anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from jaxbn import _checks
from jaxbn._dtypes import accumulation_dtype
from jaxbn.alternatives.rewhitening import Whitening, exact_matmul

__all__ = ["rewhiten_optimizer_state"]


def __dir__() -> list[str]:
  return __all__


_Path = tuple[str, ...]


def rewhiten_optimizer_state(
  state: Any,
  old: Any,
  new: Any,
  *,
  gradients: Sequence[str] = ("mu", "trace", "acc_grads"),
  squares: Sequence[str] = ("nu", "nu_max", "sum_of_squares"),
) -> Any:
  r"""The optimizer's state after `jaxbn.alternatives.rewhitening.rewhiten`.

  An average or a sum of gradients (a momentum, Adam's first moment) becomes what it would be had
  they been taken in the new parameters. V' and b' are linear in V and b, and gradients transform
  the other way round (they are covariant):

      g'_V = U'^T (U^-T g_V - (c' - c)^T g_b),   g'_b = g_b

  Averages of squares of a gradient's entries do not know how the entries are correlated. They are
  transformed as if those were not:

      n'_V = (U'^T U^-T)^2 n_V + (U'^T (c' - c)^T)^2 n_b,   n'_b = n_b   (squares of each entry)

  which is exact wherever only lengths change, never negative, and of the right size. Zeros instead
  would make Adam's next steps 1/sqrt(1 - b2) times too long, for it counts its steps.

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
  >>> from jaxbn.alternatives.rewhitening import Whitening, init
  >>> from jaxbn.alternatives.rewhitening_optimizer import rewhiten_optimizer_state
  >>> params = {"layer": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}}
  >>> state = optax.trace(0.9).init(params)._replace(trace=params)
  >>> old = {"layer": init(1)}
  >>> new = {"layer": Whitening(jnp.zeros(1), jnp.array([[2.0]]))}
  >>> state = rewhiten_optimizer_state(state, old, new)
  >>> state.trace["layer"]["kernel"].item()
  2.0
  """
  before, after = _whitenings(old), _whitenings(new)
  if before.keys() != after.keys():
    of = [["/".join(layer) for layer in tree] for tree in (before, after)]
    raise ValueError(
      f"old has the layers {of[0]}, but new has {of[1]}: pass both of the same network."
    )
  leaves, structure = _flatten(state)
  moved = dict(leaves)
  for path, leaf in leaves.items():
    field, layer, name = _split(path)
    if name != "kernel" or layer not in before:
      continue
    if field not in (*gradients, *squares):
      raise ValueError(
        f"the optimizer's state has the kernel of layer {'/'.join(layer)!r} in its field "
        f"{field!r}, of which it is not known how it follows: name it in gradients or in squares."
      )
    bias = leaves.get((*path[:-1], "bias"))
    if bias is None:
      raise ValueError(
        f"the optimizer's field {field!r} has the kernel of layer {'/'.join(layer)!r}, but not its "
        "bias, without which it cannot follow: give both to the same optimizer."
      )
    moved[path] = _follow(leaf, bias, before[layer], after[layer], 2 if field in squares else 1)
  return jax.tree.unflatten(structure, moved.values())


def _follow(
  kernel: jax.Array, bias: jax.Array, old: Whitening, new: Whitening, power: int
) -> jax.Array:
  """g'_V of the entries of gradients to this power: with each coefficient to that power."""
  dtype = accumulation_dtype(kernel.dtype)
  (c, U), (c_new, U_new) = ((jnp.asarray(a, dtype) for a in w) for w in (old, new))
  of_kernel = jnp.linalg.solve(U, U_new).T  # U'^T U^-T
  of_bias = exact_matmul(c - c_new, U_new)[:, None]
  added = _checks.widen(of_bias**power * bias[None], kernel)
  return (exact_matmul(of_kernel**power, kernel) + added).astype(kernel.dtype)


def _whitenings(tree: Any) -> dict[_Path, Whitening]:
  """By the layer's path, whatever holds center and matrix there."""
  fields: dict[_Path, dict[str, Any]] = {}
  for path, leaf in _flatten(tree)[0].items():
    *layer, name = (key.removeprefix(_FIELD) for key in path)
    fields.setdefault(tuple(layer), {})[name] = leaf
  return {layer: Whitening(**found) for layer, found in fields.items()}


_FIELD = "."  # before the names of what is no key of a mapping, but a field


def _flatten(tree: Any) -> tuple[dict[_Path, Any], Any]:
  """The leaves by their paths, without the field by which NNX's variables hold their value."""

  def names(path: Any) -> _Path:
    keys = tuple(_FIELD * isinstance(key, GetAttrKey) + keystr((key,), simple=True) for key in path)
    return keys[:-1] if keys[-1:] == (_FIELD + "value",) else keys

  leaves, structure = tree_flatten_with_path(tree)
  return {names(path): leaf for path, leaf in leaves}, structure


def _split(path: _Path) -> tuple[str, _Path, str]:
  """The last field on the path, and what it holds there: of which layer, and its name."""
  fields = [i for i, key in enumerate(path) if key.startswith(_FIELD)]
  last = fields[-1] if fields else -1
  field = path[last].removeprefix(_FIELD) if fields else ""
  *layer, name = path[last + 1 :] or ("",)
  if layer[:1] == ["params"]:
    layer = layer[1:]
  return field, tuple(layer), name
