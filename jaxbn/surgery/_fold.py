"""Fold: the batch norms of a function in evaluation go into the kernels beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from jaxbn.surgery import _interpret
from jaxbn.surgery._abstract import saying_what_lacks
from jaxbn.surgery._difference import difference
from jaxbn.surgery._known import Known
from jaxbn.surgery._scope import Key, Scope, Session
from jaxbn.surgery._trace import flatten


class Report(NamedTuple):
  """What `fold` did.

  Attributes:
    folded: pairs of layers and the kernel that they are in now.
    left: pairs of a layer and why it is where it was.
  """

  folded: tuple[tuple[str, str], ...]
  left: tuple[tuple[str, str], ...]

  def __repr__(self) -> str:
    lines = [f"folded {layers} into {kernel}" for layers, kernel in self.folded]
    return "\n".join(lines + [f"left {layer}: {reason}" for layer, reason in self.left])


class Folded(NamedTuple):
  """What `fold` gives back.

  Attributes:
    function: of (variables, *inputs), for inputs of any batch size; jitted.
    variables: arrays by their paths in the original tree, such as params/Conv_0/kernel.
    report: what was folded, and what was left and why.
  """

  function: Callable[..., Any]
  variables: dict[str, jax.Array]
  report: Report


def fold(
  function: Callable[..., Any], variables: Any, *example: Any, rtol: float | None = None
) -> Folded:
  r"""Put the batch norms of a function in evaluation into the kernels beside them.

  With k = scale / sqrt(var + epsilon), per output channel of a convolution or a product,

      norm(x * kernel + b) = x * (k kernel) + (b - mean) k + bias

  and per input channel, for a norm before it, norm(x) * kernel = x * (k kernel) + (bias - mean k) *
  kernel, where the convolution puts no zeros around or between its inputs (Jacob et al. 2018,
  "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
  section 3.2). Norms are found in the traced program, not by name: whoever wrote the layer, one is
  a chain of factors and shifts, per channel, that do not depend on the inputs, through transposes,
  reshapes and conversions, in calls, `remat` and `scan` too. What has another reader stays, as does
  what is behind an activation, a pool, a concatenation or a sum, and what is beside a kernel with
  other readers.

  Args:
    function: of (variables, *inputs), in evaluation, with running statistics. For Linen
      `lambda v, x: model.apply(v, x, train=False)`; for NNX `lambda state, x:
      nnx.merge(graphdef, state)(x)`.
    variables: a tree of arrays.
    *example: inputs, arrays or trees of them, of any batch size. The result is checked on them.
    rtol: how far the outputs may be from those of the function, as part of the largest element.
      None is 1e-5, or eight units in the last place where kernels give less than float32.

  Returns:
    `Folded`: a jitted function of (variables, *inputs), for inputs of other sizes too, as in
    `jax.export` with a symbolic batch; its variables, a dict of arrays by paths such as
    params/Conv_0/kernel, the folded ones of the kernels' dtypes; a report, to be printed.

  Raises:
    TypeError: variables hold something else than arrays.
    ValueError: variables that lack a collection; there is nothing to fold, with what was found; a
      folded kernel or bias is not finite; the outputs are not, or differ by more than `rtol`, with
      the layer that is most of it.

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as nn
  >>> from jaxbn.surgery import fold
  >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.relu])
  >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
  >>> function, variables, report = fold(model.apply, variables, jnp.ones((2, 4)))
  >>> report
  folded layers_1 into params/layers_0/kernel
  >>> jax.tree.map(jnp.shape, variables)
  {'params/layers_0/bias': (3,), 'params/layers_0/kernel': (4, 3)}
  >>> function(variables, jnp.ones((7, 4))).shape
  (7, 3)
  """
  names, leaves, treedef = _named(variables)
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in map(jax.typeof, leaves)]
  known = [Known(a.shape, a.dtype, frozenset({n})) for a, n in zip(shapes, names, strict=True)]

  def run(session: Session, *inputs: Any) -> Any:
    def flat(leaves: Any, *inputs: Any) -> Any:
      return function(jax.tree.unflatten(treedef, leaves), *inputs)

    closed, like = jax.make_jaxpr(flat, return_shape=True)(shapes, *inputs)
    scope = Scope(session, flatten(closed), [*known, *jax.tree.leaves(inputs)])
    return jax.tree.unflatten(jax.tree.structure(like), _interpret.run(scope))

  def record(only: Key | None = None) -> tuple[Session, Callable[..., Any], dict[str, Any]]:
    session = Session(dict(zip(names, leaves, strict=True)), only=only)
    with saying_what_lacks():
      jax.eval_shape(lambda *inputs: run(session, *inputs), *example)

    @jax.jit
    def folded(variables: dict[str, jax.Array], *inputs: Any) -> Any:
      return run(Session(variables, session.folds), *inputs)

    return session, folded, {**session.used, **session.new}

  session, folded, new = record()
  report = Report(
    tuple((f.layers, f.kernel) for f in session.folds.values()), tuple(session.left.values())
  )
  if not session.folds:
    raise ValueError(
      "function has no batch norm that fold could put into a kernel. Is it the function in "
      f"evaluation, that reads running statistics?\n{report}".rstrip()
    )
  for f in session.folds.values():
    for name in (f.kernel, f.bias):
      if name is not None and not jnp.isfinite(new[name]).all():
        raise ValueError(
          f"variables give NaN or infinity for {f.layers}, folded into {f.kernel}: look at its "
          "statistics and at the kernel, and restore or recalibrate them."
        )
  with jax.default_matmul_precision("highest"):
    wanted = jax.jit(function)(variables, *example)
    error = difference(wanted, folded(new, *example))
    # Or eight units in the last place of what has fewer digits than float32.
    allowed = max(1e-5, 8 * session.epsilon) if rtol is None else rtol
    if not np.isfinite(error):
      raise ValueError(
        "function gives NaN or infinity for the example, with or without folding, so that the "
        "result cannot be checked: look at variables, or give another example."
      )
    if error > allowed:
      alone = {f.layers: record(key) for key, f in session.folds.items()}
      errors = {layers: difference(wanted, f(v, *example)) for layers, (_, f, v) in alone.items()}
      worst = max(errors, key=errors.__getitem__)
      raise ValueError(
        f"with its batch norms folded the function differs from the original by {error:.1e} of its "
        f"largest output, and {allowed:.1e} is allowed. {worst} alone makes {errors[worst]:.1e} of "
        "it: a running mean of many standard deviations, or a variance near zero, does that. "
        f"Recalibrate it, leave it out, or give rtol={2 * error:.0e} if that is good enough."
      )
  return Folded(folded, new, report)


def _named(variables: Any) -> tuple[list[str], list[Any], Any]:
  """The paths and leaves of a tree, and how to put it together again."""
  paths, treedef = tree_flatten_with_path(variables)
  names = []
  for path, leaf in paths:
    if path and path[-1] == GetAttrKey("value"):  # of an NNX variable
      path = path[:-1]
    names.append(keystr(path, simple=True, separator="/"))
    if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
      raise TypeError(
        f"variables has {leaf!r} at {names[-1]!r}, but must hold arrays alone: close over the rest "
        "in the function, and call fold outside of jit."
      )
  if len(set(names)) < len(names):
    raise ValueError(
      f"variables has two leaves of the same path, among {sorted(names)}: rename one."
    )
  return names, [leaf for _, leaf in paths], treedef
