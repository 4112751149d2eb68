"""The optimizer that a config names, with its schedule and its weight decay."""

from typing import Any

import jax
import optax

from examples.settings import lookup


def decayed(params: Any) -> Any:
  """True for the leaves that weight decay shrinks: all but those called scale and bias.

  Behind a norm, a kernel's length is free and decay only sets its learning rate; scale and
  bias are what the norm outputs, and shrinking them is a change to the function.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in ("scale", "bias"), params
  )


def schedule(config: Any) -> optax.Schedule:
  """Learning rate by step: linear warmup from 0, then half a cosine to 0."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.steps,
  )


def adamw(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
  return optax.adamw(rate, weight_decay=weight_decay, mask=decayed)


def sgd(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
  """Nesterov momentum 0.9, with the decay in the gradient."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=decayed),
    optax.sgd(rate, momentum=0.9, nesterov=True),
  )


OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def create(config: Any) -> optax.GradientTransformation:
  """The gradient transformation that `config` describes."""
  optimizer = lookup(OPTIMIZERS, config.optimizer, "config.optimizer")
  return optimizer(schedule(config), config.weight_decay)
