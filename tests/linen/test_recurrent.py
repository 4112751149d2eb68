"""The recurrent layers for Linen: under nn.RNN they are the functions, scanned."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
from jaxbn.variants import input_norm, recurrent

BATCH, TIME, FEATURES, UNITS = 8, 4, 3, 4
LENGTHS = np.array([4, 3, 2, 4, 2, 1, 4, 4])
CELLS = {
  "lstm": (jaxbn.linen.LSTMCell, recurrent.LSTMParams, recurrent.lstm_stats, recurrent.lstm_step),
  "gru": (jaxbn.linen.GRUCell, recurrent.GRUParams, recurrent.gru_stats, recurrent.gru_step),
}
CARRIES = {"lstm": recurrent.lstm_carry, "gru": recurrent.gru_carry}


def data():
  return jax.random.normal(jax.random.key(0), (BATCH, TIME, FEATURES))


def rnn(kind, evaluating=False, **options):
  cell = CELLS[kind][0](UNITS, TIME, evaluating, momentum=0.9, **options)
  if evaluating:
    return nn.RNN(cell, variable_broadcast=("params", "batch_stats"))
  return nn.RNN(cell, variable_carry="batch_stats")


@functools.partial(jax.jit, static_argnames=("kind", "evaluating"))
def functional(kind, variables, x, lengths=None, evaluating=False):
  """The same by the functions, of x (batch, time, features)."""
  _, params, _, step = CELLS[kind]
  params = params(**variables["params"]["cell"])
  stats = recurrent.LSTMStats if kind == "lstm" else recurrent.GRUStats
  tree = variables["batch_stats"]["cell"]
  stats = stats(**{name: jaxbn.RunningStats(**rows) for name, rows in tree.items()})

  def one(state, x):
    carry, stats = state
    options = {"use_running_average": evaluating, "momentum": 0.9}
    carry, y, stats = step(params, stats, carry, x, **options)
    return (carry, stats), y

  start = CARRIES[kind](len(x), UNITS, lengths), stats
  (_, stats), ys = jax.lax.scan(one, start, jnp.swapaxes(x, 0, 1))
  leaves = {name: {"mean": s.mean, "var": s.var} for name, s in stats._asdict().items()}
  return jnp.swapaxes(ys, 0, 1), {"batch_stats": {"cell": leaves}}


def assert_close(a, b):
  """One loop against another: some rounding errors of numbers of order one, amplified by a few."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


def flip(x, lengths=LENGTHS):
  steps = np.arange(TIME)
  order = np.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
  return jnp.take_along_axis(x, order[..., None], 1)


@pytest.mark.parametrize("kind", CELLS)
def test_under_rnn_it_is_the_function_scanned(kind):
  x, model = data(), rnn(kind)
  variables = jax.jit(model.init)(jax.random.key(1), x)
  y, updates = jax.jit(lambda x: model.apply(variables, x, mutable=["batch_stats"]))(x)
  expected, after = functional(kind, variables, x)
  assert_close(y, expected)
  assert_close(updates, after)
  variables = variables | updates
  y = jax.jit(rnn(kind, evaluating=True).apply)(variables, x)
  assert_close(y, functional(kind, variables, x, evaluating=True)[0])


