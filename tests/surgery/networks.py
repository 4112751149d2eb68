"""Networks that trained networks look like: what is found, replaced and measured in them is known.

Tiny: two or three channels, products instead of convolutions. Each takes x of shape (N, 3) and
`train`. `norms` are the paths of their batch norms in the order of their calls.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn.surgery import Foreign

WIDTH = 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(1, 2, (8, WIDTH)), jnp.float32)
STATS = {"params": 0, "batch_stats": 0}


def randomly(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
  """An initializer that says something, without the compilation that jax.random takes."""
  values = np.random.default_rng(sum(shape)).normal(0.3, 1, shape)
  return jnp.asarray(values, dtype)


def dense(width: int = WIDTH) -> nn.Dense:
  return nn.Dense(width, kernel_init=randomly)


def norm(train: bool, **options: Any) -> nn.BatchNorm:
  options = {"scale_init": randomly, "bias_init": randomly, "momentum": 0.9, **options}
  return nn.BatchNorm(use_running_average=not train, **options)


class PreActivation(nn.Module):
  """Norm, ReLU, product; and a sum."""

  @nn.compact
  def __call__(self, x, train=True):
    return x + dense()(nn.relu(norm(train)(x)))


class Concatenated(nn.Module):
  """As in a DenseNet: each norm is of all that was made before."""

  @nn.compact
  def __call__(self, x, train=True):
    for _ in range(2):
      x = jnp.concatenate([x, dense(2)(nn.relu(norm(train)(x)))], -1)
    return x


class CalledTwice(nn.Module):
  def setup(self):
    self.dense, self.norm = dense(), nn.BatchNorm(scale_init=randomly, momentum=0.9)

  def __call__(self, x, train=True):
    for _ in range(2):
      x = self.norm(self.dense(x), use_running_average=not train)
    return x

  def features(self, x, train=True):
    return self.norm(self.dense(x), use_running_average=not train)


class Bare(nn.Module):
  """Without scale, without bias, with a layer on another axis."""

  @nn.compact
  def __call__(self, x, train=True):
    x = norm(train, use_scale=False)(dense()(x))
    x = norm(train, use_bias=False, epsilon=1e-3)(x)
    return norm(train, use_scale=False, use_bias=False, axis=1)(x[:, :, None])[..., 0]


class _Step(nn.Module):
  train: bool

  @nn.compact
  def __call__(self, x, _):
    return nn.relu(norm(self.train)(dense()(x))), None


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    layers = nn.scan(_Step, variable_axes=STATS, split_rngs={"params": True}, length=3)
    return layers(train)(x, None)[0]


class Rematerialized(nn.Module):
  """A layer as such, and one within a block."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.remat(nn.BatchNorm)(use_running_average=not train, momentum=0.9)(dense()(x))
    return nn.remat(_Step)(train)(x, None)[0]


class Vmapped(nn.Module):
  """Two members of an ensemble, each with statistics of its own."""

  @nn.compact
  def __call__(self, x, train=True):
    members = nn.vmap(_Step, variable_axes=STATS, split_rngs={"params": True}, axis_size=2)
    return members(train)(jnp.stack([x, 2 * x]), None)[0].sum(0)


class Own(nn.BatchNorm):
  """A subclass that is called in another way."""

  @nn.compact
  def __call__(self, x, train):
    return super().__call__(x, use_running_average=not train)


class Derived(nn.Module):
  """With a class for an argument, by default a partial one: what a monkeypatch misses."""

  norm: Any = Own

  @nn.compact
  def __call__(self, x, train=True):
    return self.norm(momentum=0.9)(dense()(x), train)


class ByMutability(nn.Module):
  """It trains where batch_stats may change."""

  @nn.compact
  def __call__(self, x, train=None):
    train = self.is_mutable_collection("batch_stats") and not self.is_initializing()
    x = norm(train)(dense()(x))
    return nn.Dropout(0.5, deterministic=not train)(x)


class Case(NamedTuple):
  model: nn.Module
  norms: tuple[str, ...]


LINEN = {
  "pre-activation": Case(PreActivation(), ("BatchNorm_0",)),
  "concatenated": Case(Concatenated(), ("BatchNorm_0", "BatchNorm_1")),
  "called twice": Case(CalledTwice(), ("norm",)),
  "bare": Case(Bare(), ("BatchNorm_0", "BatchNorm_1", "BatchNorm_2")),
  "scan": Case(Scanned(), ("Scan_Step_0/BatchNorm_0",)),
  "remat": Case(Rematerialized(), ("CheckpointBatchNorm_0", "Checkpoint_Step_0/BatchNorm_0")),
  "vmap": Case(Vmapped(), ("Vmap_Step_0/BatchNorm_0",)),
  "derived": Case(Derived(), ("Own_0",)),
}


class Everything(nn.Module):
  """One after the other, but those in which a layer is called twice."""

  @nn.compact
  def __call__(self, x, train=True):
    for name in ("pre-activation", "bare", "scan", "remat", "vmap", "derived", "concatenated"):
      x = type(LINEN[name].model)(name=name)(x, train=train)
    return x


