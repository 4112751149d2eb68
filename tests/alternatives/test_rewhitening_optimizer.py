"""An optimizer's state follows when layers are whitened anew, and training goes on."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbn.alternatives import rewhitening
from jaxbn.alternatives.rewhitening_optimizer import rewhiten_optimizer_state
from tests.alternatives.test_rewhitening import (
  DENSE,
  INPUTS,
  REWHITEN,
  STATISTICS,
  both,
  data,
  double_precision,
  layer,
  some_whitening,
)
from tests.variants import table

__all__ = ["both", "double_precision"]  # fixtures


def test_gradients_follow(both):
  apply, x, params = both
  old = some_whitening(1)
  new_params, new = REWHITEN(params, old, STATISTICS(x))

  @jax.jit
  def gradient(params, w):
    return jax.grad(lambda p: table.loss(lambda x: apply(x, **p, whitening=w))(x))(params)

  state = optax.trace(0.9).init(params)._replace(trace=gradient(params, old))
  state = rewhiten_optimizer_state(state, old, new)
  chex.assert_trees_all_close(state.trace, gradient(new_params, new), rtol=1e-8, atol=1e-8)


def test_squares_follow_as_if_entries_were_not_correlated():
  # The mean over all signs of what the squares of the transformed gradients are.
  old, new, n = some_whitening(1), some_whitening(2), layer(seed=3)
  n = jax.tree.map(jnp.square, n)
  state = optax.scale_by_adam().init(layer())._replace(nu=n)
  moved = rewhiten_optimizer_state(state, old, new).nu

  def transformed(signs):
    g = {"kernel": jnp.sqrt(n["kernel"]) * signs[:INPUTS, None], "bias": jnp.sqrt(n["bias"])}
    g["bias"] = g["bias"] * signs[INPUTS]
    trace = optax.trace(0.9).init(g)._replace(trace=g)
    return rewhiten_optimizer_state(trace, old, new).trace

  signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=INPUTS + 1)))
  squares = jax.tree.map(lambda g: jnp.mean(g**2, 0), jax.jit(jax.vmap(transformed))(signs))
  chex.assert_trees_all_close(moved, squares, rtol=1e-10)


def network():
  params = {"first": layer(), "deep": {"second": layer(3, 2)}, "plain": layer()}
  old = {"first": some_whitening(1), "deep": {"second": some_whitening(2)}}
  new = {"first": some_whitening(3), "deep": {"second": some_whitening(4)}}
  return params, old, new


OPTIMIZERS = {
  "momentum": (optax.sgd(0.1, momentum=0.9), "trace"),
  "adam": (optax.adam(0.1), "mu"),
  "chain": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), "mu"),
  "schedule": (optax.inject_hyperparams(optax.adam)(learning_rate=lambda count: 0.1), "mu"),
  "accumulated": (optax.MultiSteps(optax.lion(0.1), 2), "mu"),
  "partition": (
    optax.partition(
      {"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"first": "a", "deep": "a", "plain": "b"}
    ),
    "mu",
  ),
  "rmsprop": (optax.rmsprop(0.1), "nu"),
  "adagrad": (optax.adagrad(0.1), "sum_of_squares"),
  "none": (optax.sgd(0.1), None),
}


@pytest.mark.parametrize(("optimizer", "field"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_follow_in_whitened_layers_and_stay_elsewhere(optimizer, field):
  params, old, new = network()
  state = optimizer.init(params)
  state = jax.tree.map(lambda a: jnp.full(a.shape, 2, a.dtype) if a.ndim else a, state)
  moved = rewhiten_optimizer_state(state, old, new)
  chex.assert_trees_all_equal_shapes_and_dtypes(moved, state)
  changed = [
    jax.tree_util.keystr(path)
    for (path, before), after in zip(
      jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(moved), strict=True
    )
    if not np.array_equal(before, after)
  ]
  assert all("kernel" in path and "plain" not in path for path in changed)
  for name in ("first", "second"):
    assert sum(f".{field}" in path and name in path for path in changed) == bool(field)


def test_the_collection_s_name_may_be_above_the_parameters():
  params, old, new = network()
  plain = rewhiten_optimizer_state(optax.TraceState(params), old, new)
  below = rewhiten_optimizer_state(optax.TraceState({"params": params}), old, new)
  chex.assert_trees_all_equal(below.trace["params"], plain.trace)


def test_adam_goes_on_as_well_as_before():
  # The first moment right, the second of the right size: the loss goes on falling.
  x = data(100)
  target = x @ layer(seed=5)["kernel"]
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(carry, w):
    params, state = carry
    loss, g = jax.value_and_grad(lambda p: jnp.mean((DENSE(x, **p, whitening=w) - target) ** 2))(
      params
    )
    updates, state = optimizer.update(g, state, params)
    return (optax.apply_updates(params, updates), state), loss

  w, losses = rewhitening.init(INPUTS, jnp.float64), []
  carry = layer(), optimizer.init(layer())
  for i in range(300):
    carry, loss = step(carry, w)
    losses.append(float(loss))
    if i % 100 == 99:
      params, state = carry
      new_params, new = rewhitening.rewhiten(params, w, rewhitening.statistics(x))
      carry, w = (new_params, rewhiten_optimizer_state(state, w, new)), new
  assert max(losses[101:]) < 1.01 * losses[100]
  np.testing.assert_allclose(losses[100], losses[99], rtol=0.2)


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda: optax.EmaState(0, {"a": layer()}), "layer 'a' in its field 'ema'"),
    (lambda: optax.TraceState({"a": {"kernel": layer()["kernel"]}}), "not its bias"),
  ],
  ids=["unknown", "no bias"],
)
def test_a_state_that_cannot_follow_is_refused(make, says):
  with pytest.raises(ValueError, match=says):
    rewhiten_optimizer_state(make(), {"a": some_whitening(0)}, {"a": some_whitening(1)})


def test_a_field_can_be_named():
  state, old, new = optax.EmaState(0, {"a": layer()}), some_whitening(0), some_whitening(1)
  ema = rewhiten_optimizer_state(state, {"a": old}, {"a": new}, gradients=["ema"]).ema
  trace = rewhiten_optimizer_state(optax.TraceState(layer()), old, new).trace
  chex.assert_trees_all_equal(ema["a"], trace)


def test_different_networks_are_refused():
  with pytest.raises(ValueError, match=r"old has the layers \['a'\], but new has \['b/c'\]"):
    rewhiten_optimizer_state((), {"a": some_whitening(0)}, {"b": {"c": some_whitening(0)}})
