"""The dtypes that the core is tried with, and the shapes that go with an axis."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]


def precision(dtype):
  """Double precision where asked for, else JAX as it starts."""
  return jax.enable_x64(True) if dtype == jnp.float64 else contextlib.nullcontext()


def channels(shape, axis):
  return tuple(shape[a] for a in sorted(a % len(shape) for a in np.atleast_1d(axis).astype(int)))
