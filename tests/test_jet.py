"""Taylor mode, of which JAX's jet takes no custom_jvp: ours as little as jax.nn.relu's."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import jet

import jaxbn

X, V = np.random.default_rng(0).normal(size=(2, 8, 3))


def layer(x):
  return jaxbn.batch_norm(x, use_running_average=False)[0]


def works(f):
  try:
    jet.jet(f, (jnp.asarray(X),), ((jnp.asarray(V), jnp.zeros_like(X)),))
  except jax.errors.UnexpectedTracerError:
    return False
  return True


def test_jet_takes_the_layer_where_it_takes_any_custom_rule():
  # Once this fails, JAX has mended it: then say so in batch_norm's docstring.
  assert (works(layer), works(jax.nn.relu)) == (False, False)


def test_nested_jvps_do_instead():
  def textbook(x):
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)

  def second(f):
    along = lambda f: lambda x: jax.jvp(f, (x,), (V,))[1]  # noqa: E731
    return along(along(f))(X)

  with jax.enable_x64(True):
    np.testing.assert_allclose(second(layer), second(textbook), rtol=1e-10, atol=1e-10)
