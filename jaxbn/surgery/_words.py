"""What fold's report calls layers and operations."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from jaxbn.surgery._trace import Op

_KINDS = {
  "add": "a sum",
  "add_any": "a sum",
  "reduce_sum": "a sum",
  "concatenate": "a concatenation",
  "conv_general_dilated": "a convolution",
  "dot_general": "a product",
}
_ACTIVATIONS = {"max", "min", "custom_jvp_call", "logistic", "tanh", "erf", "exp", "select_n"}


def kind(op: Op) -> str:
  """What an operation is, in the words of networks."""
  if op.name in _ACTIVATIONS:
    return "an activation"
  if op.name.startswith("reduce_window"):
    return "a pool"
  if op.eqn.params.get("branches_platforms"):
    return "a choice by platform"
  return _KINDS.get(op.name, op.name)


def layers(leaves_of_values: Iterable[frozenset[str]]) -> str:
  """The layers that values are of, given the paths of the variables that each is made of."""
  return ", ".join(dict.fromkeys(map(_layer, leaves_of_values)))


def _layer(leaves: frozenset[str]) -> str:
  """What paths of a layer's variables share: norm of params/norm/scale, batch_stats/norm/var."""
  paths = [leaf.split("/")[:-1] for leaf in sorted(leaves)]

  def start(paths: list[list[str]]) -> list[str]:
    same = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return [names[0] for names in same]

  ends = start([p[::-1] for p in paths])[::-1]
  return "/".join(ends or start(paths)) or ", ".join(sorted(leaves))
