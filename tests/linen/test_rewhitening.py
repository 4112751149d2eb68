"""Whitened layers of Linen: a call whitens a model, and training goes on where it was."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn.linen
from jaxbn.alternatives.rewhitening_optimizer import rewhiten_optimizer_state
from tests.variants.table import double_precision  # noqa: F401

BOTH = ("params", "whitening")


class Net(nn.Module):
  axis_name: str | None = None
  dtype: object = float

  @nn.compact
  def __call__(self, x, mask=None):
    options = {"axis_name": self.axis_name, "param_dtype": float, "dtype": self.dtype}
    x = jaxbn.linen.WhitenedConv(4, (3, 2), strides=(2, 1), **options)(x, mask=mask)
    x = nn.relu(x).reshape(len(x), -1)
    x = nn.Dense(5, param_dtype=float)(x)
    return jaxbn.linen.WhitenedDense(3, **options)(x)


def data(seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(2, 1, size=(8, 4, 4, 3)) @ rng.normal(size=(3, 3)))


@functools.cache
def start():
  variables = jax.jit(Net().init)(jax.random.key(0), data())
  return jax.tree.map(lambda a: a.astype(float), variables)


@functools.partial(jax.jit, static_argnames="mutable")
def apply(variables, x, mask=None, mutable=False):
  return Net().apply(variables, x, mask, mutable=mutable)


def test_it_starts_as_the_plain_layers():
  x = data()
  variables = start()
  params = variables["params"]
  y = nn.Conv(4, (3, 2), (2, 1), dtype=float).apply({"params": params["WhitenedConv_0"]}, x)
  y = nn.Dense(5, dtype=float).apply({"params": params["Dense_0"]}, nn.relu(y).reshape(8, -1))
  y = nn.Dense(3, dtype=float).apply({"params": params["WhitenedDense_0"]}, y)
  np.testing.assert_allclose(apply(variables, x), y, rtol=1e-12, atol=1e-12)
  assert variables["whitening"]["WhitenedConv_0"]["matrix"].shape == (3, 3)


def test_a_call_whitens_every_layer_and_the_function_stays():
  x, variables = data(), start()
  y, new = apply(variables, x, mutable=BOTH)
  np.testing.assert_allclose(apply(variables, x), y, rtol=1e-9, atol=1e-9)
  for inputs in (x, data(1)):
    np.testing.assert_allclose(apply(new, inputs), apply(variables, inputs), rtol=1e-9, atol=1e-9)
  chex.assert_trees_all_equal(new["params"]["Dense_0"], variables["params"]["Dense_0"])
  w = new["whitening"]["WhitenedConv_0"]
  z = (x - w["center"]) @ w["matrix"]
  np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-10)
  np.testing.assert_allclose(np.cov(z.reshape(-1, 3).T), np.eye(3), atol=0.05)  # epsilon, n - 1


def test_of_all_devices():
  x = data()
  mask = (np.arange(8) < 7)[:, None, None, None]
  variables = start()
  _, whole = apply(variables, x[:7], mutable=BOTH)

  def shard(x, mask):
    return Net("batch").apply(variables, x, mask, mutable=["params", "whitening"])[1]

  of_each = jax.jit(jax.vmap(shard, axis_name="batch"))(
    x.reshape(4, 2, 4, 4, 3), mask.reshape(4, 2, 1, 1, 1)
  )
  first = {k: v["WhitenedConv_0"] for k, v in whole.items()}
  for i in (0, 3):
    shared = {k: jax.tree.map(lambda a, i=i: a[i], v["WhitenedConv_0"]) for k, v in of_each.items()}
    chex.assert_trees_all_close(shared, first, rtol=1e-8, atol=1e-8)


def test_training_goes_on_from_where_it_was():
  x, optimizer = data(), optax.adam(1e-2)
  target = jnp.asarray(np.random.default_rng(5).normal(size=(8, 3)))
  variables = start()
  state = optimizer.init(variables["params"])

  @jax.jit
  def gradient(variables):
    def loss(params):
      y = Net().apply(variables | {"params": params}, x)
      return jnp.mean((y - target) ** 2)

    return jax.value_and_grad(loss)(variables["params"])

  @jax.jit
  def step(variables, state):
    loss, g = gradient(variables)
    updates, state = optimizer.update(g, state, variables["params"])
    return variables | {"params": optax.apply_updates(variables["params"], updates)}, state, loss

  for _ in range(3):
    variables, state, _ = step(variables, state)
  _, new = apply(variables, x, mutable=BOTH)
  moved = rewhiten_optimizer_state(state, variables["whitening"], new["whitening"])

  # The gradient after whitening is the gradient before it, moved in the same way.
  before, after = gradient(variables), gradient(new)
  np.testing.assert_allclose(after[0], before[0], rtol=1e-9)
  as_state = optax.TraceState(before[1])
  followed = rewhiten_optimizer_state(as_state, variables["whitening"], new["whitening"])
  chex.assert_trees_all_close(followed.trace, after[1], rtol=1e-7, atol=1e-9)

  chex.assert_trees_all_equal_shapes_and_dtypes(moved, state)
  losses = []
  for _ in range(30):
    new, moved, loss = step(new, moved)
    losses.append(float(loss))
  assert losses[-1] < 0.5 * losses[0]


def test_half_precision():
  x = data().astype(jnp.bfloat16)
  variables = start()
  y = jax.jit(Net(dtype=jnp.bfloat16).apply)(variables, x)
  assert y.dtype == jnp.bfloat16
  expected = apply(variables, x)
  np.testing.assert_allclose(y.astype(float), expected, atol=0.1 * float(jnp.abs(expected).max()))


def test_names_of_mesh_axes_stay_on_the_parameters():
  kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
  layer, x = jaxbn.linen.WhitenedDense(2, kernel_init=kernel_init), data()
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  y, new = jax.jit(lambda v: layer.apply(v, x, mutable=BOTH))(variables)
  assert nn.get_partition_spec(new)["params"]["kernel"] == jax.P(None, "model")
  np.testing.assert_allclose(jax.jit(layer.apply)(new, x), y, atol=1e-3)


def test_whitening_alone_cannot_be_mutable():
  variables = start()
  with pytest.raises(ValueError, match=r"mutable=\['params', 'whitening'\], or neither"):
    apply(variables, data(), mutable=("whitening",))
  y, _ = apply(variables, data(), mutable=("params",))  # a layer of another kind may want it
  np.testing.assert_array_equal(y, apply(variables, data()))
