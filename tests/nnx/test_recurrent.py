"""The recurrent layers for NNX: under nnx.RNN they are the functions, scanned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.nnx
from jaxbn.variants import input_norm
from tests.linen import test_recurrent as linen
from tests.linen.test_recurrent import BATCH, CELLS, FEATURES, LENGTHS, TIME, UNITS, data

LAYERS = {"lstm": jaxbn.nnx.LSTMCell, "gru": jaxbn.nnx.GRUCell}
# What nnx.RNN carries, if nothing is said, and what is enough.
AXES = {
  "everything": None,
  "statistics": nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}),
}


def rnn(kind, axes="everything", **options):
  cell = LAYERS[kind](FEATURES, UNITS, TIME, momentum=0.9, rngs=nnx.Rngs(0), **options)
  return nnx.RNN(cell, state_axes=AXES[axes], rngs=False)


def variables(model):
  """The parameters and statistics, as the Linen cell has them."""
  state = nnx.to_pure_dict(nnx.state(model.cell))
  names = CELLS["lstm" if "cell" in state else "gru"][1]._fields
  params = {name: state.pop(name) for name in names}
  return {"params": {"cell": params}, "batch_stats": {"cell": state}}


@pytest.mark.parametrize(("kind", "axes"), [("lstm", "everything"), ("gru", "statistics")])
def test_under_rnn_it_is_the_function_scanned(kind, axes):
  x, model = data(), rnn(kind, axes)
  before = variables(model)
  y = nnx.jit(lambda model, x: model(x))(model, x)
  expected, after = linen.functional(kind, before, x)
  linen.assert_close(y, expected)
  linen.assert_close(variables(model)["batch_stats"], after["batch_stats"])
  model.eval()
  expected, _ = linen.functional(kind, variables(model), x, evaluating=True)
  linen.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["gru"])
def test_padding_enters_nothing_where_the_carry_knows_the_lengths(kind):
  x, model = data(), rnn(kind, "statistics")
  before = variables(model)
  there = (np.arange(TIME) < LENGTHS[:, None])[..., None]

  def loss(model, x):
    carry = model.cell.initialize_carry((BATCH, FEATURES), seq_lengths=LENGTHS)
    last, y = model(
      x,
      initial_carry=carry,
      seq_lengths=LENGTHS,
      return_carry=True,
      reverse=True,
      keep_order=True,
    )
    return jnp.sum(jnp.where(there, y, 0) ** 2), last

  def expected_loss(params, x):
    y, after = linen.functional(kind, before | {"params": params}, linen.flip(x), LENGTHS)
    return jnp.sum(jnp.where(there, linen.flip(y), 0) ** 2), (y[:, -1], after)

  gradient = nnx.jit(nnx.grad(loss, has_aux=True))
  grads, last = gradient(model, jnp.where(there, x, jnp.nan))
  expected_gradient = jax.jit(jax.grad(expected_loss, has_aux=True))
  expected, (expected_last, after) = expected_gradient(before["params"], x)
  linen.assert_close(last.h, expected_last)
  linen.assert_close(variables(model)["batch_stats"], after["batch_stats"])
  linen.assert_close(nnx.to_pure_dict(grads)["cell"], expected["cell"])


def test_devices_share_their_statistics():
  x, model = data(), rnn("gru", "statistics", axis_name="b")
  before = variables(model)

  @nnx.pmap(in_axes=(nnx.StateAxes({...: None}), 0), axis_name="b")
  def run(model, x):
    return model(x)

  y = run(model, x.reshape(2, BATCH // 2, TIME, FEATURES))
  expected, after = linen.functional("gru", before, x)
  linen.assert_close(y.reshape(expected.shape), expected)
  linen.assert_close(variables(model)["batch_stats"], after["batch_stats"])


def test_train_and_eval_and_none():
  model = rnn("gru")
  model.eval()
  before = variables(model)
  model(data())
  linen.assert_close(variables(model), before)
  model = rnn("gru", use_running_average=None)
  with pytest.raises(ValueError, match="use_running_average was not given"):
    model(data())


def test_the_carry_may_start_with_noise():
  cell = rnn("lstm").cell
  init = nnx.initializers.normal(0.1)
  carry = cell.initialize_carry((BATCH, FEATURES), nnx.Rngs(carry=0), init)
  assert 0.03 < float(carry.h.std()) < 0.3
  assert not np.array_equal(carry.h, carry.c)
  with pytest.raises(ValueError, match="carry_init needs keys"):
    cell.initialize_carry((BATCH, FEATURES), carry_init=init)


@pytest.mark.parametrize("max_length", [None, TIME], ids=["sequence-wise", "frame-wise"])
def test_input_norm_rnn_is_the_function(max_length):
  x = data()
  layer = jaxbn.nnx.InputNormRNN(
    FEATURES, UNITS, kind="gru", max_length=max_length, momentum=0.9, rngs=nnx.Rngs(0)
  )
  names = input_norm.InputNormParams._fields
  params = input_norm.InputNormParams(**{name: getattr(layer, name)[...] for name in names})
  state = jaxbn.RunningStats(layer.mean[...], layer.var[...])
  options = {"kind": "gru", "momentum": 0.9, "frame_wise": max_length is not None}
  for evaluating in (False, True):
    y = layer(x, seq_lengths=LENGTHS, use_running_average=evaluating)
    expected, state = input_norm.input_norm_rnn(
      params, state, x, seq_lengths=LENGTHS, use_running_average=evaluating, **options
    )
    linen.assert_close(y, expected)
    linen.assert_close((layer.mean[...], layer.var[...]), (state.mean, state.var))
