r"""Path-SGD (Neyshabur, Salakhutdinov & Srebro 2015): steps that rescaling units does not change.

A ReLU unit may have its incoming weights multiplied by c > 0 and its outgoing ones divided by it:
the function stays, but a step of gradient descent does not, for a gradient shrinks where its weight
grows. Path-SGD measures steps by what all paths from the inputs to the outputs weigh,

    gamma(w) = sum over paths of prod over their edges of |w_e|^p,

which such a rescaling leaves as it is. Steepest descent in that geometry, taken weight by weight,
divides a weight's gradient by

    kappa_e = (sum over the paths through e of prod over their other edges of |w_e'|^p)^(2/p)
            = (d gamma / d |w_e|^p)^(2/p).

Scaled by c, a weight has kappa_e / c^2 and gradient / c, so that its step is scaled by c as it is.
Batch normalization gets there by another way: behind it a unit's function does not depend on the
length of its incoming weights at all, so that nothing needs to be divided; but the steps do depend
on it, as 1 / length^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxbn import _checks
from jaxbn._dtypes import accumulation_dtype
from jaxbn._names import shown

__all__ = ["path_sgd", "scale_by_path"]


def __dir__() -> list[str]:
  return __all__


def path_sgd(
  learning_rate: optax.ScalarOrSchedule, layers: Sequence[str] | None = None, *, p: float = 2.0
) -> optax.GradientTransformation:
  r"""Path-SGD: w_e <- w_e - learning_rate / kappa_e dL/dw_e, with kappa_e as in `scale_by_path`.

  kappa_e has the size of the product of the other layers' squared weights, so that a good learning
  rate has nothing to do with that of SGD.

  Args:
    learning_rate: a number, or a schedule of optax.
    layers: as in `scale_by_path`.
    p: as in `scale_by_path`.

  Returns:
    A transformation for optax, whose `update` needs the parameters.

  Raises:
    TypeError, ValueError: as `scale_by_path`.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import path_sgd
  >>> kernels = [jnp.array([[1.0, 4.0]]), jnp.array([[2.0], [0.5]])]  # 1 input, 2 units, 1 output
  >>> optimizer = path_sgd.path_sgd(0.5)
  >>> gradients = [jnp.ones((1, 2)), jnp.ones((2, 1))]
  >>> steps, _ = optimizer.update(gradients, optimizer.init(kernels), kernels)
  >>> steps[0].tolist(), steps[1].tolist()  # -0.5 over the other weight of each path, squared
  ([[-0.125, -2.0]], [[-0.5], [-0.03125]])
  """
  return optax.chain(scale_by_path(layers, p=p), optax.scale_by_learning_rate(learning_rate))


def scale_by_path(
  layers: Sequence[str] | None = None, *, p: float = 2.0
) -> optax.GradientTransformation:
  r"""Divides each weight's gradient by its kappa.

  The network is fully connected, with ReLU or another positively homogeneous function between its
  layers: a_l = relu(a_{l-1} W_l + b_l), with kernels of shape (inputs, outputs) as in Flax. A bias
  is the weight of an edge from an input that is always 1. kappa comes from one forward and one
  backward pass of a single example, all ones, through |W|^p:

      a_0 = 1,  a_l = a_{l-1} |W_l|^p + |b_l|^p,  gamma = sum a_L,
      kappa_e = (d gamma / d |w_e|^p)^(2/p)

  Where kappa is 0 the unit has nothing coming in or nothing going out. Then the gradient is 0 too,
  and so is the step. An epsilon in the denominator would end the invariance: there is none.

  Args:
    layers: the layers' names in the order of the computation, each the path in params (keys with
      "/" between) of a mapping with a `kernel` and perhaps a `bias`. Flax's parameters do not tell
      the order: it has to be said. None: params is itself a sequence, in order, of kernels or of
      such mappings.
    p: which norm of the paths, finite and at least 1. The paper uses 2.

  Returns:
    A transformation for optax without state, whose `update` needs the parameters.

  Raises:
    TypeError: p not a number; layers a single string; in `init` and `update`, params that are not a
      sequence where layers is None.
    ValueError: p out of range; layers empty, or one twice. In `init` and `update`: a layer that
      params lacks; a parameter that belongs to no layer, or is no kernel of two axes; a layer that
      does not take as many inputs as the one before has outputs; no params at all.

  >>> import jax.numpy as jnp
  >>> from jaxbn.alternatives import path_sgd
  >>> layer = lambda w: {"kernel": jnp.array([[w]]), "bias": jnp.zeros(1)}
  >>> params = {"first": layer(1.0), "second": layer(2.0)}
  >>> transformation = path_sgd.scale_by_path(["first", "second"])
  >>> scaled, _ = transformation.update(params, transformation.init(params), params)
  >>> scaled["first"]["kernel"].tolist(), scaled["second"]["kernel"].tolist()
  ([[0.25]], [[2.0]])
  """
  _check_options(layers, p)

  def init(params: Any) -> optax.EmptyState:
    _in_order(params, layers)
    return optax.EmptyState()

  def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
    if params is None:
      raise ValueError("path_sgd divides by paths' weights: pass the parameters to update().")
    powers = jax.tree.map(lambda w: jnp.abs(w.astype(accumulation_dtype(w.dtype))) ** p, params)
    kappas = jax.grad(lambda powers: _gamma(_in_order(powers, layers)))(powers)
    return jax.tree.map(lambda g, kappa: _divided(g, kappa ** (2 / p)), updates, kappas), state

  return optax.GradientTransformation(init, update)


def _gamma(layers: list[Mapping[str, Any]]) -> jax.Array:
  """The sum over all paths, of layers whose weights are already |w|^p."""
  a = jnp.ones(layers[0]["kernel"].shape[0], layers[0]["kernel"].dtype)
  for layer in layers:
    a = a @ layer["kernel"] + layer.get("bias", 0)
  return jnp.sum(a)


def _divided(g: jax.Array, kappa: jax.Array) -> jax.Array:
  return jnp.where(kappa > 0, g / jnp.where(kappa > 0, kappa, 1), 0).astype(g.dtype)


def _check_options(layers: Sequence[str] | None, p: float) -> None:
  _checks.scalar("p", p)
  if not 1 <= float(p) < float("inf"):
    raise ValueError(
      f"p={shown(p)} is out of range: it is finite and at least 1; the paper uses 2."
    )
  if layers is None:
    return
  if isinstance(layers, str):
    raise TypeError(f"layers={shown(layers)} is one name: pass a list of them, in order.")
  if not layers or len(set(layers)) != len(layers):
    raise ValueError(f"layers={shown(layers)}: name every layer of the network once, in order.")


def _in_order(params: Any, layers: Sequence[str] | None) -> list[Mapping[str, Any]]:
  """The layers as mappings, in order, if together they are all of params and fit each other."""
  if layers is None:
    if not isinstance(params, list | tuple):
      raise TypeError(
        f"params is a {type(params).__name__}, which does not tell the order of its layers: "
        "pass layers=[...], their names in order."
      )
    names: Sequence[str] = [str(i) for i in range(len(params))]
    found = [layer if isinstance(layer, Mapping) else {"kernel": layer} for layer in params]
    if not found:
      raise ValueError("params is empty: path_sgd needs at least one layer.")
  else:
    names, found = layers, [_at(params, name) for name in layers]
  for name, layer in zip(names, found, strict=True):
    if "kernel" not in layer or not set(layer) <= {"kernel", "bias"}:
      raise ValueError(
        f"layer {name!r} holds {sorted(layer)}; a fully connected one has a kernel and perhaps a "
        "bias: apply path_sgd to such layers only, for instance with optax.partition."
      )
    if jnp.ndim(layer["kernel"]) != 2:
      raise ValueError(
        f"the kernel of layer {name!r} has shape {jnp.shape(layer['kernel'])}: paths are counted "
        "through kernels of shape (inputs, outputs) only."
      )
  _check_chain(names, found)
  of_layers, of_all = len(jax.tree.leaves(found)), len(jax.tree.leaves(params))
  if of_layers != of_all:
    raise ValueError(
      f"layers={list(names)} hold {of_layers} of the {of_all} arrays of params: every parameter "
      "must be on a path: name all layers, in order."
    )
  return found


def _at(params: Any, name: str) -> Mapping[str, Any]:
  for key in name.split("/"):
    if not isinstance(params, Mapping) or key not in params:
      held = sorted(params) if isinstance(params, Mapping) else jnp.shape(params)
      raise ValueError(f"layers names {name!r}, but where {key!r} should be, params has {held}.")
    params = params[key]
  return params if isinstance(params, Mapping) else {name: params}


def _check_chain(names: Sequence[str], layers: list[Mapping[str, Any]]) -> None:
  for i in range(1, len(layers)):
    outputs, inputs = layers[i - 1]["kernel"].shape[1], layers[i]["kernel"].shape[0]
    if inputs != outputs:
      raise ValueError(
        f"layer {names[i]!r} takes {inputs} inputs, but {names[i - 1]!r} before it has {outputs} "
        "outputs: name the layers in the order of the computation."
      )
