"""Whitening at intervals: the function stays, and the bias does not run off."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.alternatives import rewhitening
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

INPUTS, OUTPUTS = 4, 3
MIXING = np.random.default_rng(10).normal(size=(INPUTS, INPUTS)) * np.geomspace(0.1, 10, INPUTS)


def data(*shape, seed=0):
  """Correlated inputs of very different sizes, away from 0."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(*shape, INPUTS)) @ MIXING + 3)


def layer(*window, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "kernel": jnp.asarray(rng.normal(size=(*window, INPUTS, OUTPUTS))),
    "bias": jnp.asarray(rng.normal(size=OUTPUTS)),
  }


def some_whitening(seed):
  rng = np.random.default_rng(seed)
  matrix = np.eye(INPUTS) + 0.3 * rng.normal(size=(INPUTS, INPUTS))
  return rewhitening.Whitening(jnp.asarray(rng.normal(size=INPUTS)), jnp.asarray(matrix))


DENSE = jax.jit(rewhitening.whitened_dense)
STATISTICS = jax.jit(rewhitening.statistics)
REWHITEN = jax.jit(rewhitening.rewhiten, static_argnames=("epsilon", "decorrelate"))


@jax.jit
def conv(x, kernel, bias, whitening):
  return rewhitening.whitened_conv(x, kernel, bias, whitening, strides=(2, 1), padding="SAME")


@pytest.fixture(params=["dense", "conv"])
def both(request, double_precision):  # noqa: F811
  """How to call a layer, what with, and its parameters."""
  if request.param == "dense":
    return DENSE, data(50), layer()
  return conv, data(3, 6, 5), layer(3, 2)


# What is computed


def test_dense_is_the_formula():
  x, params, w = data(7), layer(), some_whitening(1)
  expected = (np.asarray(x) - w.center) @ w.matrix @ params["kernel"] + params["bias"]
  np.testing.assert_allclose(DENSE(x, **params, whitening=w), expected, rtol=1e-12)


@pytest.mark.parametrize(
  ("padding", "strides", "dilation"),
  [("SAME", 1, 1), ("SAME", (2, 3), 2), ("VALID", (2, 3), 1), (((1, 2), (0, 1)), 1, 2)],
)
def test_conv_is_flax_s_of_the_plain_kernel(padding, strides, dilation):
  x, params, w = data(2, 8, 7), layer(3, 2), some_whitening(1)
  y = rewhitening.whitened_conv(
    x, **params, whitening=w, strides=strides, padding=padding, kernel_dilation=dilation
  )
  plain = rewhitening.reparametrize(params, w, rewhitening.init(INPUTS))
  flax = nn.Conv(
    OUTPUTS, (3, 2), strides, padding=padding, kernel_dilation=dilation, param_dtype=jnp.float64
  )
  np.testing.assert_allclose(y, flax.apply({"params": plain}, x), rtol=1e-10, atol=1e-10)


def test_whitening_that_does_nothing_is_the_plain_layer():
  params, x = layer(), data(5)
  y = DENSE(x, **params, whitening=rewhitening.init(INPUTS, jnp.float64))
  np.testing.assert_array_equal(
    y, nn.Dense(OUTPUTS, param_dtype=float).apply({"params": params}, x)
  )


def test_transformations():
  w = some_whitening(1)

  def f(x, kernel, bias):
    return DENSE(x, kernel, bias, w)

  def formula(x, kernel, bias):
    return (x - w.center) @ (w.matrix @ kernel) + bias

  square = jnp.asarray(np.random.default_rng(0).normal(size=(INPUTS, INPUTS)))
  table.compare_all(f, formula, (data(3), square, jnp.ones(INPUTS)))


@pytest.mark.parametrize("devices", table.DEVICES)
def test_devices(devices):
  w = some_whitening(1)
  args = data(4), jnp.asarray(np.random.default_rng(0).normal(size=(INPUTS, INPUTS))), jnp.ones(4)

  def make(axis_name):
    return lambda x, kernel, bias: rewhitening.whitened_dense(x, kernel, bias, w)

  def formula(x, kernel, bias):
    return (x - w.center) @ (w.matrix @ kernel) + bias

  table.compare_on_devices(devices, make, formula, args)


def test_no_gradient_goes_through_the_whitening():
  gradient = jax.grad(lambda w: jnp.sum(DENSE(data(3), **layer(), whitening=w)))(some_whitening(0))
  chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))


# Statistics


def oracle_statistics(x):
  x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  return rewhitening.Statistics(x.mean(0), np.cov(x.T, bias=True))


