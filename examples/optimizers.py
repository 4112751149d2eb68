"""The optimizer that a config names, with its schedule and its weight decay."""

import itertools
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from examples import run_directory
from examples.keys import LARGEST_LOSS_SCALE
from examples.settings import UserError, lookup


def adaptive_clip(limit: float) -> optax.GradientTransformation:
  """Adaptive gradient clipping (Brock et al., 2021), of all but the last linear layer.

  An output's gradient is at most `limit` times as long as its weights. A scale, a bias or a gain is
  one vector for the whole layer; where its length is below 1e-3, as SkipInit's is at first, it
  counts as that. These are optax's rules, and the authors'; they leave out the head as well.
  """

  def clipped(params: Any) -> Any:
    return {name: jax.tree.map(lambda _, on=name != "head": on, p) for name, p in params.items()}

  return optax.masked(optax.adaptive_grad_clip(limit), clipped)


def schedule(config: Any) -> optax.Schedule:
  """Learning rate by step: linear warmup from 0, then half a cosine to 0."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.steps,
  )


def adamw(rate: optax.Schedule, weight_decay: float, decays: Any) -> optax.GradientTransformation:
  return optax.adamw(rate, weight_decay=weight_decay, mask=decays)


def sgd(rate: optax.Schedule, weight_decay: float, decays: Any) -> optax.GradientTransformation:
  """Nesterov momentum 0.9, with the decay in the gradient."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=decays),
    optax.sgd(rate, momentum=0.9, nesterov=True),
  )


OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


GOOD_STEPS = 2000  # before the scale is tried at twice its value


class LossScale(NamedTuple):
  """State of `scaled_loss`; `loss_scale` is what the loss has to be multiplied by."""

  loss_scale: Any
  good_steps: Any  # since it last changed
  inner_state: Any


def scaled_loss(
  inner: optax.GradientTransformation, initial: float
) -> optax.GradientTransformation:
  """Dynamic loss scaling (Micikevicius et al., 2018, section 3.2) around an optimizer.

  Takes the gradients of the loss times `loss_scale(state)`, so that small ones survive float16,
  and divides them again. Where one overflows the scale is halved, down to 1, and after `GOOD_STEPS`
  without it is doubled; that `inner` skips the step is `inner`'s business.
  """

  def init(params: Any) -> LossScale:
    return LossScale(jnp.float32(initial), jnp.int32(0), inner.init(params))

  def update(grads: Any, state: LossScale, params: Any = None) -> tuple[Any, LossScale]:
    scale, good_steps, inner_state = state
    grads = jax.tree.map(lambda g: g / scale, grads)
    finite = jnp.all(jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]))
    good_steps = jnp.where(finite, good_steps + 1, 0)
    grow = good_steps == GOOD_STEPS
    larger = jnp.where(grow, jnp.minimum(2 * scale, LARGEST_LOSS_SCALE), scale)
    scale = jnp.where(finite, larger, jnp.maximum(scale / 2, 1))
    updates, inner_state = inner.update(grads, inner_state, params)
    return updates, LossScale(scale, jnp.where(grow, 0, good_steps), inner_state)

  return optax.GradientTransformation(init, update)


def loss_scale(opt_state: Any) -> Any:
  """What the loss has to be multiplied by: 1 without loss scaling."""
  return optax.tree.get(opt_state, "loss_scale", default=1.0)


def skips(config: Any) -> int:
  """How many steps in a row are skipped where the gradients are not finite.

  With loss scaling, that many after the scale has come down to 1, be it from its largest value.
  """
  halvings = int(math.log2(LARGEST_LOSS_SCALE)) if config.loss_scale else 0
  return config.skip_nonfinite + halvings


def skipped(opt_state: Any, limit: int) -> jax.Array:
  """Whether the update that gave this state was skipped, where up to `limit` in a row are."""
  bad = optax.tree.get(opt_state, "notfinite_count")
  return (bad > 0) & (bad <= limit)


def create(config: Any, decays: Any) -> optax.GradientTransformation:
  """The gradient transformation that `config` describes; `decays` is true where weights decay."""
  optimizer = lookup(OPTIMIZERS, config.optimizer, "config.optimizer")
  result = optimizer(schedule(config), config.weight_decay, decays)
  if config.adaptive_clip:  # of the gradient alone, before any decay is added to it
    result = optax.chain(adaptive_clip(config.adaptive_clip), result)
  if skips(config):
    result = optax.apply_if_finite(result, skips(config))
  return scaled_loss(result, config.loss_scale) if config.loss_scale else result


def forms(config: Any, decays: Any, params: Any) -> Iterator[Any]:
  """Shapes of the states with which a run may go on: with and without clipping and skipping."""
  for clip, skip in itertools.product((0.0, 1.0), (0, 1)):
    other = config.copy_and_resolve_references()
    other.adaptive_clip, other.skip_nonfinite = clip, skip
    yield jax.eval_shape(create(other, decays).init, params)


def carry_over(saved: Any, fresh: Any) -> Any:
  """`fresh` with the moments and counters of `saved`, which may be another of `forms`."""
  if isinstance(fresh, LossScale | optax.ApplyIfFiniteState) and isinstance(saved, type(fresh)):
    return saved._replace(inner_state=carry_over(saved.inner_state, fresh.inner_state))
  if isinstance(fresh, optax.ApplyIfFiniteState):
    return fresh._replace(inner_state=carry_over(saved, fresh.inner_state))
  if isinstance(saved, optax.ApplyIfFiniteState):
    return carry_over(saved.inner_state, fresh)
  return jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(saved))  # clipping has none


USUAL_RATES = {"adamw": 3e-3, "sgd": 0.1}


def not_finite(what: str, config: Any) -> UserError:
  """What to say when numbers ran out; the keys that help may change when the run goes on."""
  lower = min(config.learning_rate / 10, USUAL_RATES[config.optimizer])
  slower = f"--config.learning_rate={lower:.3g}"
  afresh = f"--config.workdir={run_directory.free(Path(config.workdir))}"
  more = max(10, 10 * config.skip_nonfinite)
  return UserError(
    f"{what}, where config.learning_rate is {config.learning_rate} and config.skip_nonfinite "
    f"{config.skip_nonfinite}; it was not saved. Run the same command again with\n"
    f"  {slower} to go on from what was saved, if anything, at a lower rate,\n"
    f"  {slower} {shlex.quote(afresh)} to start afresh with that, or\n"
    f"  --config.skip_nonfinite={more} to go on without such steps, if single batches are to blame"
  )
