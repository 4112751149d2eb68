"""A short run of tests/fuzz.py, and what it stands on."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import _measure
from tests import bounds, fuzz, oracle, rounding

# Draws that have everything at once: devices of which one has nothing, in groups, with derivatives.
FULL = fuzz.Case(
  mode="shard_map",
  devices=4,
  scale="channels",
  bias="examples",
  mask="device",
  garbage=True,
  residual=True,
  activation="held",
  state="near",
  second="forward",
)


FOUND = [  # what failed once
  fuzz.Case(mode="sharded explicit", activation="relu"),
  fuzz.Case(
    dtype="bfloat16", parameters="bfloat16", scale="examples", state="near", choose="corrected"
  ),
]


@hypothesis.settings(max_examples=15)
@hypothesis.example(FOUND[0])
@hypothesis.example(FOUND[1])
@hypothesis.given(fuzz.cases())
def test_random_options_dtypes_devices_and_modes(case):
  fuzz.holds(case)


@pytest.mark.parametrize("broken", ["a factor", "a mask"])
def test_what_is_wrong_is_found(monkeypatch, broken):
  tangents = _measure.d_mean_and_var

  def wrong(plan, inputs, n, values, d, d_n):
    if broken == "a mask":
      inputs = inputs._replace(valid=None)
    d_mean, d_var = tangents(plan, inputs, n, values, d, d_n)
    return d_mean, d_var * (1.001 if broken == "a factor" else 1)

  assert fuzz.check(FULL) < 1
  jax.clear_caches()
  monkeypatch.setattr(_measure, "d_mean_and_var", wrong)
  with pytest.raises(AssertionError, match="bounds off"):
    fuzz.check(FULL)
  jax.clear_caches()


def test_a_case_is_written_as_it_is_made():
  assert eval(repr(FULL), {"Case": fuzz.Case}) == FULL


@pytest.mark.parametrize("case", [FULL, fuzz.Case(dtype="complex64", weights="all", ratio=8.0)])
def test_the_textbook_is_the_oracle(case):
  params, others, state = given = fuzz.arrays(case)
  values, *_ = fuzz.expected(case, *given, *fuzz.directions(case))
  results = values[0] if case.second is None else values[0][0]
  y = oracle.batch_norm(*(params.get(k) for k in ("x", "scale")), axis=case.axis, **others)
  y = y + params.get("bias", 0) + params.get("residual", 0)
  if "held" in params:
    y = y + 0.25 * params["held"] * y * y
  valid = oracle.weights_of(params["x"], **others) > 0
  np.testing.assert_allclose(results["y"][valid], y[valid], rtol=1e-12)
  if state is not None:
    batch = oracle.moments(params["x"], case.axis, **others)
    for name in ("mean", "var"):
      new = 0.9 * oracle.wide(getattr(state, name)) + 0.1 * getattr(batch, name)
      np.testing.assert_allclose(results[name], new, rtol=1e-12)


# Rounding


def test_rounding_bounds_a_difference_that_cancels():
  x = 1e3 + np.random.default_rng(0).normal(size=64).astype(np.float32)

  def variance(x):
    return jnp.mean(x * x) - jnp.mean(x) ** 2

  u = bounds.roundoff(np.float32)
  exact = rounding.evaluate(variance, u, (x.astype(np.float64),), (np.zeros(64),))
  error = abs(float(variance(x)) - exact.value)
  assert 0 < error <= exact.error
  assert exact.error < 200 * u * 1e6  # 64 + 6 roundings or so of each of two sums of 1e6
  np.testing.assert_allclose(exact.value, x.astype(np.float64).var(), rtol=1e-6)


def test_rounding_refuses_to_decide():
  def relu(x):
    return jnp.where(x > 0, x, 0)

  with pytest.raises(rounding.Undecided):
    rounding.evaluate(relu, 1e-7, (np.array([1.0, 1e-9]),), (np.full(2, 1e-8),))
  assert rounding.evaluate(relu, 1e-7, (np.array(1.0),), (np.array(1e-8),)).error == 1e-8
