"""Minimize entropy: scale and bias of the data at hand, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.surgery import _population
from jaxbn.surgery._foreign import Foreign
from jaxbn.surgery._network import Batches, Network
from jaxbn.surgery._spread import Spread, how_far, placed_like, to_stderr
from jaxbn.surgery._trees import get, put


def minimize_entropy(
  model: Any,
  variables: Any,
  batches: Batches,
  optimizer: Any,
  *,
  logits: Callable[[Any], jax.Array] = lambda y: y,
  inputs: Callable[[Any], tuple[Any, ...]] | None = None,
  foreign: Mapping[type, Foreign] | None = None,
  devices: Sequence[Any] | None = None,
  progress: Callable[[str], None] = to_stderr,
  **arguments: Any,
) -> tuple[Any, np.ndarray]:
  r"""Scales and biases of the batch norms, such that what is predicted is less in doubt.

      H = -1/n sum_examples sum_classes p log p,   p = softmax(logits)

  (TENT: Wang et al. 2021, "Tent: fully test-time adaptation by entropy minimization"): a step of
  the optimizer on each batch, in which each layer normalizes by the batch. Nothing else is changed,
  the running statistics neither: take them from the same data with `adapt` or `recalibrate`, or
  predict with the batch's (`jaxbn.linen.prediction_time`).

  Args:
    model: a module of Flax Linen or NNX.
    variables: of a Linen module all collections; of an NNX module None.
    batches: of the target, as in `recalibrate`; each is one step.
    optimizer: of optax, or whatever has its `init` and `update`.
    logits: makes logits (examples, classes) of what the network gives.
    inputs: makes of a batch the tuple of arguments.
    foreign: batch norms that are not Flax's, by their class, and how to read them.
    devices: over which a batch is spread, as far as its size allows; default, all local ones.
    progress: is told how far it is, in words; default, a line to a terminal.
    **arguments: further arguments of `module.apply`, or of the NNX module.

  Returns:
    (new, entropies): for Linen the variables with other scales and biases, for NNX a copy of the
    model; and H of each batch before its step.

  Raises:
    TypeError, ValueError: as `recalibrate`; batch norms without scale and bias; an entropy that is
      not finite, at that batch, with the layer whose input has a NaN.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.surgery, optax
  >>> model = nn.BatchNorm(use_running_average=False)
  >>> batches = 50 * [jnp.array([[0.0, 1.0], [1.0, 0.0]])]
  >>> variables = model.init(jax.random.key(0), batches[0])
  >>> run = jaxbn.surgery.minimize_entropy
  >>> new, entropies = run(model, variables, batches, optax.adam(0.01))
  >>> print(entropies[[0, -1]].round(2))
  [0.37 0.2 ]
  """
  network = Network(
    model, variables, inputs=inputs, foreign=foreign, partial=True, arguments=arguments
  )
  spread = Spread(devices)
  entropies: list[float] = []
  params: dict[str, jax.Array] = {}
  for batch, args in network.each(batches):
    if not entropies:
      places = {"/".join(map(str, p)): p for v in network.layers for p in network.affine(v)}
      params = {name: get(network.tree, place) for name, place in places.items()}
      if not params:
        raise ValueError(
          f"{', '.join(map(str, network.layers))}: no batch norm here has a scale or a bias, which "
          "are what is learned."
        )
      state = optimizer.init(params)
      step = jax.jit(_entropy_step(network, optimizer, places, logits))
    number = np.int32(len(entropies))
    entropy, params, state = step(*spread(network.tree, (params, state), number, args))
    entropies.append(float(entropy))
    if not np.isfinite(entropies[-1]):
      network.refuse_not_finite(network.population([batch], False, spread, progress).moments)
      raise ValueError(
        f"the entropy of batch {number} is {entropies[-1]}, and with the parameters as they were "
        "all that its batch norms are given is finite: give a smaller learning rate."
      )
    progress(how_far(len(entropies), batches))
  learned = {p: placed_like(get(network.tree, p), params[name]) for name, p in places.items()}
  network.tree = put(network.tree, learned)
  return network.result(), np.array(entropies, np.float32)


def _entropy_step(network: Network, optimizer: Any, places: Any, logits: Any) -> Any:
  run, nothing = network.step(evaluating=False), _population.start(network.layers)

  def entropy(params: Any, tree: Any, index: Any, args: Any) -> jax.Array:
    changed = put(tree, {place: params[name] for name, place in places.items()})
    y, _ = run(changed, nothing, index, args)
    log_p = jax.nn.log_softmax(logits(y).astype(jnp.float32))
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1))

  def step(tree: Any, learned: Any, index: Any, args: Any) -> Any:
    params, state = learned
    value, grads = jax.value_and_grad(entropy)(params, tree, index, args)
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
    return value, params, state

  return step
