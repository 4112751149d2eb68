"""Which parameters are a norm's, which a bias, which a kernel: for optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from jaxbn import linen
from jaxbn import nnx as jaxbn_nnx
from jaxbn.surgery._abstract import shapes_of_variables
from jaxbn.surgery._find import find
from jaxbn.surgery._foreign import Foreign

NORMS = (
  *(nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm),
  *(nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm),
  *(linen.ReferenceBatchNorm, linen.MeanOnlyBatchNorm, linen.WhiteningNorm, linen.SkipInit),
  *(jaxbn_nnx.ReferenceBatchNorm, jaxbn_nnx.MeanOnlyBatchNorm, jaxbn_nnx.WhiteningNorm),
  jaxbn_nnx.SkipInit,
)
LINEAR = (
  *(nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose, nn.ConvLocal),
  *(nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose),
  *(linen.WhitenedDense, linen.WhitenedConv, jaxbn_nnx.WhitenedLinear, jaxbn_nnx.WhitenedConv),
)

_LABELS = ("norm", "bias", "kernel", "other")


def param_labels(
  model: Any,
  *example: Any,
  variables: Any = None,
  norms: Sequence[type] = (),
  foreign: Mapping[type, Foreign] | None = None,
  labels: Mapping[str, str] | None = None,
  **arguments: Any,
) -> Any:
  """What each parameter is to its layer, for `optax.multi_transform`.

      norm    of a normalization: batch, layer, group, instance, RMS norm, and those of jaxbn
      bias    of a linear layer, all but the kernel: its bias, and a gain
      kernel  of a linear layer
      other   of whatever else

  It is told by the class of the layer, whatever the network calls it: a scale of a network's own is
  other.

  Args:
    model: a module of Flax Linen or NNX.
    *example: what it is called with; of an NNX module nothing.
    variables: of a Linen module, or their shapes; None: those that init makes.
    norms: further classes whose parameters are a norm's, such as a network's own.
    foreign: batch norms that are not Flax's, by their class, as for the other verbs: norms too.
    labels: other labels for some of the four.
    **arguments: further arguments of `module.apply`.

  Returns:
    Labels in the structure of `variables["params"]`, or of `nnx.state(model, nnx.Param)`.

  Raises:
    ValueError: labels for something else; no parameters.

  >>> import flax.linen as nn, jax.numpy as jnp, jaxbn.surgery
  >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
  >>> jaxbn.surgery.param_labels(model, jnp.zeros((8, 3)))["layers_1"]
  {'bias': 'norm', 'scale': 'norm'}
  """
  names = {name: name for name in _LABELS} | dict(labels or {})
  for name in names.keys() - set(_LABELS):
    raise ValueError(f"labels has {name!r}, but there are {', '.join(_LABELS)}.")
  kinds = (*NORMS, *norms, *LINEAR)
  if isinstance(model, nn.Module):
    if variables is None:
      variables = shapes_of_variables(model, example, arguments)
    given = {"variables": variables, "kinds": kinds, "foreign": foreign}
    found = find(model, *example, **given, **arguments)
    params, first = variables.get("params", {}), 1  # after the collection
  else:
    found = find(model, variables=variables, kinds=kinds, foreign=foreign)
    params, first = nnx.state(model, nnx.Param), 0
  if not jax.tree.leaves(params):
    raise ValueError(f"this {type(model).__name__} has no parameters to be labeled.")
  known = {}
  for layer in found:
    linear = issubclass(layer.kind, LINEAR)
    for name, place in layer.variables.items():
      of_linear = "kernel" if name == "kernel" else "bias"
      known[place[first:]] = names[of_linear if linear else "norm"]

  def label(path: Any, _: Any) -> str:
    keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    places = (tuple(keys[:n]) for n in range(len(keys), 0, -1))
    return next((known[place] for place in places if place in known), names["other"])

  # Of NNX without the variables around the labels: optimizers look at their values alone.
  is_leaf = lambda value: isinstance(value, nnx.Variable)  # noqa: E731
  return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_leaf)


def decay_mask(model: Any, *example: Any, **options: Any) -> Any:
  """True for the parameters that weight decay shall shrink: kernels, and what is no layer's.

  Not the parameters of norms, nor biases and gains: behind a norm decay of a kernel sets its
  learning rate, but decay of scale and bias changes what the network computes. For the argument
  `mask` of optax's `adamw` and `add_decayed_weights`.

  Args:
    model: a module of Flax Linen or NNX.
    *example: what it is called with; of an NNX module nothing.
    **options: of `param_labels`: variables, norms, foreign, and what the network is called with.

  Returns:
    Booleans in the structure of `variables["params"]`, or of `nnx.state(model, nnx.Param)`.

  >>> import flax.linen as nn, jax.numpy as jnp, jaxbn.surgery
  >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
  >>> jaxbn.surgery.decay_mask(model, jnp.zeros((8, 3)))["layers_0"]
  {'bias': False, 'kernel': True}
  """
  labels = param_labels(model, *example, **options)
  return jax.tree.map(lambda label: label in ("kernel", "other"), labels)
