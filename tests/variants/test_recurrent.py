"""Recurrent batch normalization, against float64 NumPy and against plain JAX differentiated."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.variants import recurrent
from tests.variants import oracle_recurrent as oracle
from tests.variants import table
from tests.variants.table import double_precision  # noqa: F401

BATCH, TIME, UNITS = 6, 4, 3
KINDS = ["lstm", "gru"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LENGTHS = np.array([4, 2, 3, 1, 4, 4])
THERE = np.arange(TIME)[:, None] < LENGTHS  # time, batch
GAPS = THERE & (np.arange(TIME)[:, None] != [1, 2, 2, 2, 0, 1])  # from which examples come back
PARAMS, STEP, STATS, CARRY = (
  {kind: getattr(recurrent, name.format(kind.upper(), kind)) for kind in KINDS}
  for name in ("{0}Params", "{1}_step", "{1}_stats", "{1}_carry")
)


def parameters(kind, features=UNITS):
  gates = {"lstm": 4, "gru": 3}[kind] * UNITS
  shapes = [(features, gates), (UNITS, gates), *[(gates,)] * 3, *[(UNITS,)] * 2]
  rng = np.random.default_rng(0)
  made = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
  return PARAMS[kind](*made[: len(PARAMS[kind]._fields)])


def data(features=UNITS, steps=TIME):
  return jnp.asarray(np.random.default_rng(1).normal(0.5, 2, (steps, BATCH, features)))


def statistics(kind, max_length=TIME):
  """Rows that are not those at the start."""
  rng = np.random.default_rng(2)
  start = STATS[kind](UNITS, max_length)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape)), start)


def rows_of(stats):
  return {
    name: list(zip(np.asarray(rows.mean), np.asarray(rows.var), strict=True))
    for name, rows in stats._asdict().items()
  }


def stats_of(kind, rows):
  fields = {
    name: jaxbn.RunningStats(*(np.stack(leaf) for leaf in zip(*r, strict=True)))
    for name, r in rows.items()
  }
  return type(STATS[kind](1, 1))(**fields)


def scanned(kind, params, stats, x, carry=None, masks=None, **options):
  """The whole recurrence of x (time, batch, features): outputs and statistics."""
  if carry is None:
    carry = CARRY[kind](x.shape[1:-1], UNITS, dtype=x.dtype)
  options = {"momentum": 0.9, **options}

  def step(state, x_and_mask):
    carry, stats = state
    x, mask = x_and_mask
    carry, y, stats = STEP[kind](params, stats, carry, x, mask=mask, **options)
    return (carry, stats), y

  (carry, stats), ys = jax.lax.scan(step, (carry, stats), (x, masks))
  return ys, stats, carry


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize(("masked", "max_length"), [("all", TIME), ("lengths", 2), ("mask", TIME)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_recurrence_is_the_oracle_s(kind, masked, mode, max_length):
  params, stats, x = parameters(kind, 2), statistics(kind, max_length), data(2)
  there = {"all": None, "lengths": THERE, "mask": GAPS}[masked]
  running = mode == "evaluation"
  dirty = x if there is None else jnp.where(there[..., None], x, jnp.nan)
  lengths = LENGTHS if masked == "lengths" else None
  carry = CARRY[kind](BATCH, UNITS, lengths, x.dtype)
  masks = GAPS if masked == "mask" else None
  run = jax.jit(lambda *a: scanned(kind, *a, carry, masks, use_running_average=running))
  ys, after, _ = run(params, stats, dirty)
  expected, rows = oracle.run(
    kind, params._asdict(), np.asarray(x), there=there, running=running, rows=rows_of(stats)
  )
  np.testing.assert_allclose(ys, expected, **CLOSE)
  chex.assert_trees_all_close(after, stats_of(kind, rows), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_near_the_oracle(kind):
  params, stats, x = parameters(kind), statistics(kind), data()
  expected, _ = oracle.run(kind, params._asdict(), np.asarray(x), rows=rows_of(stats))
  ys, _, carry = scanned(
    kind, *jax.tree.map(jnp.float32, (params, stats, x)), use_running_average=False
  )
  assert ys.dtype == carry.h.dtype == jnp.float32
  # The first step divides rounding errors by sqrt(epsilon) at most: 316 units; then four steps, in
  # each of which a normalization of six examples may amplify by a few.
  np.testing.assert_allclose(ys, expected, rtol=0, atol=316 * 64 * np.finfo(np.float32).eps)


def flat(kind):
  """The arguments of the transformations' table: x, of two steps, batch first, and parameters."""
  return (jnp.swapaxes(data()[:2], 0, 1), *parameters(kind))


