"""jaxbn.linen.prediction_time: a network whose norms take the statistics of what is predicted."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn.linen
from jaxbn.variants.prediction_time import prediction_time_batch_norm
from tests import layers

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(1, 2, (8, 5, 3)), jnp.float32)
KEY = jax.random.key(0)


class Network(nn.Module):
  """Its rest has a mode as well: dropout."""

  classes: int = 10
  width: int = 32

  @nn.compact
  def __call__(self, x, train):
    for _ in range(2):
      x = nn.Dense(self.width, use_bias=False)(x)
      x = nn.relu(jaxbn.linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
      x = nn.Dropout(0.1, deterministic=not train)(x)
    return nn.Dense(self.classes)(x)


@pytest.mark.optimized
@pytest.mark.parametrize("prior", [0.0, 4.0, jnp.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_is_the_function_bit_for_bit(prior, masked):
  options = {"activation": jax.nn.relu, "epsilon": 1e-3}
  layer = jaxbn.linen.BatchNorm(**layers.FIXED | options)
  variables = layer.init(KEY, X, False)
  predict = jaxbn.linen.prediction_time(layer.apply, prior)
  call = {"mask": layers.MASK} if masked else {}
  y = predict(variables, X, use_running_average=True, **call)
  state = jaxbn.RunningStats(**variables["batch_stats"])
  expected = prediction_time_batch_norm(
    X, **variables["params"], state=state, prior=prior, **options, **call
  )
  layers.assert_bit_equal(y, expected)
  assert predict.__doc__ == layer.apply.__doc__


def test_without_a_prior_a_network_has_batch_statistics_and_no_dropout():
  model = Network(width=4)
  variables = model.init(KEY, X, train=False)
  y = jaxbn.linen.prediction_time(model.apply)(variables, X, train=False)
  h = X
  for i in range(2):
    h = h @ variables["params"][f"Dense_{i}"]["kernel"]
    h = jax.nn.relu((h - h.mean((0, 1))) / jnp.sqrt(h.var((0, 1)) + 1e-5))
  head = variables["params"]["Dense_2"]
  layers.assert_equal_to_rounding(y, h @ head["kernel"] + head["bias"])


def test_it_ends_with_the_call_and_jit_tells_the_two_apart():
  model = Network(width=4)
  variables = model.init(KEY, X, train=False)
  evaluate = functools.partial(model.apply, train=False)
  before = jax.jit(evaluate)(variables, X)
  predicted = jax.jit(jaxbn.linen.prediction_time(evaluate))(variables, X)
  layers.assert_bit_equal(jax.jit(evaluate)(variables, X), before)
  assert jnp.max(jnp.abs(predicted - before)) > 0.1


JITTED = nn.jit(jaxbn.linen.BatchNorm)


class Jitted(nn.Module):
  @nn.compact
  def __call__(self, x):
    return JITTED(use_running_average=True)(x)


def test_a_jit_of_the_network_s_own_tells_the_two_apart():
  model = Jitted()
  variables = model.init(KEY, X)
  before = model.apply(variables, X)
  predicted = jaxbn.linen.prediction_time(model.apply)(variables, X)
  layers.assert_bit_equal(model.apply(variables, X), before)
  assert jnp.max(jnp.abs(predicted - before)) > 0.1


def test_a_prediction_is_one_call_of_each_layer():
  model = Network(width=4)
  variables = model.init(KEY, X, train=False)

  def predict(variables, x):
    return model.apply(
      variables,
      x,
      train=False,
      mutable=["intermediates"],
      capture_intermediates=lambda module, _: isinstance(module, nn.BatchNorm),
    )

  _, new = jax.jit(jaxbn.linen.prediction_time(predict))(variables, X)
  for name in ("BatchNorm_0", "BatchNorm_1"):
    (y,) = new["intermediates"][name].pop("__call__")
    assert not new["intermediates"][name]
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-5)  # by its own statistics


def test_shared_over_devices():
  layer = jaxbn.linen.BatchNorm(use_running_average=True, axis_name="b")
  variables = layer.init(KEY, X)
  predict = functools.partial(jaxbn.linen.prediction_time(layer.apply, 4.0), variables)
  y = jax.pmap(predict, axis_name="b")(layers.devices(X)).reshape(X.shape)
  whole = jaxbn.linen.BatchNorm(use_running_average=True)
  layers.assert_equal_to_rounding(y, jaxbn.linen.prediction_time(whole.apply, 4.0)(variables, X))
  with pytest.raises(ValueError, match="axis_name='b' is not bound here"):
    predict(X)


def test_initialization_is_as_without_it():
  model = Network(width=4)
  init = jaxbn.linen.prediction_time(model.init)
  layers.assert_bit_equal(init(KEY, X, train=False), model.init(KEY, X, train=False))


def test_what_it_does_not_know_is_refused():
  with pytest.raises(ValueError, match=r"prior=-1.0 is out of range"):
    jaxbn.linen.prediction_time(Network().apply, -1.0)
  layer = jaxbn.linen.DomainBatchNorm(num_domains=2, use_running_average=True)
  variables = layer.init(KEY, X, 0)
  with pytest.raises(ValueError, match=r"not DomainBatchNorm at the top: use jaxbn\.variants"):
    jaxbn.linen.prediction_time(layer.apply)(variables, X, 0)
  layer = jaxbn.linen.BatchNorm(use_running_average=True, choose=layers.halfway)
  with pytest.raises(ValueError, match="not BatchNorm at the top with choose"):
    jaxbn.linen.prediction_time(layer.apply)(layer.init(KEY, X), X)


@pytest.fixture(scope="module")
def digits():
  """Images and labels to train with, others to test with; a network trained on the former."""
  datasets = pytest.importorskip("sklearn.datasets")
  images, labels = datasets.load_digits(return_X_y=True)
  images = jnp.asarray(images / 16, jnp.float32)
  model = Network()
  variables = model.init(KEY, images[:2], train=False)
  optimizer = optax.adam(1e-2)

  def step(carry, batch):
    variables, moments = carry
    key, (x, y) = batch

    def loss(params):
      logits, new = model.apply(
        variables | {"params": params}, x, True, mutable=["batch_stats"], rngs={"dropout": key}
      )
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

    gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, moments = optimizer.update(gradients, moments)
    params = optax.apply_updates(variables["params"], updates)
    return ({"params": params, **new}, moments), None

  order = np.concatenate([np.random.default_rng(i).permutation(1280) for i in range(10)])
  order = order.reshape(-1, 128)
  batches = jax.random.split(KEY, len(order)), (images[order], jnp.asarray(labels)[order])
  start = variables, optimizer.init(variables["params"])
  (variables, _), _ = jax.jit(lambda c, b: jax.lax.scan(step, c, b))(start, batches)
  return functools.partial(model.apply, train=False), variables, images[1280:], labels[1280:]


def accuracy(predict, variables, images, labels):
  logits = jax.jit(predict)(variables, images)
  return float(np.mean(np.argmax(logits, -1) == labels))


def test_on_digits_it_recovers_what_a_shift_costs(digits):
  apply, variables, images, labels = digits
  # A third of the contrast, brighter, and some noise: the batch's statistics undo the first two.
  noise = np.random.default_rng(1).normal(size=images.shape)
  shifted = jnp.asarray(images / 3 + 0.5 + 0.05 * noise, jnp.float32)
  predict = jaxbn.linen.prediction_time(apply)
  clean, lost = (accuracy(apply, variables, x, labels) for x in (images, shifted))
  recovered = accuracy(predict, variables, shifted, labels)
  print(f"clean {clean:.3f}, shifted {lost:.3f}, at prediction time {recovered:.3f}")
  assert clean > 0.9
  assert lost < 0.5
  assert recovered > clean - 0.05


def test_on_digits_the_prior_helps_a_small_batch(digits):
  apply, variables, images, labels = digits
  parts = images[:512].reshape(128, 4, 64), labels[:512].reshape(128, 4)

  def by_parts(predict):
    return lambda variables, x: jax.lax.map(lambda part: predict(variables, part), x)

  alone, mixed = (
    accuracy(by_parts(jaxbn.linen.prediction_time(apply, prior)), variables, *parts)
    for prior in (0.0, 16.0)
  )
  print(f"four examples: {alone:.3f} by themselves, {mixed:.3f} with a prior of 16")
  assert mixed > alone + 0.02
