"""Whitening: the covariance, its inverse square root with every derivative, and the layer of both.

The oracle is float64 NumPy, written from the papers' equations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxbn
from benchmarks import hlo
from jaxbn.variants import whitening
from tests import bounds
from tests.test_devices import all_reduces, spread
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401 - a fixture of every test here

METHODS = ["zca", "newton"]
FLAGS = ("axis_name", "skip_nonfinite")  # that decide what is traced
N, C, G = 8, 4, 2  # examples, channels, channels of a group
EPSILON = 1e-3


# The oracle


def oracle_covariance(x, group_size, weights=None):
  """count, mean (channels,) and covariance (groups, g, g) of x (n, channels)."""
  w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
  x = np.where(w[:, None] > 0, np.asarray(x, np.float64), 0)
  mean = (w[:, None] * x).sum(0) / w.sum()
  d = (x - mean).reshape(len(x), -1, group_size)
  return w.sum(), mean, np.einsum("n,nai,naj->aij", w, d, d) / w.sum()


def oracle_matrix(cov, epsilon, method="zca", iterations=5):
  """Of one or several matrices, as in the papers, whose iterations are polynomials of the matrix.

  So they are taken of its eigenvalues: of the matrix, in this order, rounding would grow.
  """
  eigenvalues, u = np.linalg.eigh(np.asarray(cov, np.float64) + epsilon * np.eye(cov.shape[-1]))
  w = 1 / np.sqrt(eigenvalues)
  if method == "newton":
    trace, w = eigenvalues.sum(-1, keepdims=True), np.ones_like(eigenvalues)
    for _ in range(iterations):
      w = 0.5 * (3 * w - w**3 * (eigenvalues / trace))
    w = w / np.sqrt(trace)
  return (u * w[..., None, :]) @ np.swapaxes(u, -1, -2)


def oracle_apply(x, mean, matrix, scale=1.0, bias=0.0):
  d = (np.asarray(x, np.float64) - mean).reshape(len(x), *matrix.shape[:2])
  return np.einsum("aij,naj->nai", matrix, d).reshape(x.shape) * scale + bias


def oracle_norm(x, scale=1.0, bias=0.0, *, group_size=G, epsilon=EPSILON, weights=None, **how):
  _, mean, cov = oracle_covariance(x, group_size, weights)
  return oracle_apply(x, mean, oracle_matrix(cov, epsilon, **how), scale, bias)


def plain(method, iterations=5):
  """The textbook formula, which JAX differentiates where eigenvalues are distinct."""

  def formula(x, scale, bias):
    d = (x - x.mean(0)).reshape(len(x), -1, G)
    a = jnp.einsum("nai,naj->aij", d, d) / len(x) + EPSILON * jnp.eye(G)
    if method == "zca":
      eigenvalues, u = jnp.linalg.eigh(a)
      w = (u / jnp.sqrt(eigenvalues)[:, None, :]) @ u.mT
    else:
      trace = jnp.trace(a, axis1=-2, axis2=-1)[:, None, None]
      p = jnp.broadcast_to(jnp.eye(G), a.shape)
      for _ in range(iterations):
        p = 0.5 * (3 * p - p @ p @ p @ (a / trace))
      w = p / jnp.sqrt(trace)
    return jnp.einsum("aij,naj->nai", w, d).reshape(x.shape) * scale + bias

  return formula


def layer(method="zca", axis_name=None, **options):
  options = {"group_size": G, "epsilon": EPSILON, "use_running_average": False} | options

  @jax.jit  # one program compiles faster than its parts
  def f(x, scale=None, bias=None):
    return whitening.whitening_norm(x, scale, bias, method=method, axis_name=axis_name, **options)[
      0
    ]

  return f


covariance = jax.jit(functools.partial(whitening.covariance, group_size=G))


@functools.partial(jax.jit, static_argnames=("group_size", "method", *FLAGS))
def step(x, scale=None, bias=None, state=None, group_size=G, **options):
  """A training step: y and the new state."""
  options = {"epsilon": EPSILON, "use_running_average": False} | options
  return whitening.whitening_norm(x, scale, bias, state, group_size=group_size, **options)


def batch(n=N, channels=C, dtype=np.float64, seed=0):
  """Correlated channels whose means are not 0 and whose variances differ."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(channels, channels)) + np.diag(np.linspace(1, 2, channels))
  return (rng.normal(size=(n, channels)) @ mixing + rng.normal(size=channels)).astype(dtype)


def parameters(channels=C):
  rng = np.random.default_rng(1)
  return rng.normal(1, 0.3, channels), rng.normal(size=channels)


