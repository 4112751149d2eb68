"""What is common to the arguments of all functions: which values a flag may have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

X = jax.random.normal(jax.random.key(0), (8, 3)) + 1
STATE = jaxbn.init(3, debias=True)
FLAGS = (
  "use_running_average",
  "use_fast_variance",
  "debias",
  "unbiased",
  "skip_nonfinite",
  "detach_stats",
)
FORMS = {
  "integer": int,
  "numpy": np.bool_,
  "numpy integer": np.int64,
  "numpy array": np.array,
  "jax array": jnp.array,
  "jax integer": lambda flag: jnp.array(int(flag)),
}


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_has_many_forms(flag, form, value):
  def run(given):
    options = {"use_running_average": False} | {flag: given}
    gradient = jax.grad(lambda x: jnp.sum(jaxbn.batch_norm(x, state=STATE, **options)[0] ** 3))
    return gradient(X), jaxbn.batch_norm(X, state=STATE, **options)

  given = FORMS[form](value)
  jax.tree.map(np.testing.assert_array_equal, run(given), run(value))


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
  "value",
  [2, -1, 1.0, None, "yes", [True], np.array([True]), np.ones(()), np.array(None)],
  ids=repr,
)
def test_what_is_neither_true_nor_false_is_refused(flag, value):
  options = {"use_running_average": False, flag: value}
  with pytest.raises(TypeError, match=f"{flag}=.*a Python bool is needed"):
    jaxbn.batch_norm(X, state=STATE, **options)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_traced_flag_is_refused(flag):
  def call(value):
    options = {"use_running_average": False, flag: value}
    return jaxbn.batch_norm(X, state=STATE, **options)[0]

  with pytest.raises(TypeError, match=rf"{flag}=.*static under jit, or.*jax\.lax\.cond"):
    jax.jit(call)(True)


def test_a_state_with_the_axis_of_pmap_is_told_how_to_lose_it():
  def layer(state, x):
    return jaxbn.batch_norm(x, state=state, use_running_average=False, axis_name="i")[1]

  x, state = jnp.stack([X, X + 1]), jaxbn.init(3)
  step = jax.pmap(layer, axis_name="i", in_axes=(None, 0))
  with pytest.raises(ValueError, match=r"state\.mean has shape \(2, 3\).*out_axes=None"):
    step(step(state, x), x)
  step = jax.pmap(layer, axis_name="i", in_axes=(None, 0), out_axes=None)
  assert step(step(state, x), x).mean.shape == (3,)


def test_channels_elsewhere_are_found():
  with pytest.raises(ValueError, match=r"name the channels' axis: axis=1 has 3\."):
    jaxbn.batch_norm(jnp.ones((4, 3, 8)), state=STATE, use_running_average=False)
