"""Path-SGD: each weight's kappa, path by path; and what no rescaling of units can change."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
from jaxbn.alternatives import path_sgd

SIZES = (3, 5, 4, 2)
NAMES = ("first", "second", "third")


@pytest.fixture(autouse=True)
def _double_precision():
  with jax.enable_x64(True):
    yield


def scaled_by(transformation, gradient, params):
  update = jax.jit(lambda g, p: transformation.update(g, transformation.init(p), p)[0])
  return update(gradient, params)


def network(bias=True, sizes=SIZES, seed=0):
  """Parameters of a network of fully connected layers, under names that do not sort in order."""
  rng = np.random.default_rng(seed)
  params = {}
  for name, n, m in zip(NAMES, sizes[:-1], sizes[1:], strict=False):
    params[name] = {"kernel": jnp.asarray(rng.normal(size=(n, m)))}
    if bias:
      params[name]["bias"] = jnp.asarray(rng.normal(size=m))
  return params


def kappa_by_paths(params, p):
  """Every path from an input, or from the constant 1 of a bias, to an output."""
  kernels = [np.asarray(layer["kernel"]) for layer in params.values()]
  biases = [np.asarray(layer["bias"]) for layer in params.values()]
  kappa = {("kernel", i): np.zeros(k.shape) for i, k in enumerate(kernels)}
  kappa |= {("bias", i): np.zeros(b.shape) for i, b in enumerate(biases)}
  for start in range(len(kernels) + 1):
    # 0: from an input; otherwise from the bias of layer start - 1.
    first = max(start - 1, 0)
    widths = [k.shape[1] for k in kernels[first:]]
    begins = range(kernels[0].shape[0]) if start == 0 else [None]
    for begin, *units in itertools.product(begins, *map(range, widths)):
      edges, at = [], begin
      for i, unit in enumerate(units, first):
        edges.append((("bias", i), (unit,)) if at is None else (("kernel", i), (at, unit)))
        at = unit
      weights = [abs({"bias": biases, "kernel": kernels}[k][i][where]) for (k, i), where in edges]
      for e, (which, where) in enumerate(edges):
        kappa[which][where] += np.prod([w**p for j, w in enumerate(weights) if j != e])
  layers = enumerate(params)
  return {n: {k: kappa[k, i] ** (2 / p) for k in ("kernel", "bias")} for i, n in layers}


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_kappa_is_the_sum_over_the_paths_through_an_edge(p):
  params = network()
  ones = jax.tree.map(jnp.ones_like, params)
  scaled = scaled_by(path_sgd.scale_by_path(NAMES, p=p), ones, params)
  expected = jax.tree.map(lambda kappa: 1 / kappa, kappa_by_paths(params, p))
  chex.assert_trees_all_close(scaled, expected, rtol=1e-12)


def forward(params, x):
  for name in NAMES[:-1]:
    x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
  return x @ params[NAMES[-1]]["kernel"] + params[NAMES[-1]]["bias"]


def rescaled(params, seed=1):
  """Every hidden unit's incoming weights times a factor of 1/4 to 4, its outgoing ones over it."""
  rng = np.random.default_rng(seed)
  into = [np.ones(SIZES[0]), *(4 ** rng.uniform(-1, 1, n) for n in SIZES[1:-1]), np.ones(SIZES[-1])]
  return {
    name: {
      "kernel": params[name]["kernel"] * into[i + 1] / into[i][:, None],
      "bias": params[name]["bias"] * into[i + 1],
    }
    for i, name in enumerate(NAMES)
  }


X = np.random.default_rng(2).normal(size=(40, SIZES[0]))
T = np.random.default_rng(3).normal(size=(40, SIZES[-1]))