def ours(kind, axis_name=None, *, lengths=None):
  def f(x, *leaves):
    params = PARAMS[kind](*leaves)
    # Where the parameters are, on a mesh or not.
    stats = jax.tree.map(lambda leaf: leaf + 0 * params.bias[0], statistics(kind))
    # As a shard has it: from x, for what a scan carries must vary over devices from the start.
    zeros = x[:, 0] * 0
    carry = CARRY[kind](len(x), UNITS, lengths, x.dtype)
    carry = carry._replace(**{name: zeros for name in ("c", "h") if hasattr(carry, name)})
    options = {"use_running_average": False, "axis_name": axis_name}
    return jnp.swapaxes(
      scanned(kind, params, stats, jnp.swapaxes(x, 0, 1), carry, **options)[0], 0, 1
    )

  return f


def plain(kind, lengths=None):
  """The equations in JAX, unrolled, for JAX to differentiate."""

  def f(x, *leaves):
    there = None if lengths is None else np.arange(x.shape[1])[:, None] < lengths
    params = PARAMS[kind](*leaves)._asdict()
    ys, _ = oracle.run(kind, params, jnp.swapaxes(x, 0, 1), there=there, xp=jnp)
    return jnp.swapaxes(ys, 0, 1)

  return f


# The smaller program compiles sooner. What the steps' parts do under the rest is tested with them.
TRANSFORMS = {
  "gru": ("jit", "vmap over x", "scan", "jvp", "jvp of grad", "grad of grad", "hessian"),
  "lstm": ("grad", "vmap of grad", "grad of scan"),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transformations(kind):
  given = ours(kind), plain(kind), flat(kind)
  table.compare_all(*given, rtol=1e-7, transforms=TRANSFORMS[kind])


# Where no mesh is set, JAX differentiates no product with a kernel in a scan on an explicit one.
@pytest.mark.parametrize(
  ("kind", "devices"), [("lstm", "shard_map"), ("gru", "pmap"), ("gru", "jit explicit, mesh set")]
)
def test_devices(kind, devices):
  table.compare_on_devices(devices, lambda n: ours(kind, n), plain(kind), flat(kind), rtol=1e-7)


def test_gradients_through_time_with_padding():
  kind = "lstm"
  x, *params = flat(kind)
  lengths = np.array([2, 1, 2, 1, 2, 2])
  there = (np.arange(2) < lengths[:, None])[..., None]

  def gradient(f, x):
    # Where padding is, y is the last there was.
    return jax.jit(jax.grad(table.loss(f), range(1 + len(params))))(x, *params)

  ours_, expected = (
    gradient(ours(kind, lengths=lengths), jnp.where(there, x, jnp.nan)),
    gradient(plain(kind, lengths), x),
  )
  chex.assert_trees_all_close(ours_, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["gru"])
def test_devices_with_different_lengths_count_every_step_that_exists(kind):
  """Statistics, too; a device whose examples have all ended has no say."""
  params, stats, x = parameters(kind), statistics(kind), data()
  lengths = np.array([4, 2, 3, 1, 1, 1])
  carry = CARRY[kind](BATCH, UNITS, lengths, x.dtype)
  options = {"use_running_average": False}
  run = jax.jit(lambda x: scanned(kind, params, stats, x, carry, **options)[:2])
  ys, after = run(x)

  def shard(x, carry):
    return scanned(kind, params, stats, x, carry, axis_name="b", **options)[:2]

  shards = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), carry)
  x = jnp.moveaxis(x.reshape(TIME, 2, 3, UNITS), 1, 0)
  shard_ys, shard_after = jax.jit(jax.vmap(shard, axis_name="b"))(x, shards)
  shard_ys = jnp.moveaxis(shard_ys, 0, 1).reshape(ys.shape)
  np.testing.assert_allclose(shard_ys, ys, **CLOSE)
  for device in range(2):
    mine = jax.tree.map(lambda leaf: leaf[device], shard_after)  # noqa: B023
    chex.assert_trees_all_close(mine, after, **CLOSE)


