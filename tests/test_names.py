"""What another library's name means here is said, by functions and by layers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import _names
from tests.test_package import PUBLIC

LAYERS = [t for t in PUBLIC if inspect.isclass(t) and issubclass(t, _names.ByOurNames)]
FUNCTIONS = [t for t in PUBLIC if hasattr(t, "__wrapped__")]


@pytest.mark.parametrize(
  ("package", "name", "said"),
  [
    (jaxbn, "BatchNorm", "the layers are in jaxbn.linen and jaxbn.nnx"),
    (jaxbn, "BatchRenorm", "the layers are in jaxbn.linen and jaxbn.nnx"),
    (jaxbn, "batchnorm", "jaxbn.batch_norm is the function"),
    (jaxbn.nnx, "BatchNorm2d", "jaxbn.nnx.BatchNorm takes any number of axes"),
    (jaxbn.linen, "SyncBatchNorm", "axis_name= synchronizes it"),
    (jaxbn.linen, "batchnorm", "jaxbn.linen.BatchNorm"),
    (jaxbn.variants, "renrom", "no attribute 'renrom'$"),
    (jaxbn.alternatives, "renorm", "no attribute 'renorm'$"),
  ],
)
def test_an_unknown_name_says_what_was_meant(package, name, said):
  with pytest.raises(AttributeError, match=said):
    getattr(package, name)


@pytest.mark.parametrize("thing", FUNCTIONS + LAYERS, ids=lambda t: f"{t.__module__}.{t.__name__}")
def test_what_another_library_calls_an_argument(thing):
  with pytest.raises(TypeError, match=f"{thing.__name__} has no argument 'eps': .* epsilon"):
    thing(eps=1e-3)
  assert not inspect.signature(thing).parameters.keys() & _names._ARGUMENTS.keys()


CALLED = [t for t in LAYERS if issubclass(t, nnx.Module) and hasattr(t.__call__, "__wrapped__")]


@pytest.mark.parametrize("layer", CALLED, ids=lambda t: t.__name__)
def test_what_another_library_calls_an_argument_of_a_call(layer):
  with pytest.raises(TypeError, match=r"__call__ has no argument 'training': .*not training"):
    layer.__call__(None, jnp.ones((4, 3)), training=True)


def test_options_that_are_handed_on_are_refused_by_name():
  x = jnp.ones((4, 3))
  with pytest.raises(TypeError, match="'decay_rate': here it is momentum"):
    jaxbn.variants.renorm.batch_renorm(x, use_running_average=False, decay_rate=0.9)


def test_layers_are_still_copied_and_made_of_their_fields():
  layer = jaxbn.linen.BatchNorm(momentum=0.9)
  assert layer.clone(epsilon=0.1).momentum == 0.9
  layer = jaxbn.nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
  assert nnx.clone(layer).momentum == 0.9


@pytest.mark.parametrize(
  ("value", "said"),
  [
    (np.zeros((100, 3), np.float32), "float32[100,3]"),
    (jnp.zeros((2, 2)), "float32[2,2]"),
    (np.float32(0.5), "np.float32(0.5)"),
    (jax.nn.relu, "relu"),
    (jnp.where, "where"),
    (nnx.Dropout, "Dropout"),
    ("a" * 1000, "aaa...aaa"),
    (list(range(100)), "[0, 1, 2, 3, 4, 5, ...]"),
    (functools.partial(jax.nn.leaky_relu, negative_slope=0.1), "functools.partial"),
    (None, "None"),
  ],
  ids=range(10),
)
def test_a_value_is_shown_in_a_few_words(value, said):
  shown = _names.shown(value)
  assert len(shown) <= 100
  first, *last = said.split("...")
  assert first in shown
  assert all(part in shown for part in last)