def test_statistics():
  x = data(5, 6)
  chex.assert_trees_all_close(STATISTICS(x), oracle_statistics(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("devices", ["vmap", "pmap", "shard_map"])
def test_statistics_are_those_of_all_valid_examples_of_all_devices(devices):
  x = data(8)
  mask = np.array([1, 1, 0, 0, 0, 1, 1, 1], bool)  # the second of four devices has none
  x = jnp.where(mask[:, None], x, jnp.nan)

  def share(x, mask):
    return rewhitening.statistics(x, mask=mask[:, None], axis_name="batch")

  if devices == "shard_map":
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    p = jax.P("batch")
    share = jax.shard_map(share, mesh=mesh, in_specs=(p, p), out_specs=jax.P(), check_vma=True)
    shared = jax.jit(share)(x, mask)
  else:
    mapped = getattr(jax, devices)(share, axis_name="batch")
    mapped = jax.jit(mapped) if devices == "vmap" else mapped
    of_each = mapped(x.reshape(4, 2, INPUTS), mask.reshape(4, 2))
    shared = jax.tree.map(lambda a: a[1], of_each)
  chex.assert_trees_all_close(shared, oracle_statistics(x[mask]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_statistics_of_a_sharded_array(kind):
  mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
  x = data(8, 3)
  sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("batch")))
  actual = jax.jit(rewhitening.statistics)(sharded)
  chex.assert_trees_all_close(actual, oracle_statistics(x), rtol=1e-10, atol=1e-10)


def test_statistics_of_groups_and_of_half_precision():
  x = data(8).reshape(4, 2, INPUTS)
  groups = [[0, 2], [1, 3]]
  share = functools.partial(rewhitening.statistics, axis_name="batch", axis_index_groups=groups)
  of_each = jax.jit(jax.vmap(share, axis_name="batch"))(x)
  expected = oracle_statistics(np.concatenate([x[1], x[3]]))
  chex.assert_trees_all_close(
    jax.tree.map(lambda a: a[3], of_each), expected, rtol=1e-10, atol=1e-10
  )
  half = STATISTICS(x.astype(jnp.bfloat16))
  assert half.mean.dtype == half.cov.dtype == jnp.float32


# Whitening anew


@pytest.mark.parametrize("decorrelate", [True, False])
def test_the_function_stays(both, decorrelate):
  apply, x, params = both
  old = some_whitening(1)
  new_params, new = REWHITEN(params, old, STATISTICS(x), decorrelate=decorrelate)
  assert not np.allclose(new_params["bias"], params["bias"], atol=1e-2)
  assert np.allclose(new_params["kernel"], params["kernel"], atol=1e-2) == (not decorrelate)
  expected = apply(x, **params, whitening=old)
  np.testing.assert_allclose(
    apply(x, **new_params, whitening=new), expected, rtol=1e-10, atol=1e-10
  )
  back = rewhitening.reparametrize(new_params, new, old)
  chex.assert_trees_all_close(back, params, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_in_single_precision_the_function_stays_to_rounding(seed):
  # With u the unit roundoff and products of n terms off by n u times those of magnitudes: W = U V
  # is off by n u |U||V|; V' solves U' V' = W to 4 n u |U'||V'| (Gaussian elimination with pivots,
  # which grow by less than 4 in such small matrices); forming U' V' again adds n u |U'||V'|. Of the
  # output, the products with x - c and x - c' add n u of what they sum; c' - c and x - c, and b',
  # round too. Norms bound the magnitudes.
  single = jnp.float32
  x = data(20, seed=seed).astype(single)
  params = jax.tree.map(lambda a: a.astype(single), layer(seed=seed))
  old = rewhitening.Whitening(*(a.astype(single) for a in some_whitening(seed)))
  new_params, new = REWHITEN(params, old, STATISTICS(x))
  assert new_params["kernel"].dtype == new.matrix.dtype == single
  u, n = float(jnp.finfo(single).eps) / 2, INPUTS
  p, of_old, p_new, of_new = jax.tree.map(np.linalg.norm, (params, old, new_params, new))
  size = of_old.matrix * p["kernel"]
  weights = 2 * n * u * size + 6 * n * u * of_new.matrix * p_new["kernel"]
  lengths = np.linalg.norm(x - old.center, axis=1) + np.linalg.norm(x - new.center, axis=1)
  bound = (lengths + np.linalg.norm(new.center - old.center)) * weights
  bound += 4 * u * (np.linalg.norm(x, axis=1) + of_old.center + of_new.center) * size
  bound += 4 * u * (p["bias"] + p_new["bias"])
  error = np.abs(DENSE(x, **params, whitening=old) - DENSE(x, **new_params, whitening=new))
  assert np.all(error <= bound[:, None])
  assert np.all(bound < 1e-2 * lengths * size)  # it says something: |U'||V'| is up to 100 |U||V|


def test_the_input_becomes_white():
  x = data(100)
  _, w = REWHITEN(layer(), some_whitening(1), STATISTICS(x), epsilon=0.0)
  z = (x - w.center) @ w.matrix
  np.testing.assert_allclose(z.mean(0), 0, atol=1e-10)
  np.testing.assert_allclose(z.T @ z / 100, np.eye(INPUTS), atol=1e-8)
  np.testing.assert_allclose(w.matrix, w.matrix.T, atol=1e-10)


def test_fewer_examples_than_inputs_leave_nothing_infinite():
  for epsilon in (1e-3, 0.0):
    params, w = REWHITEN(layer(), some_whitening(1), STATISTICS(data(2)), epsilon=epsilon)
    chex.assert_tree_all_finite((params, w))


def test_descent_is_fast_where_the_plain_layer_s_is_slow():
  x = data(200)
  target = x @ layer(seed=5)["kernel"]

  def losses(params, w, learning_rate):
    def loss(params):
      return jnp.mean((DENSE(x, **params, whitening=w) - target) ** 2) * OUTPUTS / 2

    @jax.jit
    def step(params, _):
      value, gradient = jax.value_and_grad(loss)(params)
      return jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient), value

    return jax.lax.scan(step, params, length=50)[1]

  plain = rewhitening.init(INPUTS, jnp.float64)
  largest = jnp.linalg.eigvalsh(x.T @ x / 200)[-1]
  by_plain = losses(layer(), plain, 1 / largest)
  by_whitened = losses(*REWHITEN(layer(), plain, STATISTICS(x), epsilon=0.0), 0.9)
  np.testing.assert_allclose(by_whitened[0], by_plain[0], rtol=1e-9)
  assert by_whitened[-1] < 1e-20 * by_plain[0]
  assert by_plain[-1] > 1e-6 * by_plain[0]


def test_a_step_is_one_of_the_plain_layer_preconditioned_by_its_input():
  # The factor of the Fisher matrix on the side of the input, with a 1 appended to it for the bias,
  # by whose inverse Povey et al. (2014) multiply gradients: E[(x, 1)(x, 1)^T]^-1.
  x, plain = data(50), rewhitening.init(INPUTS, jnp.float64)

  @jax.jit
  def stepped(params, w):
    g = jax.grad(
      lambda p: table.loss(lambda x: rewhitening.whitened_dense(x, **p, whitening=w))(x)
    )(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, g), g

  params = layer()
  whitened, w = REWHITEN(params, plain, STATISTICS(x), epsilon=0.0)
  after = rewhitening.reparametrize(stepped(whitened, w)[0], w, plain)
  _, g = stepped(params, plain)
  appended = np.concatenate([x, np.ones((50, 1))], 1)
  rows = np.concatenate([g["kernel"], g["bias"][None]])
  step = 0.1 * np.linalg.solve(appended.T @ appended / 50, rows)
  expected = {"kernel": params["kernel"] - step[:-1], "bias": params["bias"] - step[-1]}
  chex.assert_trees_all_close(after, expected, rtol=1e-7, atol=1e-7)


# Statistics outside of the gradient: Ioffe & Szegedy 2015, section 2.

SHIFT = np.random.default_rng(4).normal(2.0, 1.0, size=(64, 1))  # the targets
U = np.random.default_rng(5).normal(size=(64, 1))


def descent(loss, params, after_step=lambda params, step: params, steps=100):
  """Losses and parameters, step by step."""
  gradient, rows = jax.jit(jax.value_and_grad(loss)), []
  for step in range(steps):
    value, g = gradient(params)
    rows.append((float(value), params))
    params = after_step(jax.tree.map(lambda p, g: p - 0.1 * g, params, g), step)
  losses, params = zip(*rows, strict=True)
  return np.array(losses), params


def test_a_mean_that_the_gradient_does_not_see_makes_the_bias_grow_while_the_loss_stays():
  # y = x - E[x] of x = u + b: b cancels, whatever it is, but the gradient is taken as if E[x] were
  # a constant, and is the same in every step.
  def loss(b):
    x = U + b
    return jnp.mean((x - jax.lax.stop_gradient(x.mean()) - SHIFT) ** 2) / 2

  losses, bs = descent(loss, jnp.zeros(()))
  np.testing.assert_allclose(losses, losses[0], rtol=1e-9)
  # It grows by 0.1 E[target] in each step, without end.
  np.testing.assert_allclose(np.diff(bs), 0.1 * SHIFT.mean(), rtol=1e-9)

  # The same by this library's own demonstration of it.
  def by_layer(b, **options):
    state = jaxbn.RunningStats(jnp.zeros(1), jnp.ones(1))
    y, _ = jaxbn.batch_norm(U + b, state=state, use_running_average=False, **options)
    return jnp.mean((y - SHIFT) ** 2) / 2

  assert abs(jax.jit(jax.grad(lambda b: by_layer(b, detach_stats=True)))(0.0)) > 1
  seen = jax.jit(jax.grad(by_layer))(0.0)  # batch norm sees that it cancels
  np.testing.assert_allclose(seen, 0, atol=1e-12)


@pytest.mark.parametrize("adjusted", [True, False])
def test_reparametrized_at_intervals_the_bias_converges_but_only_if_it_is_adjusted(adjusted):
  # x = u + b feeds a centred layer of weight 1: y = (x - c) + d. Only b is learned.
  one = jnp.ones((1, 1))
  whitening, d = rewhitening.init(1, jnp.float64), jnp.zeros(1)

  def loss(params):
    b, (c, matrix), d = params
    y = DENSE(U + b, one, jax.lax.stop_gradient(d), rewhitening.Whitening(c, matrix))
    return jnp.mean((y - SHIFT) ** 2) / 2

  def every_5_steps(params, step):
    b, whitening, d = params
    if step % 5 == 4:
      whole = {"kernel": one, "bias": d}
      new, centred = REWHITEN(whole, whitening, STATISTICS(U + b), decorrelate=False)
      return b, rewhitening.Whitening(*centred), new["bias"] if adjusted else d
    return params

  losses, params = descent(loss, (jnp.zeros(1), whitening, d), every_5_steps, steps=200)
  bs = np.array([b.item() for b, *_ in params])
  least = float(jnp.var(SHIFT - U) / 2)
  if adjusted:
    np.testing.assert_allclose(losses[-1], least, rtol=1e-6)
    np.testing.assert_allclose(bs[-1], (SHIFT - U).mean(), rtol=1e-6)
  else:
    # After each centring the loss is where it was, and b has gone on by as much as ever.
    np.testing.assert_allclose(losses[5::5], losses[5], rtol=1e-9)
    assert losses[-5] > 2 * least
    np.testing.assert_allclose(np.diff(bs[5::5]), bs[10] - bs[5], rtol=1e-9)
    assert bs[-1] > 10 * (SHIFT - U).mean()


# What is refused


def dense(x=None, **given):
  x = data(2) if x is None else x
  return DENSE(x, **{**layer(), "whitening": some_whitening(0), **given})


def conv1(**given):
  return rewhitening.whitened_conv(data(2, 5), **{**layer(3), **given}, whitening=some_whitening(0))


def anew(params, **options):
  return rewhitening.rewhiten(params, some_whitening(0), STATISTICS(data(5)), **options)


ONES = np.ones((3, 2))


@pytest.mark.parametrize(
  ("call", "error", "says"),
  [
    (lambda: rewhitening.statistics(ONES.astype(int)), TypeError, "int64"),
    (lambda: rewhitening.statistics(ONES.astype(complex)), TypeError, "for real"),
    (lambda: rewhitening.statistics(ONES[:0]), ValueError, "empty batch"),
    (lambda: rewhitening.statistics(1.0), ValueError, "axis=-1 is out of range for x with 0 axes"),
    (lambda: rewhitening.statistics(ONES, mask=ONES > 0), ValueError, "differs between the"),
    (lambda: rewhitening.statistics(ONES, axis_index_groups=[[0]]), ValueError, "axis_name too"),
    (lambda: dense(**layer(3, 2)), ValueError, "whitened_conv"),
    (lambda: dense(whitening=rewhitening.init(3)), ValueError, r"4.* has .*inputs"),
    (lambda: dense(whitening=(1, 2)), TypeError, r"rewhitening\.init"),
    (lambda: dense(data(2)[:, :3]), ValueError, "last axis"),
    (lambda: conv1(**layer(3, 2)), ValueError, "window for each axis"),
    (lambda: conv1(padding="CIRCULAR"), ValueError, "padding='CIRCULAR'"),
    (lambda: conv1(strides=(1, 1)), ValueError, r"strides=\(1, 1\)"),
    (lambda: anew({"kernel": np.eye(4)}), ValueError, "no bias"),
    (lambda: anew(layer(), epsilon=-1.0), ValueError, "epsilon=-1.0 is out of range"),
  ],
)
def test_what_cannot_work_is_refused(call, error, says):
  with pytest.raises(error, match=says):
    call()


def test_it_compiles_once():
  x = data(5)
  w = some_whitening(1)
  table.assert_traced_once(
    lambda x, kernel, bias: DENSE(x, kernel, bias, w), (x, *layer().values())
  )