def central(f, x, direction, h=1e-5):
  """The derivative of f along a direction, off by h^2 and by rounding over h."""
  return (f(x + h * direction) - f(x - h * direction)) / (2 * h)


def covariance_of(y, group_size=G):
  return oracle_covariance(np.asarray(y).reshape(-1, y.shape[-1]), group_size)[2]


# Measure


@pytest.mark.parametrize("counted", ["all", "mask", "weights", "both"])
def test_the_covariance_is_the_oracle_s(counted):
  shape = (3, 5, 6)
  x = batch(np.prod(shape[:-1]), shape[-1])
  rng = np.random.default_rng(2)
  mask, weights = rng.random(len(x)) < 0.7, rng.uniform(0.5, 3, len(x))
  w = np.where(mask, 1.0, 0) if counted in ("mask", "both") else np.ones(len(x))
  w = w * weights if counted in ("weights", "both") else w
  given = {}
  if counted in ("mask", "both"):
    x[~mask] = np.nan
    given["mask"] = mask.reshape(*shape[:-1], 1)
  if counted in ("weights", "both"):
    given["weights"] = weights.reshape(*shape[:-1], 1)
  moments = covariance(x.reshape(shape), **given)
  for actual, expected in zip(moments, oracle_covariance(x, G, w), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, -2])