def trained(optimizer, params, f=forward, steps=10):
  """What the network computes after each step."""
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(1)
  def step(params, state):
    gradient = jax.grad(lambda params: jnp.mean((f(params, X) - T) ** 2))(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state, outputs = optimizer.init(params), [f(params, X)]
  for _ in range(steps):
    params, state = step(params, state)
    outputs.append(f(params, X))
  return np.stack(outputs)


def test_networks_equal_up_to_rescaling_stay_equal_by_path_sgd_and_not_by_sgd():
  params = network()
  assert np.ptp(np.asarray(rescaled(params)["second"]["kernel"] / params["second"]["kernel"])) > 1

  by_path = [trained(path_sgd.path_sgd(0.3, NAMES), p) for p in (params, rescaled(params))]
  np.testing.assert_allclose(by_path[1], by_path[0], rtol=0, atol=1e-9)
  assert np.mean((by_path[0][-1] - T) ** 2) < 0.8 * np.mean((by_path[0][0] - T) ** 2)  # it learns

  by_sgd = [trained(optax.sgd(0.003), p) for p in (params, rescaled(params))]
  np.testing.assert_allclose(by_sgd[1][0], by_sgd[0][0], rtol=0, atol=1e-9)
  assert np.max(np.abs(by_sgd[1][1] - by_sgd[0][1])) > 1e-3  # apart after the first step


def test_batch_norm_is_invariant_in_its_function_but_not_in_its_steps():
  # Incoming weights are rescaled alone: nothing is divided by the factor afterwards.
  @jax.jit
  def normalized(params, x):
    for name in NAMES[:-1]:
      x = jaxbn.batch_norm(x @ params[name]["kernel"], use_running_average=False, epsilon=0.0)[0]
      x = jax.nn.relu(x)
    return x @ params[NAMES[-1]]["kernel"]

  params = network(bias=False)
  c = 4.0
  larger = params | {"first": {"kernel": c * params["first"]["kernel"]}}
  np.testing.assert_allclose(normalized(larger, X), normalized(params, X), rtol=0, atol=1e-9)

  gradient = jax.jit(jax.grad(lambda params: jnp.mean((normalized(params, X) - T) ** 2)))
  g, g_larger = gradient(params), gradient(larger)
  chex.assert_trees_all_close(g_larger["first"]["kernel"], g["first"]["kernel"] / c, atol=1e-12)
  chex.assert_trees_all_close(g_larger["second"], g["second"], atol=1e-12)
  # So that a step turns the longer weights by 1 / c^2 of the angle.
  steps = [trained(optax.sgd(0.1), p, normalized, steps=1) for p in (params, larger)]
  assert np.max(np.abs(steps[0][1] - steps[1][1])) > 1e-3


def test_a_unit_without_paths_stays_as_it_is():
  params = network()
  params["first"]["kernel"] = params["first"]["kernel"].at[:, 0].set(0)
  params["first"]["bias"] = params["first"]["bias"].at[0].set(0)
  params["second"]["kernel"] = params["second"]["kernel"].at[0].set(0)
  gradient = jax.jit(jax.grad(lambda params: jnp.mean((forward(params, X) - T) ** 2)))(params)
  scaled = scaled_by(path_sgd.scale_by_path(NAMES), gradient, params)
  chex.assert_tree_all_finite(scaled)
  assert not np.any(scaled["first"]["kernel"][:, 0])
  assert not np.any(scaled["second"]["kernel"][0])


class Mlp(nn.Module):
  """In Flax, where the names do not tell the order: `out` is the last."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(4, name="layer")(x))
    return nn.Dense(2, name="out")(x)


def test_the_same_by_names_in_flax_or_by_position():
  variables = jax.jit(Mlp().init)(jax.random.key(0), X)
  params = variables["params"]
  ones = jax.tree.map(jnp.ones_like, variables)
  by_path = path_sgd.scale_by_path(["params/layer", "params/out"])
  in_order = path_sgd.scale_by_path()
  first = scaled_by(by_path, ones, variables)
  layers = [params["layer"], params["out"]]
  second = scaled_by(in_order, [ones["params"]["layer"], ones["params"]["out"]], layers)
  chex.assert_trees_all_equal([first["params"]["layer"], first["params"]["out"]], second)


def test_by_the_optimizer_of_nnx():
  class Model(nnx.Module):
    def __init__(self):
      self.second = nnx.Linear(4, 2, rngs=nnx.Rngs(0), param_dtype=float)
      self.first = nnx.Linear(3, 4, rngs=nnx.Rngs(1), param_dtype=float)

    def __call__(self, x):
      return self.second(nnx.relu(self.first(x)))

  model = Model()
  optimizer = nnx.Optimizer(model, path_sgd.path_sgd(0.1, ["first", "second"]), wrt=nnx.Param)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  gradient = nnx.jit(nnx.grad(lambda model: jnp.mean((model(X) - T) ** 2)))(model)
  nnx.jit(lambda model, optimizer, g: optimizer.update(model, g))(model, optimizer, gradient)
  by_name = path_sgd.scale_by_path(["first", "second"])
  scaled = scaled_by(by_name, nnx.to_pure_dict(gradient), params)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, scaled)
  after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  chex.assert_trees_all_close(after, expected, rtol=1e-12)


def test_half_precision_is_summed_in_single():
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), network())
  ones = jax.tree.map(jnp.ones_like, params)
  scaled = scaled_by(path_sgd.scale_by_path(NAMES), ones, params)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(scaled)} == {"bfloat16"}
  wide = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  expected = jax.tree.map(lambda kappa: 1 / kappa, kappa_by_paths(wide, 2.0))
  chex.assert_trees_all_close(
    jax.tree.map(lambda a: np.asarray(a, np.float64), scaled),
    expected,
    rtol=2**-8 + 1e-5,  # rounded once to eight bits
  )


def test_a_schedule_s_steps():
  kernels = [jnp.ones((1, 1)), 2 * jnp.ones((1, 1))]
  optimizer = path_sgd.path_sgd(lambda count: 1.0 / (1 + count))
  state = optimizer.init(kernels)
  first, state = optimizer.update(kernels, state, kernels)
  second, _ = optimizer.update(kernels, state, kernels)
  chex.assert_trees_all_close(second, jax.tree.map(lambda s: s / 2, first), rtol=1e-12)


@pytest.mark.parametrize(
  ("layers", "params", "error", "says"),
  [
    (None, network(), TypeError, r"params is a dict, .* order .* layers=\[...\]"),
    (None, [], ValueError, "params is empty"),
    (["first", "third", "second"], network(), ValueError, "'third' takes 4 inputs, .* 5 outputs"),
    (["first", "second"], network(), ValueError, "4 of the 6 arrays"),
    (["first", "other"], network(), ValueError, "'other'.*'first', 'second', 'third'"),
    (["first/kernel"], {"first": {"kernel": {}}}, ValueError, r"'first/kernel' holds \[\]"),
    (["a"], {"a": {"kernel": 0, "scale": 0}}, ValueError, r"'a' holds \['kernel', 'scale'\]"),
    (["a"], {"a": {"kernel": np.ones((3, 3, 2, 2))}}, ValueError, r"\(3, 3, 2, 2\)"),
  ],
  ids=["order", "empty", "chain", "left out", "unknown", "no layer", "scale", "convolution"],
)
def test_what_is_no_network_in_order_is_refused(layers, params, error, says):
  with pytest.raises(error, match=says):
    path_sgd.path_sgd(0.1, layers).init(params)


@pytest.mark.parametrize(
  ("layers", "p", "error", "says"),
  [
    (None, 0.5, ValueError, "p=0.5 is out of range"),
    (None, "2", TypeError, "p='2' is not a number"),
    ("first", 2.0, TypeError, "layers='first' is one name"),
    ([], 2.0, ValueError, "every layer"),
    (["a", "a"], 2.0, ValueError, "once"),
  ],
)
def test_options_are_refused_at_once(layers, p, error, says):
  with pytest.raises(error, match=says):
    path_sgd.path_sgd(0.1, layers, p=p)


def test_update_needs_the_parameters():
  optimizer = path_sgd.path_sgd(0.1)
  with pytest.raises(ValueError, match=r"pass the parameters to update\(\)"):
    optimizer.update([jnp.ones((1, 1))], optimizer.init([jnp.ones((1, 1))]))
