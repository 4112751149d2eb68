"""Normalization of the input of recurrent layers, against float64 NumPy and plain JAX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.variants import input_norm
from tests.variants import table
from tests.variants.oracle_recurrent import sigmoid
from tests.variants.table import double_precision  # noqa: F401

BATCH, TIME, FEATURES, UNITS = 6, 4, 3, 3
LENGTHS = np.array([4, 2, 3, 1, 4, 4])
THERE = np.arange(TIME) < LENGTHS[:, None]  # batch, time
KINDS = list(input_norm.GATES)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def data():
  return np.random.default_rng(0).normal(0.5, 2, (BATCH, TIME, FEATURES))


def state_of(mode, channels, rows=TIME):
  shape = (rows, channels) if mode == "frame-wise" else (channels,)
  rng = np.random.default_rng(1)
  return jaxbn.RunningStats(*(jnp.asarray(rng.uniform(0.5, 1.5, shape)) for _ in range(2)))


def expected_norm(x, mode, there, state, running):
  """Normalized x, and the statistics after it, of steps as of lists."""
  y, mean, var = np.zeros_like(x), np.array(state.mean), np.array(state.var)
  where = [slice(None)] if mode == "sequence-wise" else range(x.shape[1])
  for t in where:
    frames, valid = x[:, t], there[:, t]
    row = min(t, len(mean) - 1) if mode == "frame-wise" else slice(None)
    m, v = mean[row].copy(), var[row].copy()
    if not running:
      m, v = frames[valid].mean(0), frames[valid].var(0)
      mean[row], var[row] = 0.9 * mean[row] + 0.1 * m, 0.9 * var[row] + 0.1 * v
    y[:, t] = (frames - m) / np.sqrt(v + 1e-5)
  return y, jaxbn.RunningStats(mean, var)


@pytest.mark.parametrize("running", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize(
  ("mode", "rows"), [("sequence-wise", 1), ("frame-wise", 6), ("frame-wise", 2)]
)
def test_statistics_are_the_oracle_s(mode, running, rows):
  x, state = data(), state_of(mode, FEATURES, rows)
  scale, bias = np.array([0.5, 1.0, 2.0]), np.array([1.0, -1.0, 0.0])
  y, after = jax.jit(
    lambda x: input_norm.sequence_norm(
      x,
      scale,
      bias,
      state,
      use_running_average=running,
      frame_wise=mode == "frame-wise",
      mask=THERE,
      momentum=0.9,
    )
  )(np.where(THERE[..., None], x, np.nan))
  expected, stats = expected_norm(x, mode, THERE, state, running)
  np.testing.assert_allclose(y[THERE], (expected * scale + bias)[THERE], **CLOSE)
  chex.assert_trees_all_close(after, stats, **CLOSE)


def parameters(kind):
  width = input_norm.channels(kind, UNITS)
  shapes = (FEATURES, width), (UNITS, width), (width,), (width,)
  rng = np.random.default_rng(2)
  return input_norm.InputNormParams(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))


def expected_rnn(kind, params, z, there, reverse):
  """The plain recurrence, of what is normalized."""
  h = c = np.zeros((BATCH, UNITS))
  ys = np.zeros((BATCH, TIME, UNITS))
  for t in reversed(range(TIME)) if reverse else range(TIME):
    valid, w = there[:, t, None], h @ np.asarray(params.hidden_kernel)
    if kind == "simple":
      new = np.tanh(z[:, t] + w)
    elif kind == "lstm":
      i, f, g, o = np.split(z[:, t] + w, 4, -1)
      c = np.where(valid, sigmoid(f) * c + sigmoid(i) * np.tanh(g), c)
      new = sigmoid(o) * np.tanh(c)
    else:
      (a_r, a_z, a_n), (b_r, b_z, b_n) = np.split(w, 3, -1), np.split(z[:, t], 3, -1)
      r, u = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
      new = (1 - u) * np.tanh(r * a_n + b_n) + u * h
    h = ys[:, t] = np.where(valid, new, h)
  return ys


@pytest.mark.parametrize(
  ("kind", "mode", "reverse"),
  [
    *((kind, "sequence-wise", True) for kind in KINDS),
    *((kind, "frame-wise", False) for kind in KINDS),
  ],
)
def test_the_recurrence_is_the_oracle_s(kind, mode, reverse):
  params, x = parameters(kind), data()
  state = state_of(mode, len(params.bias))
  y, after = jax.jit(
    lambda x: input_norm.input_norm_rnn(
      params,
      state,
      x,
      use_running_average=False,
      kind=kind,
      frame_wise=mode == "frame-wise",
      seq_lengths=LENGTHS,
      reverse=reverse,
      momentum=0.9,
    )
  )(np.where(THERE[..., None], x, np.nan))
  z, stats = expected_norm(x @ np.asarray(params.input_kernel), mode, THERE, state, False)
  z = z * np.asarray(params.input_scale) + np.asarray(params.bias)
  np.testing.assert_allclose(y, expected_rnn(kind, params, z, THERE, reverse), **CLOSE)
  chex.assert_trees_all_close(after, stats, **CLOSE)


def ours(mode, axis_name, x, *leaves):
  return input_norm.input_norm_rnn(
    input_norm.InputNormParams(*leaves),
    None,
    x,
    use_running_average=False,
    kind="simple",
    frame_wise=mode == "frame-wise",
    axis_name=axis_name,
  )[0]


def plain(mode, x, w_x, w_h, bias, scale):
  z, over = x @ w_x, 0 if mode == "frame-wise" else (0, 1)
  z = (z - z.mean(over)) / jnp.sqrt(z.var(over) + 1e-5) * scale + bias
  h, ys = jnp.zeros((len(x), UNITS)), []
  for t in range(x.shape[1]):
    h = jnp.tanh(z[:, t] + h @ w_h)
    ys.append(h)
  return jnp.stack(ys, 1)


@pytest.mark.parametrize(
  ("mode", "transform"),
  [("sequence-wise", "grad"), *(("frame-wise", t) for t in ("vmap of grad", "grad of grad"))],
)
def test_transformations(mode, transform):
  f, formula = functools.partial(ours, mode, None), functools.partial(plain, mode)
  table.compare(transform, f, formula, (data(), *parameters("simple")))


@pytest.mark.parametrize(
  ("mode", "devices"),
  [*(("frame-wise", d) for d in ("shard_map", "jit explicit")), ("sequence-wise", "vmap")],
)
def test_devices(mode, devices):
  def make(name):
    return functools.partial(ours, mode, name)

  args = (data(), *parameters("simple"))
  table.compare_on_devices(devices, make, functools.partial(plain, mode), args)


def test_errors():
  params, x = parameters("lstm"), data()
  state = state_of("sequence-wise", 4 * UNITS)
  call = functools.partial(input_norm.input_norm_rnn, use_running_average=False)
  with pytest.raises(ValueError, match="kind='lsmt': it is one of 'simple', 'lstm', 'gru'"):
    call(params, state, x, kind="lsmt")
  with pytest.raises(ValueError, match=r"params.input_kernel has shape \(3, 12\).*\(3, 9\)"):
    call(params, state, x, kind="gru")
  with pytest.raises(ValueError, match="three axes: batch, time, features"):
    call(params, state, x[0])
  with pytest.raises(ValueError, match=r"state.mean has shape \(12,\).*must be"):
    call(params, state, x, frame_wise=True)
  with pytest.raises(ValueError, match=r"seq_lengths are float64 .*\(6,\)"):
    call(params, state, x, seq_lengths=np.ones(BATCH))
  with pytest.raises(ValueError, match="pass state"):
    input_norm.sequence_norm(x, use_running_average=True, frame_wise=True)
  with pytest.raises(TypeError, match="a mask is boolean"):
    input_norm.sequence_norm(x, use_running_average=False, mask=np.ones((BATCH, TIME)))
