"""jaxbn.linen.WhiteningNorm: the function bit for bit, and Linen's manners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxbn.linen
from jaxbn.variants import whitening
from tests.layers import FIXED, assert_bit_equal

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(6, 2, 4)) @ RNG.normal(size=(4, 4)) + 1).astype(np.float32)
MASK = np.arange(12).reshape(6, 2, 1) % 5
KEY = jax.random.key(0)
make = functools.partial(jaxbn.linen.WhiteningNorm, **FIXED, group_size=2)

CASES = {
  "default": {},
  "newton": {"method": "newton", "iterations": 3, "momentum": 0.6, "epsilon": 0.1},
  "axis": {"axis": 1, "group_size": 1},
  "neither": {"use_scale": False, "use_bias": False},
  "bfloat16": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
  "mask": {"masked_value": 5.0},
}


def call_of(case):
  return {"mask": MASK, "weights": MASK.astype(np.float32)} if case == "mask" else {}


@pytest.mark.optimized
@pytest.mark.parametrize("case", CASES)
def test_layer_is_the_function_bit_for_bit(case):
  options = CASES[case]
  layer = make(**options)
  variables = layer.init(KEY, X, use_running_average=False)
  params, stats = variables.get("params", {}), variables["batch_stats"]
  fields = ("axis", "method", "iterations", "momentum", "epsilon", "dtype", "group_size")
  arguments = {name: getattr(layer, name) for name in fields}
  if case == "mask":
    arguments |= {"masked_value": 5.0}

  @jax.jit
  def ours(variables):
    y, new = layer.apply(
      variables, X, use_running_average=False, mutable=["batch_stats"], **call_of(case)
    )
    evaluated = layer.apply(variables, X, use_running_average=True, **call_of(case))
    return y, new["batch_stats"], evaluated

  @jax.jit
  def function(params, stats):
    given = X, params.get("scale"), params.get("bias"), whitening.WhiteningStats(**stats)
    call = {k: v != 0 if k == "mask" else v for k, v in call_of(case).items()}
    y, new = whitening.whitening_norm(*given, use_running_average=False, **arguments, **call)
    evaluated, _ = whitening.whitening_norm(*given, use_running_average=True, **arguments, **call)
    return y, new._asdict(), evaluated

  assert_bit_equal(ours(variables), function(params, stats))


def test_the_variables_are_named_shaped_and_typed():
  variables = make(param_dtype=jnp.bfloat16).init(KEY, X, use_running_average=False)
  described = jax.tree.map(lambda v: (v.shape, v.dtype.name), variables)
  assert described == {
    "params": {"scale": ((4,), "bfloat16"), "bias": ((4,), "bfloat16")},
    "batch_stats": {"mean": ((4,), "float32"), "whitening": ((2, 2, 2), "float32")},
  }


@pytest.mark.parametrize("x", [X, jnp.zeros((0, 4)), jax.ShapeDtypeStruct(X.shape, X.dtype)])
def test_init_changes_no_statistics_and_needs_no_axis(x):
  layer = make(axis_name="devices", axis_index_groups=[[0, 1]], use_running_average=False)
  if isinstance(x, jax.ShapeDtypeStruct):
    shapes = jax.eval_shape(layer.init, KEY, x)["batch_stats"]
    assert shapes["whitening"].shape == (2, 2, 2)
    return
  stats = layer.init(KEY, x)["batch_stats"]
  assert_bit_equal(stats, whitening.init(4, 2)._asdict())


def test_it_is_synchronized():
  layer = make(axis_name="devices", momentum=0.0)
  alone = make(momentum=0.0)
  variables = alone.init(KEY, X, use_running_average=False)

  def step(layer, x):
    return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])

  y, new = jax.pmap(functools.partial(step, layer), axis_name="devices")(X.reshape(2, 3, 2, 4))
  whole, expected = jax.jit(functools.partial(step, alone))(X)
  # Of order one, and of a condition number below a hundred.
  np.testing.assert_allclose(y.reshape(X.shape), whole, rtol=0, atol=1e-4)
  for one, right in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(one[0], one[1])
    np.testing.assert_allclose(one[0], right, rtol=0, atol=1e-4)


def test_masked_value_waits_for_a_mask():
  layer = make(masked_value=5.0, use_running_average=True)
  assert np.all(layer.apply(layer.init(KEY, X), X) != 5)


def test_a_batch_that_is_not_finite_can_be_skipped():
  layer = make(skip_nonfinite=True, use_running_average=False)
  variables = layer.init(KEY, X)
  _, new = layer.apply(variables, np.full_like(X, np.nan), mutable=["batch_stats"])
  assert_bit_equal(new["batch_stats"], variables["batch_stats"])


def test_checkpoints_come_back(tmp_path):
  variables = make().init(KEY, X, use_running_average=False)
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "checkpoint", variables)
    saver.wait_until_finished()
    assert_bit_equal(saver.restore(tmp_path / "checkpoint", variables), variables)


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"group_size": 3}, "group_size=3 does not divide the 4 channels.*1, 2, 4"),
    ({"axis": (0, 2)}, "one axis of channels"),
    ({"method": "pca"}, "method='pca'"),
  ],
)
def test_the_function_s_errors_reach_the_caller(options, says):
  with pytest.raises(ValueError, match=says):
    make(**options).init(KEY, X, use_running_average=False)