def in_double_precision(tree: Any) -> Any:
  """The same variables; within jax.enable_x64."""

  def double(a):
    return jnp.asarray(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a

  return jax.tree.map(double, tree)


class NnxBlock(nnx.Module):
  def __init__(self, rngs, **options):
    options = {"scale_init": randomly, "bias_init": randomly, "momentum": 0.9, **options}
    self.dense = nnx.Linear(WIDTH, WIDTH, kernel_init=randomly, rngs=rngs)
    self.norm = nnx.BatchNorm(WIDTH, rngs=rngs, **options)

  def __call__(self, x):
    return nnx.relu(self.norm(self.dense(x)))


class NnxOwn(nnx.BatchNorm):
  """A subclass that does something more."""

  def __call__(self, x, *args, **kwargs):
    return 2 * super().__call__(x, *args, **kwargs)


class NnxNetwork(nnx.Module):
  """Layers in lists and dicts, one in two places, a subclass, and a scan over three blocks."""

  def __init__(self, rngs):
    self.blocks = nnx.List([NnxBlock(rngs), NnxBlock(rngs, use_scale=False)])
    self.named = nnx.Dict(own=NnxOwn(WIDTH, momentum=0.9, rngs=rngs), shared=self.blocks[0].norm)
    make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
    self.scanned = nnx.split_rngs(splits=3)(make)(rngs)
    self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    x = self.named["own"](self.named["shared"](x))
    axes = nnx.StateAxes({(nnx.Param, nnx.BatchStat): 0, ...: None})
    step = nnx.scan(lambda block, x: block(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
    return self.dropout(step(self.scanned, x))


NNX_NORMS = ("blocks/0/norm", "blocks/1/norm", "named/own", "scanned/norm")


def nnx_network() -> NnxNetwork:
  return NnxNetwork(nnx.Rngs(0))


def init(model: nn.Module, x: Any = X) -> Any:
  """Variables whose statistics were updated."""
  variables = model.init(jax.random.key(0), x, train=True)
  stats = {
    "mean": lambda s: jnp.linspace(-0.5, 0.5, s.size).reshape(s.shape),
    "var": lambda s: jnp.linspace(0.5, 2, s.size).reshape(s.shape),
  }
  trained = jax.tree_util.tree_map_with_path(
    lambda path, s: stats.get(path[-1].key, lambda s: s)(s), variables["batch_stats"]
  )
  return {**variables, "batch_stats": trained}


class Theirs(nn.Module):
  """A batch norm of somebody's own: other names, shapes and conventions, and a pair returned."""

  eps: float = 1e-3
  decay: float = 0.8

  @nn.compact
  def __call__(self, x, mask, train=False):
    channels = x.shape[-1]
    mean = self.variable("batch_stats", "moving_mean", jnp.zeros, (1, 1, 1, channels))
    var = self.variable("batch_stats", "moving_var", jnp.ones, (1, 1, 1, channels))
    gamma = self.param("gamma", randomly, (channels,))  # less 1
    beta = self.param("beta", randomly, (channels,))
    used_mean, used_var = mean.value, var.value
    if train and not self.is_initializing():
      used_mean = x.mean((0, 1, 2), where=mask, keepdims=True)
      used_var = x.var((0, 1, 2), where=mask, keepdims=True)
      mean.value = self.decay * mean.value + (1 - self.decay) * used_mean
      var.value = self.decay * var.value + (1 - self.decay) * used_var
    return (x - used_mean) / jnp.sqrt(used_var + self.eps) * (1 + gamma) + beta, {}


THEIRS = Foreign(
  training="train",
  options={"epsilon": "eps", "momentum": "decay"},
  variables={"mean": "moving_mean", "var": "moving_var", "scale": "gamma", "bias": "beta"},
  scale_offset=1.0,
  mask="mask",
  returns=lambda y: (y, {}),
)


class WithTheirs(nn.Module):
  """Half of the batch does not exist."""

  norm: Any = Theirs

  @nn.compact
  def __call__(self, x, train=True):
    mask = (jnp.arange(len(x)) < len(x) // 2)[:, None, None, None]
    y, _ = self.norm()(dense()(x)[:, None, None], mask, train)
    return y[:, 0, 0]


class NnxTheirs(nnx.Module):
  """Likewise in NNX: PyTorch's momentum, and a field that says the mode."""

  def __init__(self, channels, rngs):
    self.running_mean = nnx.BatchStat(jnp.linspace(-1.0, 1, channels))
    self.running_var = nnx.BatchStat(jnp.linspace(0.5, 1, channels))
    self.weight = nnx.Param(randomly(rngs.params(), (channels,)))
    self.momentum = 0.1
    self.training = True

  def __call__(self, x):
    mean, var = self.running_mean[...], self.running_var[...]
    if self.training:
      mean, var = x.mean(0), x.var(0)
      for running, batch in ((self.running_mean, mean), (self.running_var, var)):
        running[...] = (1 - self.momentum) * running[...] + self.momentum * batch
    return (x - mean) / jnp.sqrt(var + 1e-5) * self.weight[...]


NNX_THEIRS = Foreign(
  training="training",
  options={"momentum": lambda layer: 1 - layer.momentum},
  variables={"mean": "running_mean", "var": "running_var", "scale": "weight"},
)


def nnx_with_theirs():
  rngs = nnx.Rngs(0)
  return nnx.Sequential(
    nnx.Linear(WIDTH, WIDTH, kernel_init=randomly, rngs=rngs), NnxTheirs(3, rngs)
  )


def snapshot(model: Any) -> Any:
  """Parameters and statistics as they are now; nnx.state would change with the model."""
  state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
  return jax.tree.map(np.array, nnx.to_pure_dict(state))