def test_the_channels_axis_may_be_any(axis):
  x = batch(24, 4).reshape(2, 3, 4, 4)
  moved = np.moveaxis(x, -1, axis)
  expected = oracle_norm(x.reshape(-1, 4), *parameters())
  actual = layer(axis=axis)(jnp.asarray(moved), *map(jnp.asarray, parameters()))
  np.testing.assert_allclose(np.moveaxis(actual, axis, -1).reshape(-1, 4), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_sums_are_in_float32_and_survive_a_large_mean(ratio, dtype):
  n = 512
  x = jnp.asarray(batch(n) + (0 if dtype == np.float16 else ratio), dtype)
  moments = covariance(x)
  _, mean, cov = oracle_covariance(np.asarray(x, np.float64), G)
  u = bounds.roundoff(np.float32)
  # Entries of the sum are bounded by the product of deviations; see tests/bounds.py for the sum.
  deviation = np.sqrt(np.einsum("aii->ai", cov))
  bound = (2 * bounds.summing(n, u) + 4 * u) * deviation[:, :, None] * deviation[:, None, :]
  bounds.assert_within(moments.cov, cov, bound + np.finfo(np.float32).tiny)
  bounds.assert_within(
    moments.mean, mean, u * np.abs(mean) + 2 * bounds.summing(n, u) * deviation.reshape(-1)
  )
  assert moments.mean.dtype == moments.cov.dtype == np.float32


def test_merging_parts_gives_the_whole():
  x = jnp.asarray(batch(12))
  one, two, three = (covariance(x[s]) for s in np.split(np.arange(12), [4, 8]))
  whole = covariance(x)
  left = whitening.merge(whitening.merge(one, two), three)
  right = whitening.merge(one, whitening.merge(three, two))
  for merged in (left, right):
    assert int(merged.count) == 12
    table.assert_close(merged[1:], whole[1:], 1e-12)


def test_nothing_is_the_identity_of_merge():
  some = covariance(batch())
  none = covariance(np.full((2, C), np.nan), mask=np.zeros((2, 1), bool))
  assert not any(np.any(leaf) for leaf in none)
  for merged in (whitening.merge(some, none), whitening.merge(none, some)):
    jax.tree.map(np.testing.assert_array_equal, merged, some)


# Choose


def matrices(*eigenvalues):
  """Symmetric matrices of given eigenvalues, in no special basis."""
  size = len(eigenvalues[0])
  bases = np.linalg.qr(np.random.default_rng(3).normal(size=(len(eigenvalues), size, size)))[0]
  return (bases * np.asarray(eigenvalues)[:, None, :]) @ np.swapaxes(bases, -1, -2)


@pytest.mark.parametrize("method", METHODS)
def test_the_matrix_is_the_papers_(method):
  cov = matrices([1.0, 2.0, 3.0], [1e-3, 1.0, 5.0], [0.0, 0.0, 1.0])
  actual = whitening.whitening_matrix(jnp.asarray(cov), method=method, epsilon=1e-2, iterations=7)
  np.testing.assert_allclose(actual, oracle_matrix(cov, 1e-2, method, 7), rtol=0, atol=1e-12)


def test_newton_s_method_approaches_the_zca_matrix_and_stays():
  cov = jnp.asarray(matrices([1e-4, 0.03, 1.0, 2.0]))
  exact = whitening.whitening_matrix(cov, epsilon=0.0)
  ts = (2, 5, 10, 15, 20)
  matrix = functools.partial(whitening.whitening_matrix, cov, method="newton", epsilon=0.0)
  errors = [float(np.max(np.abs(matrix(iterations=t) - exact))) for t in ts]
  assert errors == sorted(errors, reverse=True)
  # 1.5^T covers sqrt(2e4) at T = 12; then it converges quadratically. Rounding: 1e-16 times the
  # condition number, relative to the largest entry, 100; the paper's own order would be lost.
  assert errors[-1] < 1e-9
  assert np.max(np.abs(matrix(iterations=100) - exact)) < 1e-9


def test_newton_s_matrix_is_bounded_where_there_is_no_variance():
  w = whitening.whitening_matrix(jnp.diag(jnp.array([0.0, 4.0])), method="newton", epsilon=0.0)
  np.testing.assert_allclose(w[0, 0], 1.5**5 / np.sqrt(4), rtol=1e-12)


def test_an_eigenvalue_lost_in_rounding_is_over_estimated():
  # In float32 the matrix has eigenvalues 2 and something of the size of 1e-7, of either sign.
  v = np.random.default_rng(0).normal(size=8)
  cov = (2 * np.outer(v, v) / (v @ v)).astype(np.float32)
  w = whitening.whitening_matrix(jnp.asarray(cov), epsilon=0.0)
  assert w.dtype == np.float32
  assert np.max(np.abs(np.linalg.eigvalsh(w))) < 1 / np.sqrt(2 * np.finfo(np.float32).eps) * 1.001


COINCIDING = [[2.0, 2.0, 2.0], [1.0, 1.0, 5.0], [1.0, 1 + 1e-9, 1 + 1e-7], [0.0, 0.0, 3.0]]


def test_derivatives_where_eigenvalues_coincide():
  covs = matrices(*COINCIDING)
  weights, t, s = np.random.default_rng(4).normal(size=(3, 3, 3))
  t, s = t + t.T, s + s.T

  def each(matrix_of):  # a number for each matrix
    return lambda covs: (weights * np.sin(matrix_of(covs))).sum((-2, -1))

  def loss(covs):
    w = whitening.whitening_matrix(covs, epsilon=0.1)
    return jnp.sum(weights * jnp.sin(w))

  def along(direction, derivative):
    return np.sum(np.asarray(derivative) * direction, (-2, -1))

  oracle = each(functools.partial(oracle_matrix, epsilon=0.1))
  first = jax.jit(jax.grad(loss))
  np.testing.assert_allclose(along(t, first(covs)), central(oracle, covs, t), rtol=1e-6)
  # Twice and three times, each against differences of the derivative before.
  second = jax.jit(lambda covs: jax.jvp(jax.grad(loss), (covs,), (jnp.stack([t] * 4),))[1])
  along_s = central(lambda covs: along(t, first(covs)), covs, s)
  np.testing.assert_allclose(along(s, second(covs)), along_s, rtol=1e-6, atol=1e-6)
  third = jax.jit(jax.grad(lambda covs: jnp.sum(second(covs) * s)))
  along_t = central(lambda covs: along(s, second(covs)), covs, t)
  np.testing.assert_allclose(along(t, third(covs)), along_t, rtol=1e-5, atol=1e-5)


def test_the_derivative_of_an_eigendecomposition_would_not_do():
  # What the test above is for.
  x = jnp.asarray(orthogonal())
  gradient = jax.jit(jax.grad(table.loss(plain("zca"))))(x, 1.0, 0.0)
  assert not np.all(np.isfinite(gradient))


# The layer in training


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_oracle_s(method):
  x, (scale, bias) = batch(), parameters()
  state = whitening.WhiteningStats(np.full(C, 0.5), np.tile(2 * np.eye(G), (C // G, 1, 1)))
  y, new = step(x, scale, bias, state, method=method, momentum=0.8)
  np.testing.assert_allclose(y, oracle_norm(x, scale, bias, method=method), rtol=1e-9, atol=1e-9)
  _, mean, cov = oracle_covariance(x, G)
  expected = mean, oracle_matrix(cov, EPSILON, method)
  for old, one, fresh in zip(state, new, expected, strict=True):
    np.testing.assert_allclose(one, 0.8 * old + 0.2 * fresh, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [2, 16])
def test_whitened_channels_have_the_identity_for_covariance(channels, dtype):
  n = 256
  rng = np.random.default_rng(0)
  turned = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
  x = (rng.normal(size=(n, channels)) * np.linspace(0.5, 2, channels)) @ turned + 3
  x = x.astype(dtype)
  y = layer(group_size=channels, epsilon=0.0)(jnp.asarray(x))
  u = bounds.roundoff(dtype)
  # W is right to half the error of the covariance times its condition number k, relative to what
  # it makes 1, and the products round by g u sqrt(k); twice, for y goes in twice.
  sigma = covariance_of(x, channels)[0]
  error = channels * (2 * bounds.summing(n, u) + 8 * u) * np.linalg.cond(sigma)
  assert error < 0.1
  np.testing.assert_allclose(covariance_of(y, channels)[0], np.eye(channels), atol=2 * error)


def test_groups_are_of_neighbouring_channels_and_do_not_mix():
  x = jnp.asarray(batch())
  f = layer()
  parts = [f(x[:, :2]), f(x[:, 2:])]
  np.testing.assert_allclose(f(x), np.concatenate(parts, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method", "masked"), [("zca", False), ("newton", True)])
def test_groups_of_one_are_batch_normalization(masked, method):
  x = jnp.asarray(batch())
  scale, bias = map(jnp.asarray, parameters())
  given = {"mask": np.arange(N)[:, None] % 3 > 0, "masked_value": 0.0} if masked else {}
  given |= {"use_running_average": False, "epsilon": EPSILON}
  state = whitening.init(C, 1, dtype=x.dtype)

  def ours(*args):
    y, new = whitening.whitening_norm(*args, state, group_size=1, method=method, **given)
    return y, new.mean

  def theirs(*args):
    y, new = jaxbn.batch_norm(*args, jaxbn.init(C, dtype=x.dtype), **given)
    return y, new.mean

  def results(f, *args):
    return f(*args), jax.grad(table.loss(lambda *a: f(*a)[0]), (0, 1, 2))(*args)

  both = (jax.jit(functools.partial(results, f))(x, scale, bias) for f in (ours, theirs))
  table.assert_close(*both, 1e-11)


def test_masked_examples_are_as_if_they_were_not_there():
  x, (scale, bias) = batch(), map(jnp.asarray, parameters())
  mask = np.arange(N) % 4 > 0
  x = jnp.asarray(np.where(mask[:, None], x, np.nan))
  state = whitening.init(C, G, dtype=x.dtype)
  how = {"use_running_average": False, "group_size": G, "epsilon": EPSILON}

  def loss(f):
    def of(*args):
      y, new = f(*args)
      return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)), new

    return jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))

  def masked(x, scale, bias):
    y, new = whitening.whitening_norm(x, scale, bias, state, mask=mask[:, None], **how)
    return y[mask], new

  def dropped(x, scale, bias):
    return whitening.whitening_norm(x, scale, bias, state, **how)

  (value, new), (d_x, *d_rest) = loss(masked)(x, scale, bias)
  (expected, stats), (d_fewer, *d_right) = loss(dropped)(x[mask], scale, bias)
  table.assert_close((value, new, d_x[mask], d_rest), (expected, stats, d_fewer, d_right), 1e-10)
  assert not np.any(d_x[~mask])


def test_an_integer_weight_is_as_many_copies():
  x = jnp.asarray(batch())
  weights = np.array([1, 0, 2, 1, 3, 1, 1, 2])
  f = layer(weights=weights[:, None].astype(float))
  copies = layer()(jnp.asarray(np.repeat(x, weights, 0)))
  first = np.cumsum(weights)[weights > 0] - 1
  np.testing.assert_allclose(f(x)[weights > 0], copies[first], rtol=1e-10)


def test_weights_have_a_gradient():
  x, w, t = (
    batch(),
    np.random.default_rng(0).uniform(0.5, 2, (N, 1)),
    np.linspace(-1, 1, N)[:, None],
  )

  def loss(w):
    return table.loss(lambda x: layer(weights=w)(x))(jnp.asarray(x))

  derivative = jax.jit(lambda w: jax.jvp(loss, (w,), (t,))[1])(w)
  np.testing.assert_allclose(derivative, central(jax.jit(loss), w, t), rtol=1e-7)


def test_masked_positions_hold_the_masked_value():
  mask = np.arange(N)[:, None] > 0
  y = layer(mask=mask, masked_value=7.0)(jnp.asarray(batch()).at[0].set(np.nan))
  assert np.all(y[0] == 7)
  assert np.all(np.isfinite(y))


def test_parameters_may_differ_between_examples():
  x, scale = jnp.asarray(batch()), np.random.default_rng(0).normal(size=(N, C))
  y = layer()(x, jnp.asarray(scale), jnp.ones(C))
  np.testing.assert_allclose(y, oracle_norm(x) * scale + 1, rtol=1e-9)


# Degenerate batches


def orthogonal():
  """Eight examples of four channels whose covariance is exactly the identity."""
  h = np.array([[1.0]])
  for _ in range(3):
    h = np.block([[h, h], [h, -h]])
  return h[:, 1:5]


DEGENERATE = {
  "fewer examples than channels": batch(3, 6),
  "one example": batch(1, 6),
  "a constant channel": np.where(np.arange(6) == 2, 3.0, batch(8, 6)),
  "equal channels": batch(8, 6)[:, [0, 0, 1, 1, 2, 2]],
  "all constant": np.full((8, 6), 3.0),
  "large constants": np.full((8, 6), 1e4),
}


@functools.cache  # compiled once for each shape
def output_and_gradient(method, epsilon):
  f = layer(method, group_size=6, epsilon=epsilon)
  return jax.jit(lambda x: (f(x), jax.grad(table.loss(f))(x)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_in_float32(case, method):
  x = jnp.asarray(DEGENERATE[case], np.float32)
  y, gradient = output_and_gradient(method, 1e-5)(x)
  # Directions that have variance have variance 1: n values of it are at most sqrt(n - 1) each
  # (Samuelson), a vector of 6 of them no longer than sqrt(6 (n - 1)). Others hold rounding: eps of
  # x's deviation from the mean, times at most 1/sqrt(epsilon).
  n = len(x)
  assert np.max(np.abs(y)) <= np.sqrt(6 * max(n - 1, 0)) + 0.1
  # The derivative of y is at most 1/sqrt(epsilon), as much for the statistics.
  assert np.all(np.isfinite(gradient))
  assert np.max(np.abs(gradient)) <= 2 / np.sqrt(1e-5) * np.sqrt(6 * n)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", DEGENERATE)
def test_gradients_of_degenerate_batches(case, method):
  x = DEGENERATE[case] % 100
  t = np.random.default_rng(5).normal(size=x.shape)

  def oracle(x):
    y = oracle_norm(x, group_size=6, epsilon=0.1, method=method)
    return table.loss(lambda: y)()

  derivative = np.sum(output_and_gradient(method, 0.1)(jnp.asarray(x))[1] * t)
  np.testing.assert_allclose(derivative, central(oracle, x, t), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_a_batch_that_is_white_already(method):
  x, how = 2 * orthogonal(), {"method": method, "iterations": 2, "group_size": 4}
  f = layer(**how)
  rng = np.random.default_rng(6)
  t, s = rng.normal(size=(2, *x.shape))

  def oracle(x):
    y = oracle_norm(x, **how)
    return table.loss(lambda: y)()

  first = jax.jit(jax.grad(table.loss(f)))
  np.testing.assert_allclose(np.sum(first(x) * t), central(oracle, x, t), rtol=1e-6)
  second = jax.jit(jax.grad(lambda x: jnp.sum(first(x) * t)))(x)
  along_s = central(lambda x: np.sum(np.asarray(first(x)) * t), x, s)
  np.testing.assert_allclose(np.sum(second * s), along_s, rtol=1e-6)


# Transformations


# Newton's method is products of matrices, with no rule of ours: two stand for all.
TRANSFORMS = {"zca": tuple(table.TRANSFORMS), "newton": ("grad", "hessian")}


@pytest.mark.parametrize("method", TRANSFORMS)
def test_transformations(method):
  pair = layer(method, iterations=2), plain(method, iterations=2)
  table.compare_all(*pair, (batch(), *parameters()), transforms=TRANSFORMS[method])


@pytest.mark.parametrize(
  ("devices", "masked"), [*((d, False) for d in table.DEVICES), ("shard_map", True)]
)
def test_devices(devices, masked):
  def make(axis_name):
    def f(x, scale, bias):
      mask = jnp.abs(x[:, :1]) < 1e3 if masked else None  # all, but that is not known
      return layer(axis_name=axis_name, mask=mask)(x, scale, bias)

    return f

  table.compare_on_devices(devices, make, plain("zca"), (batch(), *parameters()))


def test_second_derivatives_across_devices():
  args = batch(), *parameters()
  shards = jax.vmap(layer(axis_name="batch"), (0, None, None), axis_name="batch")

  def whole(x, *rest):
    return shards(x.reshape(2, -1, C), *rest).reshape(x.shape)

  table.compare("grad of grad", whole, plain("zca"), args)


def test_it_is_traced_once():
  table.assert_traced_once(lambda *a: step(*a, whitening.init(C, G)), (batch(), *parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_a_derivative_is_exported_for_machines_that_are_not_here(method):
  gradient = jax.jit(jax.grad(table.loss(layer(method, iterations=2))))
  x = batch(dtype=np.float32)
  exported = export.export(gradient, platforms=("tpu", "cuda", "cpu"))(x)
  np.testing.assert_allclose(jax.jit(exported.call)(x), gradient(x), rtol=1e-3, atol=1e-4)


def test_channels_may_be_sharded_by_groups():
  for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("batch", "model"), axis_types=(kind,) * 2)
    x = jax.device_put(batch(), jax.NamedSharding(mesh, jax.P("batch", "model")))
    y = jax.jit(layer())(x)
    assert y.sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_allclose(y, oracle_norm(batch()), rtol=1e-9, atol=1e-9)


# Devices


@pytest.mark.optimized
@pytest.mark.parametrize(
  ("how", "masked"), [("pmap", False), ("shard_map", False), ("shard_map", True)]
)
def test_one_all_reduce_forward_and_one_backward(how, masked):
  x = jnp.asarray(batch(16), np.float32)
  mask = np.arange(16)[:, None] % 5 > 0 if masked else None
  given = x, mask, jnp.ones(C, np.float32), jnp.zeros(C, np.float32), whitening.init(C, G)

  def local(x, mask, scale, bias, state):
    return whitening.whitening_norm(
      *(x, scale, bias, state),
      use_running_average=False,
      group_size=G,
      mask=mask,
      axis_name="batch",
    )

  def gradient(x, mask, scale, bias, state):
    def loss(x):
      y, new_state = local(x, mask, scale, bias, state)
      return jnp.sum(jnp.sin(y)), new_state

    return jax.grad(loss, has_aux=True)(x)

  numbers = 4 * (C + C * G) + (2 if masked else 0)  # in four pieces; the count in two halves
  assert all_reduces(jax.jit(spread(how, 4, local)).lower(*given)) == ([numbers], 1)
  forward, backward = all_reduces(jax.jit(spread(how, 4, gradient)).lower(*given))[0]
  assert forward == numbers
  assert backward == C + C * G


@pytest.mark.optimized
def test_under_sharded_jit_only_statistics_move():
  mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
  x = jax.device_put(batch(64), jax.NamedSharding(mesh, jax.P("batch")))
  compiled = jax.jit(jax.grad(table.loss(layer()))).lower(x).compile()
  moved = hlo.collectives(compiled.as_text(), devices=4)
  assert moved
  assert all(c.op == "all-reduce" and c.bytes <= 8 * (C + C * G) for c in moved), moved


def over_devices(f, devices, *args):
  """f of shards under vmap with an axis name: y of the whole, and what is the same on all."""
  shards = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), args)
  y, new = jax.jit(jax.vmap(f, axis_name="batch"))(*shards)
  return y.reshape(-1, *y.shape[2:]), new


def test_a_device_without_examples_and_uneven_ones():
  x = batch(16)
  mask = np.arange(16) % 3 > 0
  mask[4:8] = False
  x[~mask] = np.nan
  state = whitening.init(C, G, dtype=np.float64)

  def f(x, mask):
    return whitening.whitening_norm(
      *(x, None, None, state),
      use_running_average=False,
      group_size=G,
      epsilon=EPSILON,
      mask=mask,
      axis_name="batch",
      momentum=0.0,
    )

  y, new = over_devices(f, 4, jnp.asarray(x), mask[:, None])
  np.testing.assert_allclose(y[mask], oracle_norm(x[mask]), rtol=1e-9, atol=1e-9)
  _, mean, cov = oracle_covariance(x[mask], G)
  for i in range(4):
    np.testing.assert_allclose(new.mean[i], mean, rtol=1e-12)
    np.testing.assert_allclose(new.whitening[i], oracle_matrix(cov, EPSILON), rtol=1e-9, atol=1e-9)


def test_groups_of_devices_share_among_themselves_only():
  x = batch(16)
  f = layer(axis_name="batch", axis_index_groups=[[0, 2], [1, 3]])
  y, _ = over_devices(lambda x: (f(x), None), 4, jnp.asarray(x))
  for rows in (np.r_[0:4, 8:12], np.r_[4:8, 12:16]):
    np.testing.assert_allclose(y[rows], oracle_norm(x[rows]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e5])
def test_a_first_step_far_from_the_running_mean(ratio):
  rng = np.random.default_rng(0)
  x = jnp.asarray(ratio + rng.normal(size=(256, C)), np.float32)
  expected = oracle_norm(x)
  y = first_step(x.reshape(4, -1, C)).reshape(x.shape)
  # u |mean| in standard deviations, stored and shared.
  u = bounds.roundoff(np.float32)
  largest = np.max(np.abs(expected))
  bound = 8 * u * ratio * G + (2 * bounds.summing(256, u) + 8 * u) * G * 4 * largest
  np.testing.assert_allclose(y, expected, rtol=0, atol=bound)


@jax.jit
@functools.partial(jax.vmap, axis_name="batch")
def first_step(x):
  return step(x, state=whitening.init(C, G), axis_name="batch")[0]


# Evaluation and tracking


def test_evaluation_uses_the_running_statistics_and_keeps_them():
  rng = np.random.default_rng(0)
  matrix = rng.normal(size=(C // G, G, G))
  state = whitening.WhiteningStats(rng.normal(size=C), matrix + np.swapaxes(matrix, 1, 2))
  x, (scale, bias) = batch(), parameters()
  y, new = whitening.whitening_norm(
    *map(jnp.asarray, (x, scale, bias)), state, use_running_average=True, group_size=G
  )
  assert new is state
  np.testing.assert_allclose(y, oracle_apply(x, *state, scale, bias), rtol=1e-10, atol=1e-12)


def test_evaluation_of_a_masked_and_of_an_empty_batch():
  state = whitening.init(C, G)
  given = {"use_running_average": True, "group_size": G}
  x = jnp.asarray(batch()).at[0].set(np.nan)
  y, _ = whitening.whitening_norm(x, state=state, mask=np.arange(N)[:, None] > 0, **given)
  assert np.all(np.isfinite(y))
  y, _ = whitening.whitening_norm(jnp.zeros((0, C)), state=state, **given)
  assert y.shape == (0, C)


def test_after_many_steps_evaluation_is_near_training():
  state = whitening.init(C, G, dtype=np.float64)
  rng = np.random.default_rng(0)
  mixing, shift = rng.normal(size=(C, C)) + 2 * np.eye(C), rng.normal(size=C)
  batches = jnp.asarray(rng.normal(size=(60, 512, C)) @ mixing + shift)

  def train(state, x):
    return step(x, state=state, momentum=0.8)[::-1]

  state, ys = jax.jit(lambda s, xs: jax.lax.scan(train, s, xs))(state, batches)
  y, _ = whitening.whitening_norm(batches[-1], state=state, group_size=G, use_running_average=True)
  # Batches of 512 differ by 1 / sqrt(512) = 0.04 standard deviations; outputs reach about 4.
  assert np.max(np.abs(y - ys[-1])) < 0.04 * 4 * 2


@pytest.mark.parametrize("bad", [np.inf, 1e200])  # of the second only the covariance overflows
def test_skip_nonfinite_leaves_the_group_as_it_was_and_no_other(bad):
  x = jnp.asarray(batch()).at[3, 0].set(bad)
  state = whitening.init(C, G, dtype=np.float64)
  _, kept = step(x, state=state, momentum=0.5, skip_nonfinite=True)
  np.testing.assert_array_equal(kept.mean[:G], state.mean[:G])
  np.testing.assert_array_equal(kept.whitening[0], state.whitening[0])
  assert np.all(kept.mean[G:] != 0)
  assert np.all(np.isfinite(kept.whitening))
  _, spoilt = step(x, state=state, momentum=0.5)
  assert not np.all(np.isfinite(spoilt.whitening[0]))
  np.testing.assert_array_equal(spoilt.whitening[1], kept.whitening[1])


def test_a_batch_of_which_nothing_exists_changes_nothing():
  state = whitening.init(C, G)
  y, new = step(jnp.full((N, C), np.nan), state=state, mask=np.zeros((N, 1), bool))
  jax.tree.map(np.testing.assert_array_equal, new, state)
  assert not np.any(y)


def test_a_half_precision_state_becomes_single():
  state = whitening.init(C, G, dtype=jnp.bfloat16)
  x = jnp.asarray(batch(), np.float32)
  y, new = step(x, state=state)
  assert y.dtype == np.float32
  assert new.mean.dtype == new.whitening.dtype == jnp.float32


def test_bfloat16_is_rounded_once_at_the_end():
  x = jnp.asarray(batch(64), jnp.bfloat16)
  scale, bias = (jnp.asarray(p, jnp.bfloat16) for p in parameters())
  args = scale, bias, whitening.init(C, G)
  y, new = step(x, *args)
  wide, stats = step(x.astype(np.float32), *args)
  assert (y.dtype, wide.dtype) == (jnp.bfloat16, np.float32)
  np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
  jax.tree.map(np.testing.assert_array_equal, new, stats)


def test_gradients_of_bfloat16_are_added_before_they_are_rounded():
  x = jnp.asarray(batch(64), jnp.bfloat16)
  gradient = jax.jit(jax.grad(table.loss(layer(dtype=np.float32))))
  assert gradient(x).dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient(x), gradient(x.astype(np.float32)).astype(jnp.bfloat16))


# What is refused

X = np.ones((4, 6))


@pytest.mark.parametrize(
  ("given", "error", "says"),
  [
    ({"x": np.ones((4, 6), int)}, TypeError, r"x has dtype int.*astype"),
    ({"x": np.ones((4, 6), complex)}, TypeError, "complex128.*real and imaginary parts"),
    ({"axis": (0, 1)}, ValueError, r"axis=\(0, 1\).*one axis of channels.*reshape"),
    ({"axis": 2}, ValueError, "axis=2 is out of range"),
    ({"group_size": 4}, ValueError, "group_size=4 does not divide the 6 channels.*1, 2, 3, 6"),
    ({"group_size": 0}, ValueError, "group_size=0.*1, 2, 3, 6"),
    ({"group_size": 2.0}, TypeError, r"group_size=2\.0 is not an integer"),
    ({"group_size": True}, TypeError, "group_size=True is not an integer"),
    ({"method": "pca"}, ValueError, "method='pca'.*'zca'.*'newton'"),
    ({"iterations": 0}, ValueError, "iterations=0: at least one"),
    ({"iterations": 2.5}, TypeError, r"iterations=2\.5 is not an integer"),
    ({"momentum": None}, ValueError, "momentum=None.*0 to 1"),
    ({"momentum": 1.5}, ValueError, r"momentum=1\.5 is out of range"),
    ({"epsilon": -1.0}, ValueError, r"epsilon=-1\.0 is out of range"),
    (
      {"mask": np.ones((4, 6), bool)},
      ValueError,
      r"mask of shape \(4, 6\) differs between the chan",
    ),
    ({"weights": np.ones(6)}, ValueError, r"weights of shape \(6,\) differs.*size 1"),
    ({"mask": np.ones((4, 1))}, TypeError, "mask has dtype float64"),
    ({"mask": np.ones(4, bool)}, ValueError, r"mask of shape \(4,\).*None"),
    ({"masked_value": 0.0}, ValueError, "there is no mask"),
    ({"state": (0, 1)}, TypeError, r"state is a tuple.*whitening\.init"),
    ({"state": whitening.init(6, 2)}, ValueError, r"\(3, 2, 2\).*need \(2, 3, 3\).*init\(6, 3\)"),
    ({"state": whitening.init(4, 2)}, ValueError, r"state\.mean has shape \(4,\)"),
    ({"use_running_average": True, "state": None}, ValueError, "pass state"),
    ({"use_running_average": None}, TypeError, "use_running_average=None"),
    ({"skip_nonfinite": 2}, TypeError, "skip_nonfinite=2"),
    ({"axis_name": "batch"}, ValueError, "axis_name='batch' is not bound here"),
    ({"axis_index_groups": [[0]]}, ValueError, "axis_name, which is None"),
    ({"x": np.ones((0, 6))}, ValueError, "empty batch"),
    ({"scale": np.ones(5)}, ValueError, r"scale has shape \(5,\)"),
  ],
)
def test_what_cannot_work_is_refused_by_name(given, error, says):
  options = {"x": X, "group_size": 3, "use_running_average": False} | given
  with pytest.raises(error, match=says):
    whitening.whitening_norm(**options)


@pytest.mark.parametrize(
  ("call", "error", "says"),
  [
    (lambda: whitening.init(6, 4), ValueError, "1, 2, 3, 6"),
    (lambda: whitening.whitening_matrix(np.ones((2, 3))), ValueError, r"\(2, 3\); square"),
    (lambda: whitening.whitening_matrix(np.eye(2), method="qr"), ValueError, "method='qr'"),
    (lambda: whitening.covariance(X, 4), ValueError, "group_size=4"),
    (lambda: whitening.covariance(X[:0], 3), ValueError, "empty batch"),
    (
      lambda: whitening.merge(whitening.covariance(X, 3), whitening.covariance(X, 2)),
      ValueError,
      r"\(2, 3, 3\) and \(3, 2, 2\).*same groups",
    ),
  ],
)
def test_what_the_steps_refuse(call, error, says):
  with pytest.raises(error, match=says):
    call()
