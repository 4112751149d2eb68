"""What is exact in jaxbn and not in Flax's own layers: the README's table, measured.

  python -m benchmarks.exactness

Every row is an error against batch normalization in float64, in standard deviations, of the layer
as it comes (float32, default arguments) in jaxbn and in the installed Flax, on the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import table
from jaxbn import linen as bn

DEVICES = 4
EPSILON = 1e-5
Layer = Callable[..., Any]


def main() -> None:
  jax.config.update("jax_num_cpu_devices", DEVICES)
  lines = [["case", f"flax {flax.__version__}", "jaxbn"]]
  lines += [[case, f"{of_flax:.2g}", f"{of_jaxbn:.2g}"] for case, of_flax, of_jaxbn in rows()]
  print("Largest error of the output, in standard deviations", table(lines), sep="\n\n")


def rows() -> Iterator[tuple[str, float, float]]:
  """Each case with Flax's error and jaxbn's."""
  for case, measure in CASES.items():
    yield case, measure(nn.BatchNorm), measure(bn.BatchNorm)


def large_mean(layer: Layer, ratio: float) -> float:
  """A batch whose mean is `ratio` standard deviations from zero."""
  x = (ratio + np.random.default_rng(0).normal(size=(4096, 64))).astype(np.float32)
  model = layer(use_running_average=False)
  return _worst(_train(model, model.init(jax.random.key(0), x), x)[0] - _reference(x))


def shared(layer: Layer, ratio: float, steps: int) -> float:
  """Such a batch over four devices under pmap, in the step after so many others."""
  rng = np.random.default_rng(0)
  model = layer(use_running_average=False, axis_name="batch")
  variables = model.init(jax.random.key(0), np.zeros((1, 64), np.float32))
  train = partial(_train, model)
  step = jax.pmap(train, axis_name="batch", in_axes=(None, 0), out_axes=(0, None))
  for _ in range(steps):
    x = (ratio + rng.normal(size=(DEVICES, 1024, 64))).astype(np.float32)
    y, variables = step(variables, x)
  return _worst(np.asarray(y).reshape(-1, 64) - _reference(x.reshape(-1, 64)))


def masked(layer: Layer, counts: tuple[int, ...]) -> float:
  """Four devices under pmap with so many valid examples."""
  offsets = np.arange(DEVICES)[:, None, None]  # so that the devices' means differ
  x = np.random.default_rng(0).normal(size=(DEVICES, 64, 8)) + 0.5 * offsets
  x = x.astype(np.float32)
  mask = np.arange(64) < np.array(counts)[:, None]
  model = layer(use_running_average=False, axis_name="batch")
  variables = model.init(jax.random.key(0), x[0])
  step = jax.pmap(lambda x, mask: _train(model, variables, x, mask=mask)[0], axis_name="batch")
  return _worst(np.asarray(step(x, mask[..., None]))[mask] - _reference(x[mask]))


def nan_in_padding(layer: Layer) -> float:
  """NaN where the mask is False: the largest error of the gradient of scale, relative."""
  x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  mask = np.arange(64)[:, None] < 40
  model = layer(use_running_average=False)
  variables = model.init(jax.random.key(0), x)

  def loss(params: Any, x: jax.Array) -> jax.Array:
    y, _ = _train(model, {**variables, "params": params}, x, mask=mask)
    return jnp.where(mask, y**3, 0).sum()

  gradient = jax.grad(loss)(variables["params"], np.where(mask, x, np.nan))["scale"]
  expected = 3 * (_reference(x[:40]) ** 3).sum(0)
  return _worst((np.asarray(gradient) - expected) / np.abs(expected).max())


def evaluation(layer: Layer) -> float:
  """After 20 training steps on batches of one distribution."""
  rng = np.random.default_rng(0)
  model = layer(**({"debias": True} if layer is bn.BatchNorm else {}))
  batches = [(3 + 2 * rng.normal(size=(256, 16))).astype(np.float32) for _ in range(20)]
  variables = model.init(jax.random.key(0), batches[0], use_running_average=False)
  for x in batches:
    _, variables = _train(model, variables, x, use_running_average=False)
  y = model.apply(variables, batches[-1], use_running_average=True)
  return _worst(np.asarray(y) - (batches[-1] - 3) / 2)


def after_a_nan_batch(layer: Layer) -> float:
  """Running mean after 20 good batches and one of NaN: its error, in standard deviations."""
  options = {"skip_nonfinite": True} if layer is bn.BatchNorm else {}
  model = layer(use_running_average=False, momentum=0.5, **options)
  x = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
  variables = model.init(jax.random.key(0), x)
  for batch in [x] * 20 + [np.full_like(x, np.nan)]:
    _, variables = _train(model, variables, batch)
  return _worst(variables["batch_stats"]["mean"] - x.astype(np.float64).mean(0))


def _train(model: nn.Module, variables: Any, x: Any, **options: Any) -> tuple[Any, Any]:
  """The output, and the variables with the running statistics that come of it."""
  y, updates = model.apply(variables, x, **options, mutable=["batch_stats"])
  return y, {**variables, **updates}


def _reference(x: np.ndarray) -> np.ndarray:
  wide = x.astype(np.float64)
  return (wide - wide.mean(0)) / np.sqrt(wide.var(0) + EPSILON)


def _worst(error: Any) -> float:
  return float(np.abs(error).max())


CASES: dict[str, Callable[[Layer], float]] = {
  "mean 1e3 standard deviations from zero": partial(large_mean, ratio=1e3),
  "mean 1e4 standard deviations from zero": partial(large_mean, ratio=1e4),
  "4 devices share under pmap, mean 1e2, first step": partial(shared, ratio=1e2, steps=1),
  "4 devices share under pmap, mean 1e3, first step": partial(shared, ratio=1e3, steps=1),
  "4 devices share under pmap, mean 1e4, first step": partial(shared, ratio=1e4, steps=1),
  "4 devices share under pmap, mean 1e4, step 101": partial(shared, ratio=1e4, steps=101),
  "mask under pmap: 1, 2, 4 and 57 valid examples on 4 devices": partial(
    masked, counts=(1, 2, 4, 57)
  ),
  "mask under pmap: one device has no valid example": partial(masked, counts=(0, 64, 64, 64)),
  "NaN in masked positions: gradient of scale, relative": nan_in_padding,
  "evaluation after 20 steps (jaxbn: debias=True)": evaluation,
  "running mean after one NaN batch (jaxbn: skip_nonfinite=True)": after_a_nan_batch,
}

if __name__ == "__main__":
  main()
