"""A program, run with its chains of affine steps folded into the kernels beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxbn.surgery import _bodies
from jaxbn.surgery._chain import Chain, Inputs, Steps, is_affine
from jaxbn.surgery._known import Known
from jaxbn.surgery._linear import Linear, is_move, linear
from jaxbn.surgery._scope import Fold, Scope
from jaxbn.surgery._trace import Op, has_linear
from jaxbn.surgery._words import kind, layers


def run(scope: Scope) -> list[Any]:
  """What the scope's program gives."""
  return _Run(scope).outputs()


class _Run:
  def __init__(self, scope: Scope) -> None:
    self.scope, self.session, self.readers = scope, scope.session, scope.program.readers
    self.env = dict(scope.env)
    self.makers = {i: op for op in scope.program.ops for i in op.outputs}
    self.origins: dict[int, str] = {}  # of those of which the maker does not say it

  def outputs(self) -> list[Any]:
    for op in self.scope.unknown:
      for i, value in zip(op.outputs, self.step(op), strict=True):
        self.env[i] = value if len(self.readers[i]) == 1 else self.array(value)
    return [self.array(self.env[i]) for i in self.scope.program.outputs]

  def step(self, op: Op) -> Sequence[Any]:
    """What an operation gives: arrays, or a chain."""
    inputs = [self.env[i] for i in op.inputs]
    known = tuple(v if isinstance(v, Known) else None for v in inputs)
    if known.count(None) == 1 and len(op.outputs) == 1 and not op.eqn.effects:
      chain = self.chained(op, known)
      if chain is not None:
        return [chain]
    inputs = [self.env[i] for i in op.inputs]
    reason = f"{kind(op)} comes after it"
    settled = [v if isinstance(v, Known) else self.array(v, reason) for v in inputs]
    linear_inside = has_linear(op.eqn)
    if _bodies.can_be_looked_into(op) and (linear_inside or op.name == "cond"):
      return _bodies.outputs(self.scope, op, settled, run)
    if linear_inside:
      self.not_looked_into(op, settled)
    return op.run_here([self.array(v) for v in settled])

  def not_looked_into(self, op: Op, inputs: Sequence[Any]) -> None:
    """Lists what of the network may be inside."""
    given = [v.leaves for v in inputs if isinstance(v, Known) and v.leaves]
    if given:
      reason = f"fold does not look into {kind(op)}: fold the function that runs inside it"
      self.session.left[*self.scope.key, op.outputs[0]] = layers(given), reason

  def chained(self, op: Op, inputs: Inputs) -> Chain | None:
    """The operation on the chain that it reads, or on a new one; None for other operations."""
    position = inputs.index(None)
    number = op.inputs[position]
    value, reason = self.env[number], self.origin(number)
    kernel = inputs[1 - position] if len(inputs) == 2 else None
    of_op = None if kernel is None else linear(op, 1 - position)
    own = kernel is not None and bool(kernel.leaves) and not self.scope.shared(*kernel.leaves)
    if of_op is not None and not own:
      self.origins[op.outputs[0]] = "the kernel before it has other readers"
      return None
    affine = is_affine(op, inputs)
    if of_op is None and not affine and not (isinstance(value, Chain) and is_move(op)):
      return None
    if isinstance(value, Chain):
      chain = self.longer(value, op, inputs, of_op, kernel)
      if isinstance(chain, Chain):
        return chain
      reason = chain
      # A norm of which the shift alone could go into the kernel stays whole.
      whole = affine and not value.factors
      value = self.run(value.base, value.steps) if whole else self.array(value, reason)
      self.env[number] = value
    chain = self.longer(Chain(value, reason), op, inputs, of_op, kernel)
    return chain if isinstance(chain, Chain) else None

  def longer(
    self, chain: Chain, op: Op, inputs: Inputs, of_op: Linear | None, kernel: Known | None
  ) -> Chain | str:
    """The chain with one step more, or why it cannot be."""
    if of_op is not None and kernel is not None:
      longer = chain.through(op, inputs, of_op, kernel)
    else:
      longer = chain.affine(op, inputs) if is_affine(op, inputs) else chain.moved(op, inputs)
    if self.scope.parent is None or isinstance(longer, str) or longer.kernel is None:
      return longer
    differs = [self.scope.outside(v)[1] for v in (longer.kernel, *longer.factors)]
    repeats = any(differs) and not differs[0]
    return "the kernel beside it is the same in all turns of a loop" if repeats else longer

  def origin(self, number: int) -> str:
    """Why a chain starts only at this value."""
    if number in self.origins:
      return self.origins[number]
    if len(self.readers[number]) > 1:
      return "what it normalizes has another reader"
    maker = self.makers.get(number)
    return (
      f"it stands at {self.scope.start}" if maker is None else f"it stands behind {kind(maker)}"
    )

  def array(self, value: Any, reason: str = "") -> Any:
    """A value, computed: known, a chain that ends here for this reason, or an array."""
    if isinstance(value, Known):
      return self.scope.value(value)
    if not isinstance(value, Chain):
      return value
    if value.linear is not None and value.kernel is not None and value.is_norm:
      fold = self.fold(value, value.kernel)
      if fold is not None:
        return self.folded(value, value.linear, fold)
    elif value.factors:
      key = (*self.scope.key, value.steps[-1][0].outputs[0])
      reasons = filter(None, (value.origin, reason))
      self.session.left[key] = (_named(value), "; ".join(reasons))
    return self.run(value.base, value.steps)

  def run(self, x: Any, steps: Steps) -> Any:
    for op, inputs in steps:
      (x,) = op.run_here([x if v is None else self.scope.value(v) for v in inputs])
    return x

  def folded(self, chain: Chain, of_op: Linear, fold: Fold) -> Any:
    """The chain by one linear operation."""
    before, after = chain.moves()
    x = self.run(chain.base, before)
    kernel = self.scope.stored(fold.kernel, chain.folded_kernel())
    (y,) = chain.steps[chain.at][0].run_here((kernel, x) if of_op.kernel == 0 else (x, kernel))
    self.session.epsilon = max(self.session.epsilon, float(jnp.finfo(y.dtype).eps))
    if chain.shift is not None and fold.bias is not None:
      shape = chain.shift.shape
      bias = chain.shift.reshaped([n for n in shape if n != 1]).cast(y.dtype)
      y = y + self.scope.stored(fold.bias, bias).reshape(shape)
    return self.run(y, after)

  def fold(self, chain: Chain, kernel: Known) -> Fold | None:
    """Where the chain is folded, if it is."""
    folds = self.session.folds
    if not self.session.recording or kernel.leaves in folds:
      return folds.get(kernel.leaves)
    if self.session.only not in (None, kernel.leaves):
      return None
    own = kernel.leaves.union(*(v.leaves for v in chain.factors + chain.shifts))
    first = min(kernel.leaves)
    parent, _, last = first.rpartition("/")
    bias = f"{parent}/bias".lstrip("/") if last == "kernel" else f"{first}_bias"

    def free(name: str) -> str:
      kept = name in self.session.variables and (name not in own or self.scope.shared(name))
      while kept or any(name in fold[1:] for fold in folds.values()):
        kept, name = False, f"{name}_folded"
      return name

    new_bias = None if chain.shift is None else free(bias)
    folds[kernel.leaves] = fold = Fold(_named(chain), free(first), new_bias)
    return fold


def _named(chain: Chain) -> str:
  """The names of the layers that multiply, or, where none does, of those that add."""
  return layers(v.leaves for v in chain.factors or chain.shifts)
