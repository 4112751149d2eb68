"""The Linen layers of normalizer-free networks: Flax's, with the standardized kernel."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from jaxbn.alternatives.normalizer_free import scaled_weight_standardization

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 7, 6, 4)) + 0.5
ROWS = IMAGES.reshape(-1, 4)

# Ours, Flax's, the arguments of both, and an input.
LAYERS = [
  (jaxbn.linen.WSConv, nn.Conv, {"features": 6, "kernel_size": (3, 3)}, IMAGES),
  (
    jaxbn.linen.WSConv,
    nn.Conv,
    {
      "features": 6,
      "kernel_size": (3, 2),
      "strides": 2,
      "padding": "CIRCULAR",
      "feature_group_count": 2,
      "use_bias": False,
    },
    IMAGES,
  ),
  (jaxbn.linen.WSConv, nn.Conv, {"features": 3, "kernel_size": 3, "kernel_dilation": 2}, ROWS),
  (
    jaxbn.linen.WSConv,
    nn.Conv,
    {"features": 6, "kernel_size": (1, 1), "dtype": jnp.bfloat16},
    IMAGES,
  ),
  (jaxbn.linen.WSDense, nn.Dense, {"features": 5}, ROWS),
  (
    jaxbn.linen.WSDense,
    nn.Dense,
    {"features": 5, "dtype": jnp.bfloat16, "use_bias": False},
    ROWS,
  ),
]


@pytest.mark.parametrize(("ours", "flax", "arguments", "x"), LAYERS)
def test_layers_are_flax_s_with_the_standardized_kernel(ours, flax, arguments, x):
  layer = ours(**arguments, gain_init=nn.initializers.uniform(2.0), epsilon=0.1)
  params = dict(layer.init(KEY, x)["params"])
  y = layer.apply({"params": params}, x)
  gain = params.pop("gain")
  assert (gain.shape, gain.dtype) == (params["kernel"].shape[-1:], jnp.float32)
  np.testing.assert_array_equal(  # initialized as Flax's
    params["kernel"], flax(**arguments).init(KEY, x)["params"]["kernel"]
  )
  params["kernel"] = scaled_weight_standardization(params["kernel"], gain, epsilon=0.1)
  expected = flax(**arguments).apply({"params": params}, x)
  assert y.dtype == expected.dtype
  np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
  ("ours", "flax"), [(jaxbn.linen.WSConv, nn.Conv), (jaxbn.linen.WSDense, nn.Dense)]
)
def test_fields_are_flax_s_in_its_order_then_ours(ours, flax):
  def fields(cls):
    every = ((f.name, f.default) for f in dataclasses.fields(cls))
    return [field for field in every if field[0] not in ("parent", "name")]

  theirs = fields(flax)
  assert fields(ours)[: len(theirs)] == theirs
  assert [name for name, _ in fields(ours)[len(theirs) :]] == ["gain_init", "epsilon"]


def test_the_kernel_s_length_and_mean_make_no_difference():
  with jax.enable_x64(True):
    x = jnp.asarray(ROWS, jnp.float64)
    layer = jaxbn.linen.WSDense(5, epsilon=0.0, param_dtype=jnp.float64)
    params = layer.init(KEY, x)["params"]

    def loss(kernel):
      return jnp.sum(jnp.sin(layer.apply({"params": params | {"kernel": kernel}}, x)))

    kernel = params["kernel"]
    gradient = jax.grad(loss)(kernel)
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_allclose((gradient * kernel).sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(loss(3 * kernel + 1), loss(kernel), rtol=1e-12)


class Deep(nn.Module):
  """A residual block several times, its layers lifted by Flax's scan and remat."""

  lifted: bool

  @nn.compact
  def __call__(self, x):
    def block(layer, x):
      y = jaxbn.linen.WSDense(4, parent=layer, name="dense")(nn.relu(x))
      scale_init = nn.initializers.constant(0.5)
      return x + jaxbn.linen.SkipInit(scale_init, parent=layer, name="skip")(y)

    class Block(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return block(self, x), None

    lifted = nn.scan(
      nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    if self.lifted:
      return lifted(name="blocks")(x, None)[0]
    for i in range(3):
      x, _ = Block(name=f"block{i}")(x, None)
    return x


def test_lifted_layers_give_what_single_ones_give():
  stacked = Deep(lifted=True).init(KEY, ROWS)["params"]["blocks"]
  single = {f"block{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3)}

  def loss(params, lifted):
    return jnp.sum(jnp.sin(Deep(lifted).apply({"params": params}, ROWS)))

  value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, True)))({"blocks": stacked})
  expected, wanted = jax.jit(jax.value_and_grad(lambda p: loss(p, False)))(single)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for i in range(3):
    jax.tree.map(
      lambda leaf, want, i=i: np.testing.assert_allclose(leaf[i], want, rtol=1e-4, atol=1e-4),
      gradient["blocks"],
      wanted[f"block{i}"],
    )


def test_masked_convolutions_are_refused():
  layer = jaxbn.linen.WSConv(4, (3, 3), mask=jnp.ones((3, 3, 4, 4)))
  with pytest.raises(ValueError, match=r"mask is given, .* use flax.linen.Conv"):
    layer.init(KEY, IMAGES)


def test_a_layer_with_one_weight_an_output_is_refused():
  with pytest.raises(ValueError, match="has 1 weight for each output"):
    jaxbn.linen.WSConv(4, (1, 1), feature_group_count=4).init(KEY, IMAGES)


def test_skip_init_starts_at_zero_and_learns():
  layer = jaxbn.linen.SkipInit()
  y, variables = layer.init_with_output(KEY, ROWS)
  np.testing.assert_array_equal(y, np.zeros_like(ROWS))
  gradient = jax.grad(lambda v: layer.apply(v, ROWS).sum())(variables)["params"]["scale"]
  np.testing.assert_allclose(gradient, np.asarray(ROWS, np.float64).sum(), rtol=1e-5)
  scaled = layer.apply({"params": {"scale": jnp.float32(0.5)}}, ROWS)
  np.testing.assert_array_equal(scaled, ROWS / 2)


def test_skip_init_keeps_its_scale_in_float32():
  layer = jaxbn.linen.SkipInit(dtype=jnp.bfloat16)
  y, variables = layer.init_with_output(KEY, ROWS.astype(jnp.bfloat16))
  assert (y.dtype, variables["params"]["scale"].dtype) == (jnp.bfloat16, jnp.float32)
  with pytest.raises(TypeError, match="x has dtype int32"):
    layer.init(KEY, jnp.arange(3))
