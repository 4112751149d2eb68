r"""Random options, dtypes, devices and modes of `jaxbn.batch_norm`, against the equations.

  python -m tests.fuzz --minutes=5 --seed=1

Hypothesis draws a `Case`; what is random within it follows from its `seed`. y, the new state, all
first derivatives of a random function of them, and all second ones along a random direction, are
compared with tests/textbook.py in float64. How far they may lie from it is what tests/rounding.py
derives of the textbook's own program, with moments around a pivot as far away as jaxbn's can be,

  of the mean: 2 max |x - mean|, more than any convex combination of elements, or 0 within two
  deviations of the mean, is away; and that of the running mean, where devices share around it,

and with x off by u |x|, as it is from a mean that is stored, or where x k and mean k are
subtracted; twice that, since in another order, on several devices, an element may be rounded as
often again; and the rounding of the result's dtype. A case in which that is of the order of the
variance, in which ReLU's kink lies within it, or which float16 cannot hold, decides nothing and is
drawn again.
"""

import argparse
import dataclasses
import functools
import time
import traceback

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import tests.conftest  # noqa: F401, for eight devices
from tests import bounds, oracle, rounding, textbook

# Eight examples each, along the first axis that is no channel's: what compiles once is found again.
SHAPES = [
  ((8, 3), (1,)),
  ((8,), ()),
  ((3, 8), (0,)),
  ((8, 2, 3), (-1,)),
  ((8, 3, 2), (1,)),
  ((2, 8, 3), (0, 2)),
  ((8, 2, 2, 3), (3,)),
  ((8, 3, 2, 2), (-1, 1)),
]
NAMED = ["vmap", "pmap", "shard_map", "shard_map unchecked"]
SHARDED = {"sharded": AxisType.Auto, "sharded explicit": AxisType.Explicit}
RATIOS = {"bfloat16": 8, "float16": 30, "float32": 1e3, "complex64": 1e3, "float64": 1e5}
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class Case:
  """One draw; the defaults are the plainest."""

  shape: tuple[int, ...] = (8, 3)
  axis: tuple[int, ...] = (1,)
  dtype: str = "float32"
  seed: int = 0
  mode: str = "eager"
  devices: int = 1
  ratio: float = 0.0  # mean / std of the data
  std: float = 1.0
  parameters: str = "float32"  # their dtype
  scale: str | None = None  # channels, examples, all
  bias: str | None = None
  mask: str | None = None  # all, examples, positions, device (the first has nothing)
  weights: str | None = None  # all, examples, counts
  garbage: bool = False  # NaN and infinity where x and residual are masked
  poison: float | None = None  # an element of the first channel that exists
  residual: bool = False
  activation: str | None = None
  state: str | None = None  # fresh, near
  momentum: float | None = 0.9
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False
  use_fast_variance: bool = True
  detach_stats: bool = False
  virtual_batch_size: int | str | None = None
  choose: str | None = None
  training: bool = True
  masked_value: float | None = None
  epsilon: float = 1e-5
  out: str | None = None  # dtype of y
  second: str | None = None  # derivative: forward or reverse over reverse

  def __repr__(self):
    """What is not the default."""
    fields = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
    return f"Case({', '.join(f'{name}={v!r}' for name, v, plain in fields if v != plain)})"

  def _repr_pretty_(self, printer, cycle):
    """For Hypothesis."""
    printer.text(repr(self))

  @property
  def features(self):
    return tuple(sorted(a % len(self.shape) for a in self.axis))

  @property
  def examples(self):
    """The axis of the examples."""
    return next(a for a in range(len(self.shape)) if a not in self.features)

  @property
  def per_channel(self):
    return tuple(self.shape[a] for a in self.features)

  @property
  def group(self):
    """How many examples share statistics."""
    size = 8 // self.devices if self.virtual_batch_size == "device" else self.virtual_batch_size
    return size or 8


