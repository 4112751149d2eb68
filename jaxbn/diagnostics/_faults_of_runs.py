"""Faults of the run: its gradients and its optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxbn.diagnostics._facts import Facts
from jaxbn.diagnostics._finding import Finding


def cancelled_bias(facts: Facts, rounding: float | None = None) -> Iterator[Finding]:
  """A bias whose gradient is zero in training: the mean that batch norm subtracts contains it.

  Args:
    facts: of the network.
    rounding: how small it is against the kernel's gradient; default, the square root of the unit
      of rounding, which is half way, in digits, between what rounding leaves and what a bias has.
  """
  if facts.flow is None:
    return
  rounding = float(np.sqrt(facts.unit)) if rounding is None else rounding
  for place, kernel in facts.kernels.items():
    of_bias, of_kernel = facts.flow.params[place], facts.flow.params[kernel]
    if of_kernel > 0 and of_bias <= rounding * of_kernel:
      evidence = (
        f"its gradient is {of_bias / of_kernel:.1g} of the kernel's: a batch norm behind it "
        "subtracts it again"
      )
      mend = "nn.Dense(..., use_bias=False)  # or nn.Conv: what a batch norm follows"
      path = "/".join(str(key) for key in place if key != "params")
      yield Finding("cancelled-bias", path, "note", "likely", evidence, mend)


def weight_decay(facts: Facts) -> Iterator[Finding]:
  """Weight decay on a batch norm's scale or bias; no threshold.

  It pulls the scale to 0, which is no regularization of the function: of weights before a batch
  norm it only changes the effective learning rate (van Laarhoven 2017), and a scale of 0 is a dead
  channel.
  """
  if facts.decayed is None:
    return
  decayed = set(facts.decayed)
  for v in facts.layers:
    names = [n for n in ("scale", "bias") if v.layer.variables.get(n) in decayed]
    if names:
      evidence = f"weight decay acts on its {' and its '.join(names)}"
      mend = (
        "mask = jaxbn.surgery.decay_mask(model, x, train=False)\n"
        "optax.adamw(learning_rate, weight_decay=decay, mask=mask)"
      )
      yield Finding("weight-decay", v.layer.path, "warning", "certain", evidence, mend)


def gradient_growth(facts: Facts, times: float = 1000.0, errors: float = 3.0) -> Iterator[Finding]:
  """Gradients that grow from layer to layer on the way back.

  Behind a batch norm and a ReLU, with random weights, the squared norm of the gradient grows by
  pi / (pi - 1) = 1.47 per layer, its norm by 1.21, so that depth ends in steps that are too large
  (Yang et al. 2019, "A mean field theory of batch normalization").

  Args:
    facts: of the network.
    times: the norm at the last batch norm that the largest may be. 1000 is what 36 layers without
      skip connections do; float16 has 40,000 from 1 to its smallest normal number.
    errors: standard errors of the slope of its logarithm over depth by which that is not 0.
  """
  norms = gradient_norms(facts)
  if len(norms) < 4 or not np.isfinite(norms).all() or not (norms > 0).all():
    return
  depth, log = np.arange(len(norms)), np.log(norms)
  (slope, _), covariance = np.polyfit(depth, log, 1, cov=True)
  if norms.max() > times * norms[-1] and -slope > errors * np.sqrt(covariance[0, 0]):
    worst = facts.layers[int(np.argmax(norms))].layer.path
    evidence = (
      f"the gradient's norm here is {norms.max() / norms[-1]:.2g} times that at the last batch "
      f"norm: it grows by {np.exp(-slope):.3g} per layer, over {len(norms)} layers"
    )
    mend = "x = x + block(x)  # skip connections; or a warm-up of the learning rate"
    yield Finding("gradient-growth", worst, "warning", "certain", evidence, mend)


def gradient_norms(facts: Facts) -> np.ndarray:
  """At the output of each layer, in their order; NaN where not known."""
  values = [np.nan if v.gradient is None else np.sqrt(np.sum(v.gradient)) for v in facts.layers]
  return np.array(values, float)
