"""What the compiler is told decides nothing but bytes and time: each piece may be left out."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import SymbolicZero

import jaxbn
from jaxbn import _xla
from tests import bounds, oracle


def instantiated(tangents):
  def zeros(tangent):
    if not isinstance(tangent, SymbolicZero):
      return tangent
    return np.zeros(tangent.aval.shape, tangent.aval.dtype)

  return jax.tree.map(zeros, tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))


PIECES = {
  "traced_once": lambda function: function,
  "traced_once_if_lasting": lambda function: function,
  "apart": lambda values: values,
  "apart_on_gpus": lambda values, unlike: values,
  "own_copy": lambda x, reader: x,
  "by_platform": lambda *arrays, default, **others: default(*arrays),
  "recomputing": lambda linear: linear,
  "nonzero": instantiated,
  "all_hold": jnp.all,
}
# Who uses them, in the order of their imports.
READERS = [importlib.import_module(f"jaxbn.{name}") for name in ("_measure", "_share", "_apply")]


def test_every_piece_is_here():
  ours = {n for n, v in vars(_xla).items() if getattr(v, "__module__", None) == _xla.__name__}
  assert {n for n in ours if n[0] != "_"} | {"by_platform"} == set(PIECES)


@pytest.fixture(params=PIECES)
def without_a_piece(request, monkeypatch):
  monkeypatch.setattr(_xla, request.param, PIECES[request.param])
  for module in READERS:
    importlib.reload(module)
  yield
  monkeypatch.undo()
  for module in READERS:
    importlib.reload(module)


def twice(z):
  return 2 * z


@pytest.mark.usefixtures("without_a_piece")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_piece_the_oracle_holds(dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(3 + rng.normal(size=(32, 3)), dtype)
  cotangent, scale, bias = rng.normal(size=(32, 3)), rng.normal(1, 0.5, 3), rng.normal(size=3)
  cotangent, scale, bias = (np.asarray(a, np.float32) for a in (cotangent, scale, bias))
  options = {"weights": rng.integers(0, 3, (32, 1)).astype(np.float32)}

  def loss(x, scale, bias):
    y, _ = jaxbn.batch_norm(
      x,
      scale,
      bias,
      use_running_average=False,
      activation=twice,
      dtype=jnp.float32,
      **options,
    )
    return jnp.sum(jnp.where(options["weights"] > 0, cotangent * y, 0)), y

  # Batched, so that a branch is seen to stay one or not.
  gradients, y = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2), has_aux=True), (0, None, None)))(
    x[None], scale, bias
  )
  exact, valid = oracle.wide(x), options["weights"] > 0
  single = np.asarray(exact, np.float32)
  expected = 2 * oracle.batch_norm(exact, scale, bias, **options)
  allowed = 2 * bounds.output(single, scale, bias, **options)
  bounds.assert_within(y[0], expected, allowed, valid)
  right = oracle.gradients(exact, scale, 2 * cotangent, **options)
  allowed = bounds.gradients(single, scale, 2 * cotangent, **options)
  rounding = bounds.rounding(right.x, dtype) if dtype == "bfloat16" else 0
  bounds.assert_within(gradients[0][0], right.x, allowed.x + rounding)
  bounds.assert_within(gradients[1][0], right.scale, allowed.scale)
  bounds.assert_within(gradients[2][0], right.bias, allowed.bias)
