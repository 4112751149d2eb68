"""The NNX layers of normalizer-free networks: Flax's, with the standardized kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx

IMAGES = jax.random.normal(jax.random.key(1), (2, 7, 6, 4)) + 0.5
ROWS = IMAGES.reshape(-1, 4)

# NNX's, Linen's, positional arguments, those of Linen, those of both, and an input.
LAYERS = [
  (
    jaxbn.nnx.WSConv,
    jaxbn.linen.WSConv,
    (4, 6, (3, 2)),
    (6, (3, 2)),
    {"strides": 2, "padding": "CIRCULAR", "feature_group_count": 2},
    IMAGES,
  ),
  (
    jaxbn.nnx.WSConv,
    jaxbn.linen.WSConv,
    (4, 6, (1, 1)),
    (6, (1, 1)),
    {"dtype": jnp.bfloat16, "use_bias": False},
    IMAGES,
  ),
  (jaxbn.nnx.WSLinear, jaxbn.linen.WSDense, (4, 5), (5,), {}, ROWS),
  (jaxbn.nnx.WSLinear, jaxbn.linen.WSDense, (4, 5), (5,), {"dtype": jnp.bfloat16}, ROWS),
]


def layer_of(ours, positional, **arguments):
  return ours(*positional, **arguments, epsilon=0.1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("ours", "linen", "positional", "theirs", "arguments", "x"), LAYERS)
def test_outputs_are_linen_s(ours, linen, positional, theirs, arguments, x):
  layer = layer_of(ours, positional, **arguments, gain_init=nnx.initializers.uniform(2.0))
  params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
  expected = linen(*theirs, **arguments, epsilon=0.1).apply({"params": params}, x)
  y = layer(x)
  assert y.dtype == expected.dtype
  np.testing.assert_array_equal(y, expected)


def test_kernels_are_initialized_as_flax_s():
  ours = jaxbn.nnx.WSLinear(4, 5, rngs=nnx.Rngs(3))
  flax = nnx.Linear(4, 5, rngs=nnx.Rngs(3))
  np.testing.assert_array_equal(ours.kernel[...], flax.kernel[...])
  assert ours.gain.shape == (5,)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = jaxbn.nnx.WSLinear(4, 4, rngs=rngs)
    self.skip = jaxbn.nnx.SkipInit(scale_init=nnx.initializers.constant(0.5), rngs=rngs)

  def __call__(self, x):
    return x + self.skip(self.linear(nnx.relu(x)))


def test_layers_learn_under_nnx_s_transformations():
  """jit, grad and remat of the module, against grad of a plain function of its parameters."""
  block = Block(nnx.Rngs(0))

  def loss(block, x):
    return jnp.sum(jnp.sin(nnx.remat(Block.__call__)(block, x)))

  gradient = nnx.jit(nnx.grad(loss))(block, ROWS)
  graph, params = nnx.split(block)

  def plain(params):
    return jnp.sum(jnp.sin(nnx.merge(graph, params)(ROWS)))

  expected = jax.jit(jax.grad(plain))(params)
  leaves = dict(nnx.to_flat_state(gradient))
  assert {path[-1] for path in leaves} == {"kernel", "bias", "gain", "scale"}
  for path, leaf in nnx.to_flat_state(expected):
    assert np.abs(leaf[...]).max() > 0
    np.testing.assert_allclose(leaves[path][...], leaf[...], rtol=1e-4, atol=1e-4)


def test_a_stack_of_layers_is_scanned_over():
  @nnx.split_rngs(splits=3)
  @nnx.vmap(in_axes=0, out_axes=0)
  def blocks(rngs):
    return Block(rngs)

  stack = blocks(nnx.Rngs(0))

  @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
  def forward(block, x):
    return block(x)

  expected = ROWS
  for i in range(3):
    graph, state = nnx.split(stack)
    expected = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(expected)
  np.testing.assert_allclose(forward(stack, ROWS), expected, rtol=1e-5, atol=1e-5)


def test_masked_convolutions_are_refused():
  with pytest.raises(ValueError, match=r"mask is given, .* use flax.nnx.Conv"):
    jaxbn.nnx.WSConv(4, 4, (3, 3), mask=jnp.ones((3, 3, 4, 4)), rngs=nnx.Rngs(0))


def test_metadata_reaches_the_parameters():
  layer = jaxbn.nnx.WSLinear(
    4, 5, gain_metadata={"kind": "gain"}, kernel_metadata={"kind": "kernel"}, rngs=nnx.Rngs(0)
  )
  assert (layer.gain.kind, layer.kernel.kind) == ("gain", "kernel")


def test_skip_init_is_linen_s():
  layer = jaxbn.nnx.SkipInit(rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(layer(ROWS), np.zeros_like(ROWS))
  layer.scale[...] = jnp.float32(0.5)
  np.testing.assert_array_equal(layer(ROWS), ROWS / 2)
  half = jaxbn.nnx.SkipInit(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert (half(ROWS).dtype, half.scale[...].dtype) == (jnp.bfloat16, jnp.float32)
  with pytest.raises(TypeError, match="x has dtype int32"):
    layer(jnp.arange(3))
