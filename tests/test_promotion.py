"""With numpy_rank_promotion="raise" and numpy_dtype_promotion="strict": nothing promotes here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

SHAPE, C = (8, 5, 4), 4
RNG = np.random.default_rng(0)
X, RESIDUAL = RNG.normal(1, 2, (2, *SHAPE))
MASK = RNG.random(SHAPE) < 0.7
SLOPE = jnp.full((1, 1, C), 0.25)


def leaky(z):
  return jnp.where(z > 0, z, SLOPE.astype(z.dtype) * z)


def halfway(batch, state):
  mean, var = ((a + b.astype(a.dtype)) / 2 for a, b in zip(batch[1:], state[:2], strict=True))
  return jaxbn.Chosen(mean, var, jnp.ones_like(var), jnp.zeros_like(mean))


OPTIONS = {
  "plain": {},
  "two passes": {"use_fast_variance": False, "detach_stats": True},
  "mask": {"mask": MASK, "masked_value": 0.0, "momentum": None},
  "weights": {"weights": RNG.uniform(0.1, 1, (8, 1, 1)).astype(np.float32), "unbiased": True},
  "residual": {"residual": RESIDUAL, "activation": jax.nn.relu},
  "held": {"activation": leaky, "mask": MASK[:, :1, :1]},
  "debias": {"debias": True, "skip_nonfinite": True},
  "virtual": {"virtual_batch_size": 4, "mask": MASK, "unbiased": True},
  "choose": {"choose": halfway},
  "evaluation": {"use_running_average": True},
}
REAL = {
  "float32": (jnp.float32, None),
  "bfloat16": (jnp.bfloat16, None),
  "float16": (jnp.float16, None),
}
DTYPES = REAL | {"bfloat16, wide parameters": (jnp.bfloat16, jnp.float32)}


def loss(x, scale, bias, state, options, dtype):
  options = {"use_running_average": False} | options
  if "residual" in options:
    options["residual"] = jnp.asarray(options["residual"], x.dtype)
  y, new = jaxbn.batch_norm(x, scale, bias, state, dtype=dtype, **options)
  return jnp.sum(y.real, dtype=y.real.dtype), new


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES.values(), ids=DTYPES)
@jax.numpy_rank_promotion("raise")
@jax.numpy_dtype_promotion("strict")
def test_nothing_promotes_by_itself(dtype, wide, options):
  scale, bias = jnp.ones(C, wide or dtype), jnp.zeros(C, wide or dtype)
  state = jaxbn.init(C, momentum=options.get("momentum", 0.9), debias=options.get("debias", False))
  state = state._replace(mean=state.mean.astype(dtype), var=state.var.astype(dtype))
  gradient = jax.grad(loss, (0, 1, 2), has_aux=True)
  gradients, new = gradient(jnp.asarray(X, dtype), scale, bias, state, options, wide and dtype)
  assert [g.dtype for g in gradients] == [dtype, scale.dtype, bias.dtype]
  if not options.get("use_running_average"):
    assert new.mean.dtype == jnp.float32


@jax.numpy_dtype_promotion("strict")
def test_complex_numbers_do_not_promote_either():
  x = jnp.asarray(X + 1j * RESIDUAL, jnp.complex64)
  scale, state = jnp.ones(C, jnp.complex64), jaxbn.init(C, dtype=jnp.complex64)
  for options in ({}, {"mask": MASK}, {"use_running_average": True}):
    jax.grad(loss, has_aux=True)(x, scale, None, state, options, None)


def test_what_the_user_mixes_is_still_asked_for():
  x = jnp.asarray(X, jnp.bfloat16)
  with (
    jax.numpy_dtype_promotion("strict"),
    pytest.raises(ValueError, match="no available implicit"),
  ):
    jaxbn.batch_norm(x, jnp.ones(C), use_running_average=False)