def test_examples_may_be_a_named_axis_of_vmap():
  kind = "gru"
  params, stats, x = parameters(kind), statistics(kind), data()[0]
  options = {"use_running_average": False, "momentum": 0.9}

  def example(x):
    carry = CARRY[kind]((), UNITS, dtype=x.dtype)
    return STEP[kind](params, stats, carry, x, axis_name="examples", **options)[1:]

  def batch(x):
    carry = CARRY[kind](BATCH, UNITS, dtype=x.dtype)
    return STEP[kind](params, stats, carry, x, **options)[1:]

  y, after = jax.jit(jax.vmap(example, axis_name="examples"))(x)
  expected, expected_after = jax.jit(batch)(x)
  np.testing.assert_allclose(y, expected, **CLOSE)
  chex.assert_trees_all_close(jax.tree.map(lambda a: a[3], after), expected_after, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_shares_by_few_reductions(kind):
  params, stats, x = parameters(kind), statistics(kind), data()[0]

  def step(x):
    carry = CARRY[kind](len(x), UNITS, dtype=x.dtype)
    options = {"use_running_average": False, "axis_name": "b"}
    return STEP[kind](params, stats, carry, x, **options)[1]

  # Not of vmap, which makes sums of most of them.
  jaxpr = jax.make_jaxpr(jax.pmap(step, axis_name="b"))(x.reshape(2, BATCH // 2, UNITS))
  assert count("psum", jaxpr) == {"lstm": 2, "gru": 1}[kind]


def count(primitive, jaxpr):
  """How often it is run. (What is called twice is printed once.)"""
  equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
  inner = jax.tree.leaves([list(e.params.values()) for e in equations])
  calls = [p for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns")]
  here = sum(e.primitive.name == primitive for e in equations)
  return here + sum(count(primitive, call) for call in calls)


def test_a_step_is_traced_once():
  table.assert_traced_once(ours("gru"), flat("gru"))


def test_running_statistics_are_no_path_for_gradients_in_training():
  params, x = parameters("lstm"), data()

  def loss(stats):
    ys, after, _ = scanned("lstm", params, stats, x, use_running_average=False)
    return jnp.sum(ys**2) + sum(map(jnp.sum, jax.tree.leaves(after)))

  for leaf in jax.tree.leaves(jax.grad(loss)(statistics("lstm"))):
    np.testing.assert_array_equal(leaf, 0)


def test_the_last_row_serves_longer_sequences_in_evaluation():
  params, x = parameters("lstm"), data(steps=6)
  short = statistics("lstm", 3)
  long = jax.tree.map(lambda leaf: jnp.concatenate([leaf, *[leaf[-1:]] * 3]), short)
  a, b = (scanned("lstm", params, stats, x, use_running_average=True)[0] for stats in (short, long))
  np.testing.assert_array_equal(a, b)


def test_debias_and_a_cumulative_average_are_each_row_s_own():
  x = data()
  params = parameters("gru")
  for options in ({"debias": True}, {"momentum": None}):
    start = recurrent.gru_stats(UNITS, 6, **options)
    start = jax.tree.map(lambda s: s.astype(float) if s.dtype == jnp.float32 else s, start)
    _, after, _ = scanned("gru", params, start, x, use_running_average=False, **options)
    counts = np.asarray(after.hidden.count)
    np.testing.assert_array_equal(counts[:, 0], [1, 1, 1, 1, 0, 0])
    y, _, _ = scanned("gru", params, after, x, use_running_average=True, **options)
    expected, *_ = scanned("gru", params, start, x, use_running_average=False, **options)
    np.testing.assert_allclose(y, expected, **CLOSE)  # after one batch the two are the same


def _step(**changes):
  """One LSTM step with something wrong."""
  given = {
    "params": parameters("lstm"),
    "stats": statistics("lstm"),
    "carry": recurrent.lstm_carry(BATCH, UNITS),
    "x": data()[0],
    "use_running_average": False,
  } | changes
  positional = [given.pop(name) for name in ("params", "stats", "carry", "x")]
  return recurrent.lstm_step(*positional, **given)


@pytest.mark.parametrize(
  ("changes", "error", "says"),
  [
    ({"x": np.ones((TIME, BATCH, UNITS))}, ValueError, "x is the input of one time step"),
    ({"x": np.ones((BATCH, 7))}, ValueError, r"params.input_kernel has shape \(3, 12\).*\(7, 12\)"),
    ({"x": np.ones((BATCH, UNITS), int)}, TypeError, "x has dtype int64.*astype"),
    ({"stats": recurrent.lstm_stats(5, 2)}, ValueError, r"stats.input.mean has shape \(2, 20\)"),
    ({"stats": recurrent.gru_stats(3, 2)}, TypeError, "stats is a GRUStats.*LSTMStats"),
    ({"mask": np.ones(BATCH)}, TypeError, "a mask is boolean"),
    ({"mask": np.ones((BATCH, 2), bool)}, ValueError, "does not broadcast"),
    ({"use_running_average": np.ones(())}, TypeError, "a Python bool is needed"),
    ({"axis_name": "b"}, ValueError, "axis_name='b' is not bound"),
    ({"momentum": 2.0}, ValueError, "momentum=2.0 is out of range"),
    ({"debias": True}, ValueError, "state.count is None"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors(changes, error, says):
  with pytest.raises(error, match=says):
    _step(**changes)


def test_errors_of_what_is_made():
  with pytest.raises(ValueError, match="max_length=0"):
    recurrent.lstm_stats(3, 0)
  with pytest.raises(ValueError, match=r"seq_lengths are int\d+ of shape \(2,\).*\(3,\)"):
    recurrent.gru_carry(3, 4, np.array([1, 2]))
