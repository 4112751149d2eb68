"""One step of training, one of evaluation, and how both are spread over devices.

`train_step` and `eval_step` are functions of (state, batch) that know the devices only as
an optional axis name: `pmap_step` gives them one; another builder could give them another.
Randomness and input are those of the global batch, gradients and statistics are averaged
over it, so the numbers do not depend on how many devices share the work.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from examples.models import Network

AXIS = "batch"


class TrainState(NamedTuple):
  """Everything that a step changes: the checkpoint is this and the input's position."""

  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any


class Sums(NamedTuple):
  """Sums over examples. They add up exactly over batches and devices; means do not."""

  loss: Any
  correct: Any
  count: Any


def init_state(
  model: Network, optimizer: optax.GradientTransformation, seed: int, image_shape: Sequence[int]
) -> TrainState:
  """The state at step 0, from the seed alone; `image_shape` is (H, W, C)."""

  def init(key: jax.Array) -> TrainState:
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    params = variables["params"]
    return TrainState(
      jnp.int32(0), params, variables.get("batch_stats", {}), optimizer.init(params)
    )

  # It runs once: optimizing it would take seconds and save none.
  quick = {"xla_backend_optimization_level": 0}
  return jax.jit(init, compiler_options=quick)(jax.random.key(seed))


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  model: Network,
  optimizer: optax.GradientTransformation,
  label_smoothing: float = 0.0,
  axis_name: str | None = None,
) -> tuple[TrainState, Sums]:
  """One optimizer step.

  Args:
    state: the state, the same on every device.
    batch: this device's share of it: "image" (b, H, W, C) float32, "label" (b,) int32.
    model: built with the same `axis_name`.
    optimizer: the gradient transformation that `state.opt_state` belongs to.
    label_smoothing: share of the target that is spread evenly over the classes.
    axis_name: the axis of the devices, which must hold equal shares; None for one device.

  Returns:
    The next state, and the sums over the global batch.
  """

  def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, updated = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
    targets = jax.nn.one_hot(batch["label"], model.classes)
    targets = optax.smooth_labels(targets, label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    return losses.mean(), (losses, logits, updated.get("batch_stats", {}))

  grads, (losses, logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  if axis_name is not None:
    grads = lax.pmean(grads, axis_name)  # equal shares: the mean of means is the mean
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  sums = _sums(losses, logits, batch["label"], jnp.ones_like(losses, bool), axis_name)
  return TrainState(state.step + 1, params, batch_stats, opt_state), sums


def eval_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  model: Network,
  axis_name: str | None = None,
) -> Sums:
  """The sums over the examples of the global batch whose "mask" (b,) is true.

  Normalizes with the running statistics, so an example's result depends on that example alone.
  """
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  logits: Any = model.apply(variables, batch["image"], train=False)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
  return _sums(losses, logits, batch["label"], batch["mask"], axis_name)


def _sums(
  losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array, axis_name: str | None
) -> Sums:
  sums = Sums(
    loss=jnp.sum(losses, where=mask),
    correct=jnp.sum(logits.argmax(-1) == labels, where=mask, dtype=jnp.int32),
    count=jnp.sum(mask, dtype=jnp.int32),
  )
  return sums if axis_name is None else lax.psum(sums, axis_name)


def pmap_step(
  body: Callable[..., Any], devices: Sequence[jax.Device], *, donate_state: bool = False
) -> Callable[..., Any]:
  """`body(state, batch, axis_name=...)` on every device, compiled once.

  Takes what `replicate` and `shard` give. A donated state's memory becomes the new state's.
  """
  return jax.pmap(
    functools.partial(body, axis_name=AXIS),
    axis_name=AXIS,
    devices=devices,
    donate_argnums=(0,) if donate_state else (),
  )


def _sharding(devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
  """The placement that pmap's results have: anything else would be copied, or compiled, anew."""
  return jax.NamedSharding(jax.sharding.Mesh(np.array(devices), (AXIS,)), jax.P(AXIS))


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
  """Gives each device a copy: leaves of shape (...) become (devices, ...)."""
  copies = jax.tree.map(
    lambda x: np.broadcast_to(np.asarray(x), (len(devices), *np.shape(x))), tree
  )
  return jax.device_put(copies, _sharding(devices))


def shard(batch: Any, devices: Sequence[jax.Device]) -> Any:
  """Deals the examples out: leaves of shape (B, ...) become (devices, B/devices, ...)."""
  n = len(devices)
  parts = jax.tree.map(lambda x: x.reshape(n, len(x) // n, *x.shape[1:]), batch)
  return jax.device_put(parts, _sharding(devices))


def unreplicate(tree: Any) -> Any:
  """The first device's copy, on the host; waits for it.

  A real copy: the memory of a donated state is overwritten by the next step.
  """
  return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data[0]), tree)


def evaluate(
  step: Callable[..., Sums],
  state: TrainState,
  batches: Iterable[Any],
  devices: Sequence[jax.Device],
) -> tuple[float, float, int]:
  """Loss, accuracy and number of examples over all of `batches`, whatever their size."""
  total = Sums(0.0, 0, 0)
  waiting: list[Sums] = []
  for batch in batches:
    waiting.append(step(state, shard(batch, devices)))
    if len(waiting) > 1:  # let the host prepare one batch while the devices work on another
      total = add(total, waiting.pop(0))
  for sums in waiting:
    total = add(total, sums)
  return total.loss / total.count, total.correct / total.count, total.count


def add(total: Sums, sums: Sums) -> Sums:
  """Adds a step's sums on the host, in double precision and whole numbers; waits for them."""
  loss, correct, count = unreplicate(sums)
  return Sums(total.loss + float(loss), total.correct + int(correct), total.count + int(count))
