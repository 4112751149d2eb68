"""Training steps exported for a batch of any size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxbn
from jaxbn.variants.conditional import conditional_batch_norm
from jaxbn.variants.domain import domain_batch_norm
from jaxbn.variants.renorm import batch_renorm

C = 3


def mask(shape):
  return np.random.default_rng(1).random(shape) < 0.7


def weights(shape):
  return np.random.default_rng(2).uniform(0.1, 1, shape).astype(np.float32)


def some(batch_norm=jaxbn.batch_norm, **options):
  """A layer: arrays among its options are made for the shape of x."""
  made = {name: make for name, make in options.items() if make in (mask, weights)}
  rest = {name: option for name, option in options.items() if name not in made}
  return made, functools.partial(batch_norm, use_running_average=False, **rest)


def in_domains(x, scale, bias, state, **options):
  state = jax.tree.map(lambda s: jnp.stack([s, s]), state)
  y, state = domain_batch_norm(x, scale, bias, state, domains=jnp.int32(1), **options)
  return y, jax.tree.map(lambda s: s[1], state)


def of_class(x, scale, bias, state, **options):
  return conditional_batch_norm(x, scale[None], bias[None], state, labels=jnp.int32(0), **options)


LAYERS = {
  "plain": some(),
  "two passes": some(use_fast_variance=False),
  "mask": some(mask=mask, masked_value=0.0),
  "weights": some(weights=weights),
  "worth": some(weights=weights, unbiased=True),
  "unbiased": some(unbiased=True),
  "activated": some(residual=weights, activation=jax.nn.relu),
  "held": some(mask=mask, activation=lambda z: z * jnp.arange(1.0, C + 1)),
  "virtual": some(virtual_batch_size=4),
  "virtual, masked": some(virtual_batch_size=2, mask=mask, debias=False, skip_nonfinite=True),
  "renorm": some(batch_renorm, r_max=2.0, d_max=1.0),
  "domain": some(in_domains),
  "class": some(of_class),
}


def step(layer, x, scale, bias, mean, var, arrays):
  """The gradient of a training step, y and the new running statistics."""

  def loss(x, scale, bias):
    y, state = layer(x, scale, bias, jaxbn.RunningStats(mean, var), **arrays)
    return jnp.sum(y**3), (y, tuple(state[:2]))

  return jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)


@pytest.mark.parametrize(
  ("name", "dims"),
  [
    *((name, "4*b") for name in LAYERS),
    *((name, "4*b, h, w") for name in ("plain", "mask", "held", "virtual, masked", "domain")),
  ],
)
def test_a_training_step_is_exported_for_any_size(name, dims):
  made, layer = LAYERS[name]
  symbolic = (*export.symbolic_shape(dims), C)
  shape = (*(8, 5, 2)[: len(symbolic) - 1], C)
  x = np.random.default_rng(0).normal(3, 2, shape).astype(np.float32)
  arrays = {name: make(shape) for name, make in made.items()}
  args = x, jnp.full(C, 2.0), jnp.ones(C), *jaxbn.init(C)[:2], arrays
  specs = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(symbolic if a.shape == shape else a.shape, a.dtype), args
  )
  f = jax.jit(functools.partial(step, layer))
  loaded = export.deserialize(export.export(f)(*specs).serialize())
  # The pivot may be another, so that rounding differs: by some u times 2.5, the mean in stds.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    loaded.call(*args),
    f(*args),
  )


def test_groups_have_to_be_seen_to_fit():
  x = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), C), jnp.float32)
  layer = functools.partial(jaxbn.batch_norm, use_running_average=False, virtual_batch_size=4)
  with pytest.raises(ValueError, match=r"x holds b examples.*symbolic_shape\('4\*b'\)"):
    jax.eval_shape(layer, x)


def test_evaluation_is_exported_too():
  x = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), C), jnp.float32)
  state = jaxbn.init(C)
  f = jax.jit(lambda x: jaxbn.batch_norm(x, state=state, use_running_average=True)[0])
  given = np.ones((5, C), np.float32)
  np.testing.assert_array_equal(export.export(f)(x).call(given), f(given))