@pytest.mark.parametrize(("kind", "reverse"), [("lstm", True), ("gru", False)])
def test_padding_enters_nothing_where_the_carry_knows_the_lengths(kind, reverse):
  x, model = data(), rnn(kind)
  variables = jax.jit(model.init)(jax.random.key(1), x)
  there = (np.arange(TIME) < LENGTHS[:, None])[..., None]
  carry = model.cell.initialize_carry(jax.random.key(0), (BATCH, FEATURES), LENGTHS)

  def loss(params, x):
    (last, y), updates = model.apply(
      variables | {"params": params},
      x,
      initial_carry=carry,
      seq_lengths=LENGTHS,
      return_carry=True,
      reverse=reverse,
      keep_order=True,
      mutable=["batch_stats"],
    )
    return jnp.sum(jnp.where(there, y, 0) ** 2), (last, y, updates)

  def expected_loss(params, x):
    x = flip(x) if reverse else x
    y, after = functional(kind, variables | {"params": params}, x, LENGTHS)
    last = y[:, -1]
    y = flip(y) if reverse else y
    return jnp.sum(jnp.where(there, y, 0) ** 2), (last, y, after)

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  grads, (last, y, updates) = gradient(variables["params"], jnp.where(there, x, jnp.nan))
  expected_gradient = jax.jit(jax.grad(expected_loss, has_aux=True))
  expected, (expected_last, expected_y, after) = expected_gradient(variables["params"], x)
  assert_close(last.h, expected_last)
  assert_close(jnp.where(there, y, 0), jnp.where(there, expected_y, 0))
  assert_close(updates, after)
  assert_close(grads, expected)


@pytest.mark.parametrize("kind", ["gru"])
def test_devices_share_their_statistics(kind):
  x, model = data(), rnn(kind, axis_name="b")
  variables = jax.jit(model.init)(jax.random.key(1), x)  # needs no bound axis
  run = jax.pmap(lambda x: model.apply(variables, x, mutable=["batch_stats"]), axis_name="b")
  y, updates = run(x.reshape(2, BATCH // 2, TIME, FEATURES))
  expected, after = functional(kind, variables, x)
  assert_close(y.reshape(expected.shape), expected)
  assert_close(jax.tree.map(lambda leaf: leaf[1], updates), after)


def test_initialization_changes_no_statistics_and_forget_gates_start_at_one():
  variables = jax.jit(rnn("lstm").init)(jax.random.key(1), data())
  for rows in variables["batch_stats"]["cell"].values():
    np.testing.assert_array_equal(rows["mean"], 0)
    np.testing.assert_array_equal(rows["var"], 1)
  params = variables["params"]["cell"]
  np.testing.assert_array_equal(params["bias"], np.repeat([0, 1, 0, 0], UNITS))
  np.testing.assert_allclose(params["hidden_scale"], 0.1)


def test_count_is_a_leaf_where_it_is_needed():
  x, model = data(), rnn("gru", debias=True)
  variables = jax.jit(model.init)(jax.random.key(1), x)
  _, updates = jax.jit(lambda x: model.apply(variables, x, mutable=["batch_stats"]))(x)
  np.testing.assert_array_equal(updates["batch_stats"]["cell"]["hidden"]["count"], 1)


def test_errors():
  x = data()
  model = nn.RNN(jaxbn.linen.LSTMCell(UNITS, TIME, False))
  with pytest.raises(ValueError, match="variable_carry='batch_stats'"):
    model.init(jax.random.key(0), x)
  model = nn.RNN(jaxbn.linen.LSTMCell(UNITS, TIME), variable_carry="batch_stats")
  with pytest.raises(ValueError, match="use_running_average was not given"):
    model.init(jax.random.key(0), x)


@pytest.mark.parametrize(
  ("kind", "max_length"), [("simple", None), ("lstm", TIME)], ids=["sequence-wise", "frame-wise"]
)
def test_input_norm_rnn_is_the_function(kind, max_length):
  x = data()
  layer = jaxbn.linen.InputNormRNN(UNITS, kind, max_length=max_length, momentum=0.9)
  variables = layer.init(jax.random.key(1), x, use_running_average=False)
  params = input_norm.InputNormParams(**variables["params"])
  state = jaxbn.RunningStats(**variables["batch_stats"])
  options = {"kind": kind, "momentum": 0.9, "frame_wise": max_length is not None}
  for evaluating in (False, True):
    y, updates = layer.apply(
      variables, x, seq_lengths=LENGTHS, use_running_average=evaluating, mutable=["batch_stats"]
    )
    expected, state = input_norm.input_norm_rnn(
      params, state, x, seq_lengths=LENGTHS, use_running_average=evaluating, **options
    )
    assert_close(y, expected)
    assert_close(updates["batch_stats"], {"mean": state.mean, "var": state.var})
    variables = variables | updates