@st.composite
def cases(draw):
  """Those that jaxbn accepts; what comes first is what Hypothesis minimizes to."""

  def one(*values):
    return draw(st.sampled_from(values))

  shape, axis = one(*SHAPES)
  dtype = one("float32", "float64", "bfloat16", "float16", "complex64")
  case = {"shape": shape, "axis": axis, "dtype": dtype, "seed": draw(st.integers(0, 999))}
  case["mode"] = mode = one("eager", "jit", *NAMED, *SHARDED)
  case["devices"] = devices = one(1, 2, 4) if mode in (*NAMED, *SHARDED) else 1
  half = dtype in ("bfloat16", "float16")
  of_parameters = ("float32", dtype) if half or dtype == "float64" else ("float32",)
  if mode in NAMED:  # devices add up gradients that have been rounded
    of_parameters = of_parameters[-1:] if dtype == "float64" else of_parameters[:1]
  case["parameters"] = one(*of_parameters)
  case["scale"], case["bias"] = (one(None, "channels", "examples", "all") for _ in range(2))
  case["mask"] = mask = one(None, "all", "examples", "positions", "device")
  case["weights"] = weights = one(None, "all", "examples", "counts")
  case["residual"] = one(False, True)
  real = ("relu", "tanh", "silu") if dtype != "complex64" else ()
  case["activation"] = one(None, *real, "held")
  if not half and dtype != "complex64":
    case["second"] = one(None, "forward", "reverse")
    case["out"] = one(None, None, "bfloat16")
  elif not half:
    case["second"] = one(None, "forward")
  else:
    case["out"] = one(None, "float32")
  case["ratio"] = one(*[r for r in (0.0, 1.0, -3.0, 8.0, 30.0, 1e3, 1e5) if r <= RATIOS[dtype]])
  case |= {"std": one(1.0, 0.1, 4.0), "epsilon": one(1e-5, 1e-3, 0.5)}
  case["training"] = training = one(True, True, True, False)
  case["state"] = state = one(None, "fresh", "near") if training else "near"
  if mask or weights:
    case |= {"garbage": one(False, True), "masked_value": one(None, 0.0, -1.5)}
  if training:
    case |= draw(training_options(state, 8 // devices, devices, mode))
  return Case(**case)


@st.composite
def training_options(draw, state, share, devices, mode):
  def one(*values):
    return draw(st.sampled_from(values))

  case = {"unbiased": one(False, True), "use_fast_variance": one(True, False)}
  case |= {"detach_stats": one(False, True), "skip_nonfinite": one(False, True)}
  case["poison"] = one(None, None, None, float("nan"), float("inf"))
  if state:
    case["momentum"] = momentum = one(0.9, None, 0.99, 0.0)
    case["debias"] = momentum is not None and one(False, True)
    case["choose"] = one(None, "halfway", "corrected")
  named = mode in NAMED
  within = [n for n in (2, 4, 8) if not named or n <= share]
  across = [share * n for n in (2, 4) if named and devices % n == 0]
  sizes = [*within, *across, *(["device"] if named else [])]
  case["virtual_batch_size"] = one(None, None, *sizes)
  return case


# What is random in a case


def eighths(rng, shape, dtype):
  """Numbers that every dtype holds, up to 2."""
  real, imag = rng.integers(-16, 17, (2, *shape)) / 8
  return np.asarray(real + 1j * imag if jnp.issubdtype(dtype, np.complexfloating) else real, dtype)


def arrays(case):
  """What is differentiated (params), what else broadcasts against x, and the state."""
  rng = np.random.default_rng(case.seed)
  shape, ndim, e = case.shape, len(case.shape), case.examples
  complex_ = case.dtype == "complex64"
  noise = rng.normal(size=(2, *shape))
  noise = noise[0] + 1j * noise[1] if complex_ else noise[0]
  x = case.std * (case.ratio * (1 + 0.1 * rng.random()) + noise * rng.uniform(0.5, 2, shape[-1]))
  by_example = tuple(shape[a] if a == e or a in case.features else 1 for a in range(ndim))
  shapes = {"channels": case.per_channel, "examples": by_example, "all": shape}
  params = {"x": x.astype(case.dtype)}
  for name in ("scale", "bias"):
    if getattr(case, name):
      params[name] = np.asarray(rng.normal(1, 0.5, shapes[getattr(case, name)]), case.parameters)
  if case.residual:
    params["residual"] = rng.normal(size=shape).astype(case.dtype)
  if case.activation == "held":
    held = tuple(n if a in case.features else 1 for a, n in enumerate(shape))
    params["held"] = rng.uniform(0.5, 1, held).astype(case.parameters)
  others = masks(case, rng, by_example)
  spoil(case, rng, params, others)
  return params, others, state_of(case)


def masks(case, rng, by_example):
  """The mask and the weights of a case, where it has them."""
  shape, e = case.shape, case.examples
  of_examples = tuple(n if a == e else 1 for a, n in enumerate(shape))
  shapes = {"all": shape, "device": shape, "examples": of_examples, "counts": by_example}
  shapes["positions"] = tuple(1 if a in case.features else n for a, n in enumerate(shape))
  others = {}
  if case.mask:
    others["mask"] = rng.random(shapes[case.mask]) < rng.choice([0.4, 0.8])
    if case.mask == "device":
      others["mask"][(slice(None),) * e + (slice(0, 8 // max(case.devices, 2)),)] = False
  if case.weights == "counts":
    others["weights"] = rng.integers(0, 4, shapes["counts"]).astype(np.int32)
  elif case.weights:
    weights = rng.uniform(0.1, 1, shapes[case.weights])
    others["weights"] = np.where(rng.random(weights.shape) < 0.2, 0, weights).astype(np.float32)
  return others


def spoil(case, rng, params, others):
  """NaN and infinity: where nothing exists, and, if asked for, in an element that does."""
  valid = oracle.weights_of(params["x"], others.get("mask"), others.get("weights")) > 0
  if case.garbage:
    for v in (params[name] for name in ("x", "residual") if name in params):
      v[~valid & (rng.random(valid.shape) < 0.5)] = rng.choice([np.nan, np.inf])
  if case.poison is not None:
    first = np.zeros(valid.shape, bool)
    first[tuple(0 if a in case.features else slice(None) for a in range(valid.ndim))] = True
    if len(there := np.argwhere(valid & first)):
      params["x"][tuple(there[0])] = case.poison


def state_of(case):
  if case.state is None:
    return None
  rng = np.random.default_rng(case.seed + 1)
  wide = np.float64 if case.dtype == "float64" else np.float32
  shape = case.per_channel
  mean, var = np.zeros(shape), np.ones(shape)
  if case.state == "near":
    mean = case.std * (case.ratio + rng.normal(size=shape))
    var = case.std**2 * rng.uniform(0.5, 2, shape)
  mean = np.asarray(mean, np.complex64 if case.dtype == "complex64" else wide)
  counted = case.momentum is None or case.debias
  updates = 0 if case.state == "fresh" else 3
  return jaxbn.RunningStats(
    mean, np.asarray(var, wide), np.full(shape, updates, np.float32) if counted else None
  )


def directions(case):
  """What each result counts in the function that is differentiated, and where second ones go."""
  rng = np.random.default_rng(case.seed + 2)
  wide = np.dtype(bounds.accumulator(case.dtype))
  weights = {"y": eighths(rng, case.shape, wide)}
  if case.state:
    weights |= {"mean": eighths(rng, case.per_channel, wide)}
    weights |= {"var": eighths(rng, case.per_channel, jnp.finfo(wide).dtype)}
  params, *_ = arrays(case)
  return weights, {k: eighths(rng, v.shape, v.dtype) for k, v in params.items()}


# jaxbn


def halfway(batch, state):
  return jaxbn.Chosen((batch.mean + state.mean) / 2, (batch.var + state.var) / 2)


def corrected(batch, state):
  r, d = 1 + state.var / 8, state.mean / 8
  return jaxbn.Chosen(*batch[1:], *(jnp.broadcast_to(v, batch.mean.shape) for v in (r, d)))


def local(case, split, replicated):
  """What batch_norm makes of all of x, or of what one device has."""
  given = {**split, **replicated}
  held, activation = given.pop("held", None), case.activation
  options = {
    "activation": ACTIVATIONS.get(activation) if activation else None,
    "axis": case.axis,
    "use_running_average": not case.training,
    "choose": {"halfway": halfway, "corrected": corrected, None: None}[case.choose],
    "dtype": case.out,
    "axis_name": "batch" if case.mode in NAMED else None,
  }
  if activation == "held":
    options["activation"] = lambda z: z + 0.25 * held * z * z
  for name in ("momentum", "debias", "unbiased", "skip_nonfinite", "use_fast_variance", "epsilon"):
    options[name] = getattr(case, name)
  for name in ("detach_stats", "virtual_batch_size", "masked_value"):
    options[name] = getattr(case, name)
  y, state = jaxbn.batch_norm(given.pop("x"), **given, **options)
  return y, None if state is None else {"mean": state.mean, "var": state.var}


def along_devices(case, v):
  """Whether an array is cut over the devices: it has the examples of x."""
  return np.ndim(v) == len(case.shape) and v.shape[case.examples] == 8


def whole(case):
  """(params, others, state) to y and the new mean and var, in the mode of the case."""
  e, mesh = case.examples, None
  one = functools.partial(local, case)
  if case.mode.startswith("shard_map"):
    mesh = jax.make_mesh((case.devices,), ("batch",), axis_types=(AxisType.Auto,))

  def cut(v):
    v = v.reshape(*v.shape[:e], case.devices, -1, *v.shape[e + 1 :])
    return jnp.moveaxis(v, e, 0)

  def together(split, replicated):
    if mesh is not None:
      over = P(*[None] * e, "batch")
      return jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(over, P()),
        out_specs=(over, P()),
        check_vma=case.mode == "shard_map",
      )(split, replicated)
    mapping = {"vmap": jax.vmap, "pmap": jax.pmap}[case.mode]
    mapped = mapping(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    y, state = mapped(jax.tree.map(cut, split), replicated)
    return jnp.moveaxis(y, 0, e).reshape(case.shape), state

  def run(params, others, state):
    given = params | others | ({} if state is None else {"state": state})
    if case.mode not in NAMED:
      return one(given, {})
    split = {k: v for k, v in given.items() if k != "state" and along_devices(case, v)}
    return together(split, {k: v for k, v in given.items() if k not in split})

  return run


def placed(case, tree):
  """Arrays as a user of sharded jit lays them out."""
  if case.mode not in SHARDED:
    return jax.tree.map(jnp.asarray, tree)
  mesh = jax.make_mesh((case.devices,), ("batch",), axis_types=(SHARDED[case.mode],))

  def place(v):
    spec = P(*[None] * case.examples, "batch") if along_devices(case, v) else P()
    return jax.device_put(v, NamedSharding(mesh, spec))

  return jax.tree.map(place, tree)


def derivatives(function, second, params, weights, direction):
  """What a function of params gives, and what its weighted sum has for derivatives.

  function(params) is a tree of arrays with y and, where there are some, the new mean and var, of
  which weights has what each counts.
  """

  def inner(a, b):
    return sum(jnp.sum((jnp.conj(a[k]) * b[k].astype(a[k].dtype)).real) for k in a)

  def loss(params):
    results = function(params)
    return inner(weights, results), results

  def first(params):
    gradients, results = jax.grad(loss, has_aux=True)(params)
    return results, gradients

  if second == "forward":
    return jax.jvp(first, (params,), (direction,))
  if second == "reverse":
    return first(params), jax.grad(lambda p: inner(direction, first(p)[1]))(params)
  return first(params)


def actual(case, params, others, state, weights, direction):
  """All results of jaxbn, in the mode of the case."""
  run = whole(case)

  def everything(params, others, state, weights, direction):
    def function(params):
      y, new_state = run(params, others, state)
      return {"y": y} | ({} if new_state is None else new_state)

    return derivatives(function, case.second, params, weights, direction)

  given = placed(case, (params, others, state, weights, direction))
  return (everything if case.mode == "eager" else jax.jit(everything))(*given)


# The textbook


def setting_of(case):
  return textbook.Setting(
    axes=case.features,
    examples=case.examples,
    groups=8 // case.group if case.training else 1,
    training=case.training,
    epsilon=case.epsilon,
    activation=case.activation,
    masked_value=case.masked_value,
    detach=case.detach_stats,
    choose=case.choose,
  )


def knowledge(case, params, others, state, u):
  """What the textbook is told of masks, weights and the state, and how far that is off."""
  setting, x, e = setting_of(case), params["x"], case.examples
  split = functools.partial(textbook.split, setting=setting)
  over = textbook.reduced(setting, x.ndim)
  w = split(oracle.weights_of(x, others.get("mask"), others.get("weights")))
  valid, count = w > 0, w.sum(over, keepdims=True)
  there = count > 0
  share = w / np.where(there, count, 1)
  finite = [split(np.isfinite(oracle.wide(params.get(k, x)))) for k in ("x", "residual")]
  groups = there.sum(e, keepdims=True)
  usable = groups > 0
  if case.skip_nonfinite:
    usable = usable & ~(valid & ~finite[0]).any((e, *over), keepdims=True)
  total = bounds.summing(w.size // count.size, u)
  factor, off_factor = unbiased(case, w, over, total, u)
  gain = gain_of(case, state)
  known = {
    **{"share": share, "valid": valid, "occupied": there, "factor": factor, "gain": gain},
    **{"kept": valid | finite[0], "residual_kept": valid | finite[1]},
    **{"of_group": there / np.maximum(groups, 1), "usable": usable.reshape(case.per_channel)},
    "mean": np.zeros(case.per_channel) if state is None else oracle.wide(state.mean),
    "var": np.zeros(case.per_channel) if state is None else oracle.wide(state.var),
  }
  off = {k: np.zeros(np.shape(v)) for k, v in known.items()}
  return known, off | {"share": (total + 2 * u) * share, "factor": off_factor, "gain": 4 * u * gain}


def unbiased(case, w, over, total, u):
  """n / (n - 1), where that is asked for, and its error: n is off by three sums and a few u."""
  n = w.sum(over, keepdims=True)
  if case.weights in ("all", "examples"):
    n = n**2 / np.maximum((w**2).sum(over, keepdims=True), 1e-9)
  less = np.where(several := n > 1.001, n - 1, 1)
  if not case.unbiased:
    several = np.zeros_like(several)
  return np.where(several, n / less, 1), np.where(several, (3 * total + 8 * u) * n / less**2, 0)


def gain_of(case, state):
  t = np.ones(case.per_channel)
  if state is not None and state.count is not None:
    t = t + state.count
  if case.momentum is None:
    return 1 / t
  return (1 - case.momentum) / (1 - case.momentum**t if case.debias else np.ones_like(t))


def pivot_of(case, x, known):
  """A value per channel and group that is as far from the mean as a pivot of jaxbn can be."""
  setting = setting_of(case)
  over = textbook.reduced(setting, x.ndim)
  wide = np.where(known["valid"], textbook.split(oracle.wide(x), setting), 0)
  mean = (known["share"] * wide).sum(over, keepdims=True)
  distance = np.where(known["valid"], 2 * np.abs(wide - mean), 0).max(over, keepdims=True)
  if case.state and case.dtype == "bfloat16":
    distance = distance + np.abs(mean)  # no pivot, on accelerators
  return mean + distance


def expected(case, params, others, state, weights, direction):
  """The results, each with a bound on what rounding does to it; and how well a variance is known.

  Raises:
    rounding.Undecided: rounding decides which side of a kink an element is on.
  """
  setting, u = setting_of(case), bounds.roundoff(jnp.finfo(bounds.accumulator(case.dtype)).dtype)
  known, off = knowledge(case, params, others, state, u)
  clean = {k: oracle.wide(v) for k, v in params.items()}
  for name, kept in (("x", "kept"), ("residual", "residual_kept")):
    if name in clean:
      clean[name] = np.where(known[kept].reshape(case.shape), clean[name], 0)
  off_params = {k: 0 * np.abs(v) for k, v in clean.items()} | {"x": u * np.abs(clean["x"])}
  weights, direction = jax.tree.map(oracle.wide, (weights, direction))
  nothing = jax.tree.map(lambda v: np.zeros(v.shape), (weights, direction))

  def results(pivot, params, known, weights, direction):
    def function(params):
      values = textbook.layer(setting, params, known, pivot)
      return {k: v for k, v in values.items() if k in weights}

    resolution = textbook.layer(setting, params, known, pivot)["resolution"]
    return derivatives(function, case.second, params, weights, direction), resolution

  def evaluate(pivot):
    given = clean, known, weights, direction
    errors = off_params, off, *nothing
    return rounding.evaluate(functools.partial(results, pivot), u, given, errors)

  def is_rounded(v):
    return isinstance(v, rounding.Rounded)

  bounded, resolution = evaluate(pivot_of(case, clean["x"], known) if case.training else None)
  values, _ = evaluate(None)
  values = jax.tree.map(lambda v: v.value, values, is_leaf=is_rounded)
  if case.second == "forward":  # at NaN nothing has a derivative
    values = values[0], jax.tree.map(lambda v, d: np.where(np.isfinite(v), d, np.nan), *values)
  errors = jax.tree.map(lambda v: v.error, bounded, is_leaf=is_rounded)
  relative = resolution.error / np.abs(resolution.value)
  return values, errors, np.max(relative, where=np.isfinite(relative), initial=0)


# The property

UNRESOLVED = 1 / 16  # terms of second order are then a sixteenth of those of first


def check(case):
  """Holds jaxbn to the textbook; the worst error in bounds, or None where nothing is decided."""
  given = (*arrays(case), *directions(case))
  with jax.enable_x64(case.dtype == "float64"), np.errstate(invalid="ignore"):
    try:
      values, errors, unresolved = expected(case, *given)
    except rounding.Undecided:
      return None
    if unresolved > UNRESOLVED or overflows(case, values):
      return None
    results = actual(case, *given)
  compared = functools.partial(compare, case.dtype == "float64")  # as rounded as the textbook is
  return max(jax.tree.leaves(jax.tree.map_with_path(compared, results, values, errors)))


def overflows(case, values):
  """Whether float16 cannot hold a result: y is then infinite, and in masked positions the mean."""
  largest = max(np.max(np.abs(v), where=np.isfinite(v), initial=0) for v in jax.tree.leaves(values))
  return case.dtype == "float16" and largest > float(jnp.finfo(jnp.float16).max) / 2


def compare(double, path, result, value, error):
  """The worst error in units of the bound, where the value is finite; fails beyond the bound."""
  known = np.isfinite(value)
  bound = (3 if double else 2) * error + bounds.rounding(value, result.dtype)
  off = np.abs(oracle.wide(result) - np.where(known, value, 0))
  ratio = np.where(known, off / np.where(known, bound, 1), 0)
  where = jax.tree_util.keystr(path)
  assert np.all(ratio <= 1), f"{where} is {np.max(ratio):.3g} bounds off:\n{result}\nnot\n{value}"
  return float(np.max(ratio, initial=0))


def holds(case):
  """What is to be true of every case."""
  worst = check(case)
  hypothesis.assume(worst is not None)
  tally.append(worst)


tally: list[float] = []  # of the draws that were compared


# make fuzz

ROUND = 50  # draws of one seed
PHASES = [hypothesis.Phase.generate, hypothesis.Phase.shrink]


def run_round(seed, draws):
  """Draws of one seed; those of an odd one compile as users do."""
  jax.clear_caches()
  jax.config.update("jax_disable_most_optimizations", seed % 2 == 0)
  tally.clear()
  settings = hypothesis.settings(
    max_examples=draws, phases=PHASES, derandomize=False, database=None, print_blob=False
  )
  hypothesis.seed(seed)(settings(hypothesis.given(cases())(holds)))()
  return len(tally), max(tally, default=0)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--minutes", type=float, default=5, help="no round begins later")
  parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
  parser.add_argument("--draws", type=int, default=ROUND, help="in a round")
  args = parser.parse_args()
  jax.config.update("jax_enable_compilation_cache", False)  # no program comes again
  start, total, seed = time.monotonic(), 0, args.seed
  print(f"jax {jax.__version__}, {args.draws} draws with each seed, from {seed} on", flush=True)
  while seed == args.seed or time.monotonic() - start < 60 * args.minutes:
    try:
      drawn, worst = run_round(seed, args.draws)
    except Exception as error:
      traceback.print_exception(error, limit=-2)
      again = f"--seed={seed} --draws={args.draws} --minutes=0"
      raise SystemExit(f"After {total} draws. The round again: make fuzz ARGS='{again}'") from None
    total, minutes = total + drawn, (time.monotonic() - start) / 60
    print(
      f"seed {seed}: {drawn} draws hold, the worst at {worst:.2f} of its bound; "
      f"{total} in {minutes:.1f} minutes",
      flush=True,
    )
    seed += 1


if __name__ == "__main__":
  main()
