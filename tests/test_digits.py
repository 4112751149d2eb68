"""Numbers in pieces, against exact arithmetic."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import _digits

DTYPES = [np.float32, np.float64]


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def exact(terms):
  """The sum along the first axis, of all terms as they are."""
  terms = np.asarray(terms)
  sums = [
    sum(map(fractions.Fraction, column.tolist())) for column in terms.reshape(len(terms), -1).T
  ]
  return np.array(sums, object).reshape(terms.shape[1:])


def numbers(seed, shape, dtype, exponents=(0, 0)):
  rng = np.random.default_rng(seed)
  return np.ldexp(rng.uniform(-1, 1, shape), rng.integers(*exponents, shape, endpoint=True)).astype(
    dtype
  )


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_exact(dtype):
  a, b = (numbers(seed, (3, 100), dtype) for seed in range(2))
  np.testing.assert_array_equal(
    exact(jax.jit(_digits.products)(_digits.halves(a), b)), exact(a) * exact(b)
  )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("devices", [2, 16, 2048])
@pytest.mark.parametrize("exponents", [(0, 0), (-3, 3), (-40, 5)])
def test_pieces_of_many_devices_add_up(dtype, devices, exponents):
  # Whatever the order: here one after the other. Two terms each, the second far below the first.
  bits = _digits.significand(dtype) - (devices - 1).bit_length()
  first = numbers(0, (devices, 8), dtype, exponents)
  terms = np.stack([first, numbers(1, first.shape, dtype) * first * dtype(1e-5)], 1)
  about = terms.sum(1, dtype=dtype)
  pieces = np.asarray(
    jax.vmap(lambda *given: _digits.pieces(*given, bits=bits))(terms, about, 0 * about)
  )
  sums = np.zeros((4, 8), dtype)
  for one in pieces:
    sums += one
  error = np.abs((exact(sums) - exact(exact(terms.swapaxes(0, 1)))).astype(float))
  u = float(jnp.finfo(dtype).eps) / 2
  assert np.all(error <= devices**2 * u**2 * devices * np.abs(first).max(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_piece_has_no_more_digits_than_it_may(dtype):
  # What is rounded off many terms is carried: 15 times almost a half here.
  bias = jnp.finfo(dtype).maxexp - 1
  unit = 2.0 ** (bias // 12 * 12 - bias)  # that of the first piece
  terms = np.stack([np.ones(5)] + 15 * [np.full(5, 0.5 - 2.0**-20)]).astype(dtype) * dtype(unit)
  pieces = np.asarray(_digits.pieces(terms, terms.sum(0), 0 * terms[0], bits=12))
  np.testing.assert_array_equal(exact(pieces), exact(terms))
  first, second, rest, zero = np.sort(np.abs(pieces) / dtype(unit), 0)[::-1]
  assert np.all(first % 1 == 0)
  assert np.all((second <= 0.5) & (rest <= 16 * 2.0**-13) & (zero == 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_total_keeps_what_is_left(dtype):
  # Products that cancel but for their last digits; before that their sum is as large as it can be.
  a, b = (np.abs(numbers(seed, (3, 200), dtype)) for seed in range(2))
  products = np.asarray(_digits.products(_digits.halves(a), b))
  left = numbers(2, (5, 200), dtype) * dtype(2.0**-20)
  terms = np.concatenate([products, left, -products])
  wanted = exact(terms)
  got = exact(np.asarray(_digits.total(terms))[None])
  u = float(jnp.finfo(dtype).eps) / 2
  assert np.all(np.abs((got - wanted).astype(float)) <= 2 * u * np.abs(wanted.astype(float)))
