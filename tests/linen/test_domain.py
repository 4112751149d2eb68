"""jaxbn.linen.DomainBatchNorm: against the function, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import jaxbn
import jaxbn.linen
from jaxbn.variants.domain import domain_batch_norm
from tests import layers

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(1, 2, (8, 5, 3)), jnp.float32)
DOMAINS = np.array([2, 0, 0, 1, 2, 2, 1, 0])
KEY = jax.random.key(0)


def make(**options):
  return jaxbn.linen.DomainBatchNorm(num_domains=3, **layers.FIXED | options)


@pytest.mark.parametrize("per_domain", [False, True])
def test_the_tree_and_that_initialization_tracks_nothing(per_domain):
  layer = make(per_domain_parameters=per_domain, use_running_average=False, momentum=None)
  variables = layer.init(KEY, X, DOMAINS)
  shape = (3, 3) if per_domain else (3,)
  assert jax.tree.map(jnp.shape, variables["params"]) == {"scale": shape, "bias": shape}
  start = jaxbn.init((3, 3), momentum=None)
  layers.assert_bit_equal(variables["batch_stats"], start._asdict())
  empty = jax.tree.map(jnp.zeros_like, variables)
  loaded = serialization.from_bytes(empty, serialization.to_bytes(variables))
  layers.assert_bit_equal(loaded, variables)


@pytest.mark.optimized
@pytest.mark.parametrize("axis", [-1, (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_domain", [False, True])
def test_layer_is_the_function_bit_for_bit(axis, masked, per_domain):
  options = {"momentum": 0.9, "debias": True, "axis": axis, "activation": jax.nn.relu}
  layer = make(**options, per_domain_parameters=per_domain)
  call = {"mask": layers.MASK if axis == -1 else layers.MASK[:, :1]} if masked else {}
  start = layer.init(KEY, X, DOMAINS, False)
  y, new = layer.apply(start, X, DOMAINS, False, mutable=["batch_stats"], **call)
  given = {**start["params"], "domains": DOMAINS}
  state = jaxbn.RunningStats(**start["batch_stats"])
  expected, state = domain_batch_norm(
    X, **given, state=state, use_running_average=False, **options, **call
  )
  layers.assert_bit_equal(y, expected)
  layers.assert_bit_equal(new["batch_stats"], state._asdict())
  evaluation = layer.apply(start | new, X, 1, use_running_average=True)
  expected, _ = domain_batch_norm(
    X, **given | {"domains": 1}, state=state, use_running_average=True, **options
  )
  layers.assert_bit_equal(evaluation, expected)


def test_synchronized():
  layer = make(use_running_average=False, axis_name="b")
  start = layer.init(KEY, X, DOMAINS)

  def apply(x, domains):
    return layer.apply(start, x, domains, mutable=["batch_stats"])

  y, new = jax.pmap(apply, axis_name="b")(X.reshape(4, 2, 5, 3), DOMAINS.reshape(4, 2))
  whole, whole_new = make(use_running_average=False).apply(
    start, X, DOMAINS, mutable=["batch_stats"]
  )
  layers.assert_equal_to_rounding(y.reshape(X.shape), whole)
  layers.assert_equal_to_rounding(jax.tree.map(lambda v: v[3], new), whole_new)


def test_what_a_layer_with_domains_cannot_is_refused():
  variables = make(use_running_average=False).init(KEY, X, DOMAINS)
  for options in ({"virtual_batch_size": 4}, {"choose": layers.halfway}):
    layer = make(use_running_average=False, **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* in a layer with domains"):
      layer.apply(variables, X, DOMAINS, mutable=["batch_stats"])


def test_errors_reach_the_caller():
  with pytest.raises(ValueError, match="domains hold 3"):
    make(use_running_average=False).init(KEY, X, DOMAINS + 1)
