"""One step of training, one of evaluation.

Both are functions of (state, batch) that know the devices only as an optional axis name, which
`examples.parallelism` gives them or not. Randomness and input are those of the global batch,
gradients and statistics are of all its valid examples, so the numbers do not depend on how many
devices share the work, nor how.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from examples import microbatches, optimizers
from examples.models import Network
from examples.parallelism import Parallelism


class TrainState(NamedTuple):
  """Everything that a step changes: the checkpoint is this and the input's position."""

  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any


class Sums(NamedTuple):
  """Sums over examples. They add up exactly over batches and devices; means do not.

  Of a step that was skipped, nothing but that is counted.
  """

  loss: Any
  correct: Any
  count: Any
  skipped: Any = 0  # steps


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
  accumulate: Callable[..., Any] = microbatches.whole,
  skip_nonfinite: int = 0,
  axis_name: str | None = None,
) -> tuple[TrainState, Sums]:
  """One optimizer step.

  Args:
    state: the state, the same on every device.
    batch: this device's share of it: "image" (b, H, W, C) float32, "label" (b,) int32, and
      "mask" (b,) bool where only some examples are valid: the others might as well not be there.
    model: built with the same `axis_name` (see `microbatches.axes` for accumulation).
    optimizer: the gradient transformation that `state.opt_state` belongs to.
    label_smoothing: share of the target that is spread evenly over the classes.
    accumulate: how the share is worked off; see `examples.microbatches`.
    skip_nonfinite: how many steps in a row the optimizer skips (see `examples.optimizers`): the
      running statistics then keep their last good values as well.
    axis_name: the axis of the devices, which must hold equal shares; None where the batch is whole.

  Returns:
    The next state, and the sums over the global batch.
  """
  count = batch["mask"].sum(dtype=jnp.int32) if "mask" in batch else len(batch["label"])
  valid = total(count, axis_name)  # of a known number this is known: nothing is sent
  # The loss is a mean over the global batch, of which this is the share that these examples add.
  weight = optimizers.loss_scale(state.opt_state) / jnp.maximum(valid, 1)

  def loss_fn(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, tuple[Sums, Any]]:
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, updated = model.apply(
      variables, batch["image"], train=True, mask=batch.get("mask"), mutable=["batch_stats"]
    )
    targets = jax.nn.one_hot(batch["label"], model.classes)
    targets = optax.smooth_labels(targets, label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    sums = _sums(losses, logits, batch)
    return sums.loss * weight, (sums, updated.get("batch_stats", {}))

  # Differentiated as this device's own: with respect to parameters that all share, shard_map would
  # add up the gradient of each layer and microbatch on its own, where once at the end is enough.
  params = own(state.params, axis_name)
  grads, (sums, batch_stats) = accumulate(loss_fn, params, batch)
  grads, sums = total((grads, sums), axis_name)  # (microbatches,) of sums and of batch_stats
  batch_stats = _mean_where(sums.count > 0, batch_stats)
  sums = jax.tree.map(lambda x: x.sum(0), sums)
  return _update(state, grads, batch_stats, sums, optimizer, skip_nonfinite)


def _update(
  state: TrainState,
  grads: Any,
  batch_stats: Any,
  sums: Sums,
  optimizer: optax.GradientTransformation,
  skip_nonfinite: int,
) -> tuple[TrainState, Sums]:
  """The optimizer's step; where it is skipped, all but counters stays as it was."""
  if skip_nonfinite:  # what the optimizer looks at has to speak for the rest
    good = _all_finite((sums.loss, batch_stats))
    grads = jax.tree.map(lambda g: jnp.where(good, g, jnp.nan), grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if skip_nonfinite:
    skipped = optimizers.skipped(opt_state, skip_nonfinite)
    old, nothing = (state.params, state.batch_stats), Sums(0.0, 0, 0, 1)
    params, batch_stats = _select(skipped, old, (params, batch_stats))
    sums = _select(skipped, nothing, sums)
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
  return total(_sums(losses, logits, batch), axis_name)


def own(tree: Any, axis_name: str | None) -> Any:
  """Values that all devices share, as this device's own."""
  return tree if axis_name is None else lax.pcast(tree, axis_name, to="varying")


def total(tree: Any, axis_name: str | None) -> Any:
  """The sum over the devices of what each has."""
  return tree if axis_name is None else lax.psum(tree, axis_name)


def _valid(batch: dict[str, jax.Array]) -> jax.Array:
  return batch["mask"] if "mask" in batch else jnp.ones_like(batch["label"], bool)


def _sums(losses: jax.Array, logits: jax.Array, batch: dict[str, jax.Array]) -> Sums:
  mask = _valid(batch)
  return Sums(
    loss=jnp.sum(losses, where=mask),
    correct=jnp.sum(logits.argmax(-1) == batch["label"], where=mask, dtype=jnp.int32),
    count=jnp.sum(mask, dtype=jnp.int32),
    skipped=jnp.int32(0),
  )


def _mean_where(mask: jax.Array, tree: Any) -> Any:
  """The mean over the first axis of those entries for which `mask` is true, or of all if none."""
  mask = mask | ~mask.any()

  def mean(x: jax.Array) -> jax.Array:
    where = mask.reshape(-1, *[1] * (x.ndim - 1))
    return (jnp.sum(x, 0, where=where) / mask.sum()).astype(x.dtype)

  return jax.tree.map(mean, tree)


def _all_finite(tree: Any) -> jax.Array:
  return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
  return jax.tree.map(lambda y, n: jnp.where(condition, y, n).astype(n.dtype), yes, no)


def unreplicate(tree: Any) -> Any:
  """This process's copy of replicated arrays, on the host; waits for it.

  A real copy: the memory of a donated state is overwritten by the next step.
  """
  return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)


def local(tree: Any) -> Any:
  """What this process's first device has of arrays, there: of replicated ones a copy."""
  return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def each_copy(tree: Any) -> Any:
  """What each device of this process has of replicated arrays, on the host, along a first axis."""
  return jax.tree.map(lambda x: np.stack([s.data for s in x.addressable_shards]), tree)


def evaluate(
  step: Callable[..., Sums], state: TrainState, batches: Iterable[Any], parallel: Parallelism
) -> tuple[float, float, int]:
  """Loss, accuracy and number of examples over all of `batches`, whatever their size."""
  result = Sums(0.0, 0, 0)
  waiting: list[Sums] = []
  for batch in batches:
    waiting.append(step(state, parallel.shard(batch)))
    if len(waiting) > 1:  # let the host prepare one batch while the devices work on another
      result = add(result, waiting.pop(0))
  for sums in waiting:
    result = add(result, sums)
  return result.loss / result.count, result.correct / result.count, result.count


def add(result: Sums, sums: Sums) -> Sums:
  """Adds a step's sums on the host, in double precision and whole numbers; waits for them."""
  loss, correct, count, skipped = unreplicate(sums)
  return Sums(
    result.loss + float(loss),
    result.correct + int(correct),
    result.count + int(count),
    result.skipped + int(skipped),
  )
