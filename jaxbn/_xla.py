"""What is said to the compiler and not to the reader.

Each piece may be taken for the identity (of its first argument): the results stay what they are,
and a test does so. Whoever wants to understand the formulas may skip this file. What decides the
bytes beyond a formula, on CPUs, GPUs and TPUs alike: XLA computes an expression that two places
share once, and stores it. So a forward pass, its sums and the elementwise part of the derivative
share nothing of x's size but x: each is written in terms of x in its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxbn._meshes import on_mesh_of
from jaxbn._types import Plan

# Who reads half-precision x, each behind one barrier more than the one before.
_READERS = "sum", "squares", "tangent of moments", "tangent of y", "y"


# What is fastest on the platform that the program is compiled for; all compute the same. On a CPU a
# branch on data costs nothing, elsewhere a round trip or both of its sides: it shows in the times
# of `make bench`, and in the bytes moved on the TPU.
by_platform = lax.platform_dependent


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, traced and lowered once for all layers whose first argument and shapes are alike.

  XLA inlines the calls. Without it each layer is traced anew: it shows in the compile times of
  `make bench-step`, most where they come from the cache.
  """
  return jax.jit(function, static_argnums=0)


def traced_once_if_lasting(function: Callable[..., Any]) -> Callable[..., Any]:
  """`traced_once`, unless the activation of the plan in front is not one that a cache may hold.

  One that is new in each call would be compiled anew in each, and kept: tests/test_hoisted.py
  counts compilations.
  """
  jitted = traced_once(function)

  @functools.wraps(function)
  def call(plan: Plan, *arrays: Any) -> Any:
    if plan.activation_lasts:
      return jitted(plan, *arrays)
    with on_mesh_of(arrays):
      return function(plan, *arrays)

  return call


def apart(values: Any) -> Any:
  """The values, of which XLA does not see that they are computed elsewhere too.

  A barrier around a few numbers per channel keeps what is made of them and x from being merged, and
  so stored: on the CPU x - pivot between the two sums of the forward pass, on a GPU ReLU's mask
  from the forward pass to the backward one. It shows in the passes and in the bytes moved of
  `make bench-compiled`.
  """
  return lax.optimization_barrier(values)


@jax.jit
def apart_on_gpus(values: Any, unlike: jax.Array) -> Any:
  """Behind a barrier of their own on GPUs; elsewhere behind the same as by `apart`.

  A GPU's column sums are kernels that read the data once however much they compute, but XLA gives
  one sum at a time what it needs, and stores ReLU's mask for two: it shows in the bytes moved on
  the H100. On CPUs and TPUs XLA fuses two sums that share their y, and only those.
  """

  def alike(values: Any, unlike: jax.Array) -> Any:
    del unlike
    return apart(values)

  def of_its_own(values: Any, unlike: jax.Array) -> Any:
    return apart((values, unlike))[0]

  return by_platform(values, unlike, cpu=alike, tpu=alike, default=of_its_own)


def own_copy(x: jax.Array, reader: str) -> jax.Array:
  """x, of which XLA for CPUs does not see that other readers convert the same.

  It would convert bfloat16 x to float32 once, and store that for all: it shows in the passes on
  the CPU in bfloat16. What needs no conversion is shared as it is; accelerators convert as they
  read.
  """
  converted = jnp.finfo(x.dtype).bits < 32
  return _behind_barriers(x, _READERS.index(reader)) if converted else x


@functools.partial(jax.jit, static_argnums=1)
def _behind_barriers(x: jax.Array, number: int) -> jax.Array:
  def on_cpu(x: jax.Array) -> jax.Array:
    for _ in range(number):  # the same barrier twice would be merged
      x = lax.optimization_barrier(x)
    return x

  return by_platform(x, cpu=on_cpu, default=lambda x: x)


def recomputing(linear: Callable[..., Any]) -> Callable[..., Any]:
  """The function, of which nothing but the arguments is kept for a transposition.

  Without it a scan over layers, or a derivative outside of jit, keeps more arrays of x's size than
  x: tests/test_activation.py counts them. Without `prevent_cse`, which would keep XLA from fusing,
  a compiled program is the same.
  """
  return jax.checkpoint(linear, prevent_cse=False)


def nonzero(tangents: Any) -> Any:
  """None for what is not differentiated, so that nothing is computed with it.

  Zeros would be summed and moved like any numbers: it shows wherever x itself has no derivative.
  """

  def is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)

  return jax.tree.map(lambda t: None if is_zero(t) else t, tangents, is_leaf=is_zero)


@jax.custom_batching.custom_vmap
def all_hold(conditions: jax.Array) -> jax.Array:
  """jnp.all, under vmap for the whole batch, so that a branch on it stays a branch.

  A condition for each example would make it a select, for which both sides are computed: it shows
  in a program under vmap, where tests/test_measure.py looks for the branch.
  """
  return jnp.all(conditions)


@all_hold.def_vmap
def _(axis_size: int, batched: Any, conditions: jax.Array) -> tuple[jax.Array, bool]:
  return all_hold(conditions), False
