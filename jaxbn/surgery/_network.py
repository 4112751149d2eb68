"""A network and its batch norms: what they are given, and their running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._types import Moments, RunningStats
from jaxbn.surgery import _population
from jaxbn.surgery._find import find
from jaxbn.surgery._foreign import Foreign, theirs
from jaxbn.surgery._layer import Layer
from jaxbn.surgery._spread import Spread, how_far, placed_like, rows
from jaxbn.surgery._trees import Place, get, put, tree_of, with_statistics, with_tree

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


class Population(NamedTuple):
  """What the batch norms were given in one pass."""

  moments: dict[str, Moments]  # by path
  batches: int
  examples: int


class Network:
  """A module, its variables as a tree, and its batch norms, which are known once it was run."""

  def __init__(
    self,
    model: Any,
    variables: Any,
    *,
    inputs: Callable[[Any], tuple[Any, ...]] | None,
    foreign: Mapping[type, Foreign] | None,
    partial: bool,
    arguments: Mapping[str, Any],
  ):
    self.model = model
    self.variables = variables
    self.tree = tree_of(model, variables)
    self.foreign = dict(foreign or {})
    self.partial = partial
    self.arguments = arguments
    self.inputs = inputs
    self.layers: list[Layer] = []
    self.jitted: dict[bool, Any] = {}

  def result(self) -> Any:
    """What a verb gives back: variables, or an NNX module."""
    return with_tree(self.model, self.tree)

  def args(self, batch: Any) -> tuple[Any, ...]:
    """What the network is called with; from the first of them its layers are known."""
    args = self.inputs(batch) if self.inputs else batch if isinstance(batch, tuple) else (batch,)
    if not self.layers:
      self.layers = self._measurable(args)
    return args

  def step(self, evaluating: bool) -> _population.Step:
    return _population.step(self.model, self.layers, self.foreign, evaluating, self.arguments)

  def population(
    self, batches: Batches, evaluating: bool, spread: Spread, progress: Callable[[str], None]
  ) -> Population:
    """One pass."""
    so_far, number, examples = None, 0, 0
    for _, args in self.each(batches):
      if evaluating not in self.jitted:
        step = self.step(evaluating)
        self.jitted[evaluating] = jax.jit(lambda *given, step=step: step(*given)[1])
      so_far = _population.start(self.layers) if so_far is None else so_far
      so_far = self.jitted[evaluating](*spread(self.tree, so_far, np.int32(number), args))
      number, examples = number + 1, examples + rows(args)
      progress(how_far(number, batches))
    assert so_far is not None
    return Population(jax.device_get(so_far), number, examples)

  def each(self, batches: Batches) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The batches, each with what the network is called with for it."""
    empty = True
    for batch in batches() if callable(batches) else batches:
      empty = False
      yield batch, self.args(batch)
    if empty:
      raise ValueError(
        "batches gave none: an iterator that was gone through before is empty. Make a new one, or "
        "give a list or a function that makes one."
      )

  def states(self) -> dict[str, RunningStats]:
    """The running statistics, by layers."""
    return {
      v.path: RunningStats(*(get(self.tree, p) for p in self._places(v))) for v in self.layers
    }

  def set_states(self, states: Mapping[str, RunningStats], updates: int) -> None:
    """Other running statistics, and the number of updates where a layer has a count of them."""
    values: dict[Place, Any] = {}
    for layer in self.layers:
      new = states[layer.path]
      for place, value in zip(self._places(layer), new[:2], strict=True):
        was = get(self.tree, place)
        # The mean of complex inputs is complex, and that of a network just initialized is not yet.
        dtype = jnp.promote_types(was.dtype, value.dtype) if np.iscomplexobj(value) else was.dtype
        values[place] = placed_like(was, value.astype(dtype).reshape(was.shape))
      if "count" in layer.variables:
        place = layer.variables["count"]
        values[place] = jnp.full_like(get(self.tree, place), updates)
    self.tree = put(self.tree, values)

  def refuse_not_finite(self, found: Mapping[str, Moments]) -> None:
    for layer in self.layers:
      bad = ~np.isfinite(found[layer.path].mean) | ~np.isfinite(found[layer.path].var)
      if bad.any():
        raise ValueError(
          f"what {layer} is given has a NaN or an infinity in {bad.sum()} of {bad.size} channels, "
          "and no layer before it has: look at the batches, leave out those in which not all is "
          "finite, or look at the layers between."
        )

  def affine(self, layer: Layer) -> list[Place]:
    """Where its scale and its bias are, if it has them."""
    return [place for name in ("scale", "bias") if (place := self.place(layer, name))]

  def place(self, layer: Layer, name: str) -> Any:
    """Where a layer has its mean, var, scale or bias; None if it has none."""
    return layer.variables.get(theirs(self.foreign, layer.kind, name))

  def _places(self, layer: Layer) -> tuple[Place, Place]:
    return self.place(layer, "mean"), self.place(layer, "var")

  def _measurable(self, args: tuple[Any, ...]) -> list[Layer]:
    """The batch norms, all of which have statistics, and nothing else has."""
    given = {"variables": self.variables, "foreign": self.foreign, **self.arguments}
    layers = find(self.model, *args, **given)
    if not layers:
      raise ValueError(
        f"this {type(self.model).__name__} calls no batch norm of Flax's or ours. If it has one of "
        "its own, say how to read it: foreign={ItsClass: jaxbn.surgery.Foreign(...)}."
      )
    known = {place[:-1] for layer in layers for place in layer.variables.values()}
    names = {(own.name("mean"), own.name("var")) for own in self.foreign.values()}
    there = with_statistics(self.tree, {("mean", "var"), *names})
    lost = ["/".join(map(str, p)) for p in there if p not in known]
    if lost and not self.partial:
      raise ValueError(
        f"there are statistics in {', '.join(lost)}, but no batch norm of Flax's or ours was "
        "called there. If it is of another class, say how to read it with foreign=; if it is not "
        "called here, partial=True leaves its statistics as they are."
      )
    return layers
