"""Insert: batch norm enters a trained network that has none, and its outputs stay."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import errors

from jaxbn._track import update
from jaxbn.surgery import _behind
from jaxbn.surgery._difference import difference
from jaxbn.surgery._find import find
from jaxbn.surgery._layer import Layer
from jaxbn.surgery._network import Batches, Network
from jaxbn.surgery._spread import Spread, to_stderr
from jaxbn.surgery._trees import get, put, tree_of

_ALLOWED = 1e-4  # relative, in evaluation


class Inserted(NamedTuple):
  """What `insert` gives back.

  Attributes:
    model: the network with batch norms.
    variables: of a Linen module; None for an NNX one, which has them.
    layers: after which there is one now, which is called `norm` and stands below them.
    evaluation: how far the outputs are from the original's on the first batch, as part of their
      largest element.
    training: likewise, where each norm is by its batch.
  """

  model: Any
  variables: Any
  layers: tuple[Layer, ...]
  evaluation: float
  training: float


def insert(
  model: Any,
  variables: Any,
  batches: Batches,
  *,
  where: Callable[[str, Layer], bool] | None = None,
  norm: Callable[..., Any] | None = None,
  inputs: Callable[[Any], tuple[Any, ...]] | None = None,
  devices: Sequence[Any] | None = None,
  progress: Callable[[str], None] = to_stderr,
  **arguments: Any,
) -> Inserted:
  """Batch norm for a trained network that has none, such as a VGG (Simonyan & Zisserman 2015).

  Behind a layer that gives y there is then, with the mean and the variance of y over the batches,

      (y - mean) / sqrt(var + epsilon) * scale + bias,   scale = sqrt(var + epsilon), bias = mean,

  which is y in evaluation: the network is what it was, and can be trained on as one with batch
  norm, at higher rates. In training each norm is by its batch, whose statistics are not those of
  all batches: the difference that this makes is reported.

  Of a Linen module a subclass is made, with the same variables and those of the norms. It trains
  where `batch_stats` may change, as in `apply(..., mutable=["batch_stats"])`. An NNX module is
  copied; `train()` and `eval()` are for the norms too.

  Args:
    model: a module of Flax Linen or NNX, called as in evaluation.
    variables: of a Linen module; None for an NNX one.
    batches: what the network is called with: an array, or a tuple of arguments, per batch. The
      statistics are those of all elements of all of them.
    where: behind which layers, as a function of a layer's path and its description (`Layer`);
      default: all convolutions, dense layers and einsums except the last one that is called.
    norm: makes the layer, with scale and bias: `functools.partial(jaxbn.linen.BatchNorm,
      momentum=0.9)`, or of NNX, where it is given the number of features and `rngs`. Default,
      jaxbn's `BatchNorm`.
    inputs: makes of a batch the tuple of arguments, such as `lambda batch: (batch["image"],)`.
    devices: over which a batch is spread, as far as its size allows; default, all local ones.
    progress: is told how far it is, in words; default, a line to a terminal.
    **arguments: further arguments of `module.apply` (`train=False`, `method=`), or of the NNX
      module.

  Returns:
    `Inserted`: model, variables, layers, and by how much the outputs differ in evaluation and in
    training.

  Raises:
    TypeError: a norm without scale or bias; variables that are not a dict.
    ValueError: no batches; no layer, or none that `where` takes; layers in nn.scan or nn.vmap that
      have no batch_stats there; a NaN or an infinity behind a layer; outputs that differ in
      evaluation by more than 1e-4.

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> from jaxbn.surgery import insert
  >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
  >>> x = jax.random.normal(jax.random.key(0), (32, 4))
  >>> variables = model.init(jax.random.key(1), x)
  >>> inserted = insert(model, variables, [x])
  >>> inserted.layers
  (Dense layers_0,)
  >>> jax.tree.map(jnp.shape, inserted.variables["params"]["layers_0"]["norm"])
  {'bias': (8,), 'scale': (8,)}
  >>> y = inserted.model.apply(inserted.variables, x)
  >>> y, updates = inserted.model.apply(inserted.variables, x, mutable=["batch_stats"])  # training
  """
  linen = isinstance(model, nn.Module)
  tree_of(model, variables)  # says what is wrong with them
  batches = iter(batches() if callable(batches) else batches)
  first = list(itertools.islice(batches, 1))
  if not first:
    raise ValueError("batches gave none: give a list, or an iterator that was not gone through.")
  args = inputs(first[0]) if inputs else first[0] if isinstance(first[0], tuple) else first
  layers = _layers(model, variables, args, arguments, where)
  new = (_behind.in_linen if linen else _behind.in_nnx)(model, layers, norm)
  try:
    tree = _behind.completed(new, variables, args, arguments) if linen else None
    network = Network(new, tree, inputs=inputs, foreign=None, partial=True, arguments=arguments)
    network.args(first[0])
  except (errors.FlaxError, ValueError) as error:
    raise ValueError(
      f"a norm cannot be behind all of {layers}: {error}\nFor layers in nn.scan and nn.vmap "
      "variable_axes has to name batch_stats. Those in nnx.scan and nnx.vmap leave out, as in "
      "where=lambda path, layer: 'blocks' not in path."
    ) from error
  paths = {f"{layer.path}/{_behind.NAME}" for layer in layers}
  own = [layer for layer in network.layers if layer.path in paths]
  _undo_norms(network, own)
  say = functools.partial(_say, progress)
  found = network.population(itertools.chain(first, batches), True, Spread(devices), say)
  network.layers = own
  network.refuse_not_finite(found.moments)
  states = {
    v.path: update(
      network.states()[v.path],
      found.moments[v.path],
      momentum=0.0,
      unbiased=v.options.get("unbiased", False),
    )
    for v in own
  }
  network.set_states(states, found.batches)
  _undo_norms(network, own)
  result = network.result()
  new, tree = (new, result) if linen else (result, None)
  before = _behind.output(model, variables, args, arguments)
  evaluation = difference(before, _behind.output(new, tree, args, arguments))
  if not evaluation <= _ALLOWED:
    raise ValueError(
      f"with batch norms the outputs differ by {evaluation:.1e} of the largest, and {_ALLOWED} is "
      "allowed: is the network called as in evaluation, with train=False or what it has for that?"
    )
  training = difference(before, _behind.output(new, tree, args, arguments, training=True))
  return Inserted(new, tree, tuple(layers), evaluation, training)


def _undo_norms(network: Network, layers: list[Layer]) -> None:
  """Gives norms the scale and bias by which they give in evaluation what they are given."""
  values = {}
  for layer in layers:
    if not {"scale", "bias"} <= layer.variables.keys():
      raise TypeError(f"norm has to make a layer with scale and bias, and {layer} has not both.")
    mean, var = (get(network.tree, layer.variables[name]) for name in ("mean", "var"))
    values[layer.variables["bias"]] = mean
    values[layer.variables["scale"]] = jnp.sqrt(var + layer.options["epsilon"])
  network.tree = put(network.tree, values)


def _say(progress: Callable[[str], None], text: str) -> None:
  progress(f"insert, {text}")


def _layers(model: Any, variables: Any, args: Any, arguments: Any, where: Any) -> list[Layer]:
  """Behind which there will be a norm."""
  linen = isinstance(model, nn.Module)
  kinds = _behind.IN_LINEN if linen else _behind.IN_NNX
  given = {"variables": variables} if linen else {}
  found = find(model, *args, kinds=kinds, **given, **arguments)
  chosen = found[:-1] if where is None else [v for v in found if where(v.path, v)]
  if not chosen:
    mend = (
      "where= takes none of these paths."
      if where and found
      else "a norm goes behind all but the last: where=lambda path, layer: True takes that, too."
    )
    calls = found or "no convolution, dense layer or einsum"
    raise ValueError(f"this {type(model).__name__} calls {calls}, and {mend}")
  return chosen
