"""What a type checker says of code that uses jaxbn: mypy reads this file, and nothing runs it.

Each line that is ignored is a mistake; where mypy no longer sees it, it reports the comment.
"""

from typing import assert_type

import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn

x = jnp.ones((4, 3))


def mistakes() -> None:
  jaxbn.linen.BatchNorm(momentun=0.9)  # type: ignore[call-arg]
  jaxbn.linen.BatchRenorm(r_maxx=3.0)  # type: ignore[call-arg]
  jaxbn.nnx.BatchNorm(3, momentun=0.9, rngs=nnx.Rngs(0))  # type: ignore[call-arg]
  jaxbn.batch_norm(x, use_running_average=False, momentun=0.9)  # type: ignore[call-overload]
  _ = jaxbn.batch_norm(x, use_running_average=False)[1].mean  # type: ignore[attr-defined]
  jaxbn.moments(x, 0)  # type: ignore[call-arg]
  jaxbn.batch_nrom(x)  # type: ignore[attr-defined]
  jaxbn.linen.BatchNrom()  # type: ignore[attr-defined]
  jaxbn.nnx.BatchNorm2d(3)  # type: ignore[attr-defined]
  _ = jaxbn.variants.renrom  # type: ignore[attr-defined]
  jaxbn.variants.renorm.batch_renrom(x)  # type: ignore[attr-defined]
  jaxbn.alternatives.weight_norm.weight_nrom(x)  # type: ignore[attr-defined]


def right(state: jaxbn.RunningStats | None, scale: jax.Array | None) -> None:
  given = jaxbn.init(3)
  assert_type(jaxbn.batch_norm(x, use_running_average=False), tuple[jax.Array, None])
  evaluated = jaxbn.batch_norm(x, state=given, use_running_average=True)
  assert_type(evaluated, tuple[jax.Array, jaxbn.RunningStats])
  trained = jaxbn.batch_norm(x, scale, scale, given, use_running_average=False, debias=True)
  assert_type(trained, tuple[jax.Array, jaxbn.RunningStats])
  either = jaxbn.batch_norm(x, scale, scale, state, use_running_average=False)
  assert_type(either, tuple[jax.Array, jaxbn.RunningStats | None])
  assert_type(jaxbn.moments(x).mean, jax.Array)
  jaxbn.variants.renorm.batch_renorm(x, use_running_average=False)
