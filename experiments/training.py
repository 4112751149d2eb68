"""Training many small networks at once, and choosing the learning rate for each side alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.progress import Progress

Carry = Any  # what a training step gives to the next: parameters, statistics, momentum


class Recipe(NamedTuple):
  """How a network is trained, and what is looked at on the way.

  Attributes:
    start: a key, to what the first step takes.
    step: that, the learning rate and the indices of a batch, to what the next step takes.
    look: that, to a tree of arrays.
  """

  start: Callable[[jax.Array], Carry]
  step: Callable[[Carry, jax.Array, jax.Array], Carry]
  look: Callable[[Carry], Any]


def descend(
  recipe: Recipe,
  rates: Sequence[float],
  orders: np.ndarray,
  every: int,
  say: str,
  started: Carry | None = None,
) -> tuple[Carry, Any]:
  """Trains a network for each learning rate and each seed, all in one program.

  Args:
    recipe: of one network.
    rates: learning rates.
    orders: indices of the examples, (seeds, steps, batch), which all rates share.
    every: after how many steps to look; divides steps.
    say: what the progress bar says.
    started: what the first steps take, leaves (seeds, ...); default, what the recipe starts from.

  Returns:
    What the last step gave, leaves (rates, seeds, ...); and what was seen before the first step
    and after every `every`, leaves (looks, rates, seeds, ...).
  """
  seeds, steps, _ = orders.shape
  start, look, advance = compiled(recipe)
  if started is None:
    started = start(jax.random.split(jax.random.key(0), seeds))
  carry = jax.tree.map(lambda a: jnp.repeat(a[None], len(rates), 0), started)
  looks = [look(carry)]
  with Progress() as progress:
    for first in progress.track(range(0, steps, every), description=say):
      now = jnp.asarray(orders[:, first : first + every])
      carry, seen = advance(carry, jnp.asarray(rates), now)
      looks.append(jax.block_until_ready(seen))
  return carry, jax.tree.map(lambda *a: np.stack(a), *looks)


@functools.lru_cache(maxsize=1)  # compiled once where the same networks train again
def compiled(recipe: Recipe) -> tuple[Callable[..., Any], ...]:
  """The start for all seeds; a look at, and some steps of, all rates and seeds."""

  def some_steps(carry: Carry, rate: jax.Array, order: jax.Array) -> tuple[Carry, Any]:
    step = lambda carry, batch: (recipe.step(carry, rate, batch), None)  # noqa: E731
    carry, _ = lax.scan(step, carry, order)
    return carry, recipe.look(carry)

  for_each = jax.vmap(jax.vmap(some_steps, (0, None, 0)), (0, 0, None))
  look = jax.jit(jax.vmap(jax.vmap(recipe.look)))
  return jax.jit(jax.vmap(recipe.start)), look, jax.jit(for_each, donate_argnums=0)


def best(validation: np.ndarray) -> int:
  """Which rate has the best validation accuracy, (rates, seeds), in the mean of the seeds.

  A run that diverged counts as no accuracy.
  """
  return int(np.argmax(np.nan_to_num(validation, nan=0.0).mean(-1)))


def tried(grid: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
  """Rates, and accuracies (rates, seeds) on the images held out, of rows of kind "grid"."""
  accuracies = np.array([row["validation"] for row in grid], float)  # NaN for None
  return np.array([row["rate"] for row in grid]), accuracies


def highest(rates: np.ndarray, validation: np.ndarray, close: float = 0.02) -> float:
  """The highest rate that is as good as the best but for `close`, in the mean of the seeds."""
  means = np.nan_to_num(validation, nan=0.0).mean(-1)
  return float(rates[means >= means.max() - close].max())


def spread(values: Iterable[float], form: str = ".1f") -> str:
  """Mean ± standard deviation over the seeds."""
  listed = np.asarray(list(values))
  return f"{listed.mean():{form}} ± {listed.std(ddof=1):{form}}"


def percent(shares: Iterable[float]) -> str:
  """The same of shares, in percent."""
  return spread(100 * share for share in shares)
