"""Faults of running statistics: evaluation normalizes by something that is not the data's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxbn._types import RunningStats
from jaxbn.diagnostics._facts import Facts, LayerFacts, lost
from jaxbn.diagnostics._finding import Finding

RECALIBRATE = "variables = jaxbn.surgery.recalibrate(model, variables, batches, train=False)"


def not_finite(facts: Facts) -> Iterator[Finding]:
  """NaN or infinity, in the running statistics or in what the layer is given; no threshold."""
  for v in facts.layers:
    bad = ~(np.isfinite(v.running.mean) & np.isfinite(v.running.var))
    if bad.any():
      evidence = f"the running statistics of {bad.sum()} of {bad.size} channels are not finite"
      mend = f"BatchNorm(..., skip_nonfinite=True)  # of jaxbn; and now:\n{RECALIBRATE}"
      yield Finding("nan", v.layer.path, "error", "certain", evidence, mend)
  for v in facts.layers:
    if not v.is_finite:
      number = sum(not np.isfinite(s.given.var).all() for s in v.training)
      evidence = f"in {number} of {len(v.training)} batches what it is given is not finite"
      mend = "assert np.isfinite(x).all()  # of each batch, and then of each layer before this one"
      yield Finding("nan", v.layer.path, "error", "certain", evidence, mend)
      break  # those behind it have it from there


def is_initial(v: LayerFacts) -> bool:
  return bool((v.running.mean == 0).all() and (v.running.var == 1).all())


def drifted(v: LayerFacts, batches: float, nats: float) -> bool:
  """Whether evaluation normalizes worse than training does, and so much that it matters."""
  if not (v.is_finite and np.isfinite(v.running.mean).all() and np.isfinite(v.running.var).all()):
    return False
  return not v.drift <= max(batches * v.drift_of_a_batch, nats)


def never_updated(facts: Facts) -> Iterator[Finding]:
  """Mean 0 and variance 1, exactly, in all channels; no threshold."""
  for v in facts.layers:
    unmoved = v.earlier is not None and facts.moved
    if is_initial(v) and not unmoved and v.trains is not False:
      evidence = f"its running mean is 0 and its variance 1, the data's are {_about(v)}"
      mend = (
        "y, new = model.apply(variables, x, train=True, mutable=['batch_stats'])\n"
        "variables = {**variables, **new}  # for all that use them"
      )
      yield Finding("never-updated", v.layer.path, "error", "certain", evidence, mend)


def not_mutable(facts: Facts) -> Iterator[Finding]:
  """Running statistics that are those of an earlier step, though parameters changed since.

  No threshold: an average that gets a share of a batch is not what it was, to the last bit.
  """
  for v in facts.layers:
    if v.earlier is None or not facts.moved or v.trains is False:
      continue
    pairs = zip(v.earlier[:2], v.running[:2], strict=True)
    if all((a == b).all() for a, b in pairs):
      evidence = "its running statistics are those of the earlier step, while parameters changed"
      mend = (
        "y, new = model.apply(variables, x, train=True, mutable=['batch_stats'])\n"
        "variables = {**variables, **new}"
      )
      yield Finding("not-mutable", v.layer.path, "error", "certain", evidence, mend)


def momentum_too_slow(
  facts: Facts, batches: float = 1.0, nats: float = 0.05, weight: float = 0.1
) -> Iterator[Finding]:
  """Running statistics that still hold much of their initial values.

  Args:
    facts: of the network.
    batches: as of `other_domain`.
    nats: as of `other_domain`; also what w may leave unexplained.
    weight: of the initial values: momentum**steps, or where steps are not given, fitted to
      running = w initial + (1 - w) data. A tenth changes a variance of 0 or 2 by the tenth by which
      those of 200 independent elements are known: their standard error is sqrt(2 / 200).
  """
  fitted = {v.layer.path: initial_weight(v) for v in facts.layers if _is_average(v)}
  # The momenta that some layer shows to be fast enough, one in which initial values would be seen.
  fast = {
    v.momentum
    for v in facts.layers
    if v.layer.path in fitted
    and fitted[v.layer.path] <= weight
    and v.lost(0 * v.data.mean, 0 * v.data.var + 1) > nats
  }
  for v in facts.layers:
    a, w = v.momentum, fitted.get(v.layer.path)
    if a is None or w is None or not drifted(v, batches, nats):
      continue
    left = lost(v.running, _blend(v, min(w, 1.0)), v.epsilon)
    is_slow = weight < w <= 1 and left < nats and a not in fast
    if facts.steps is not None:
      w = a**facts.steps
      is_slow = w > weight
    if is_slow:
      yield _too_slow(v, a, w, facts.steps)


def _is_average(v: LayerFacts) -> bool:
  is_plain = v.momentum is not None and 0 < v.momentum < 1 and not v.layer.options.get("debias")
  return is_plain and v.is_finite and not is_initial(v) and bool(np.isfinite(v.running.var).all())


def _blend(v: LayerFacts, w: float) -> RunningStats:
  return RunningStats((1 - w) * v.data.mean, w + (1 - w) * v.data.var)


def _too_slow(v: LayerFacts, momentum: float, w: float, steps: int | None) -> Finding:
  number = steps or max(round(np.log(w) / np.log(momentum)), 1)
  evidence = (
    f"after {'' if steps else 'about '}{number} steps with momentum {momentum:g} its running "
    f"statistics are still {w:.0%} initial values"
  )
  enough = _floor(max(0.01 ** (1 / number), 0.5))
  mend = f"BatchNorm(momentum={enough})  # or debias=True, of jaxbn; and now:\n{RECALIBRATE}"
  sure = "certain" if steps else "likely"
  return Finding("momentum-too-slow", v.layer.path, "error", sure, evidence, mend)


def initial_weight(v: LayerFacts) -> float:
  """The w of running = w initial + (1 - w) data, by least squares in standard errors."""
  mean, var = v.data.mean, v.data.var + v.epsilon
  a = np.concatenate([mean / np.sqrt(var), (var - 1) / var / np.sqrt(2)])
  b = np.concatenate(
    [(mean - v.running.mean) / np.sqrt(var), (v.data.var - v.running.var) / var / np.sqrt(2)]
  )
  return float(a @ b / max(a @ a, 1e-30))


def other_domain(facts: Facts, batches: float = 1.0, nats: float = 0.05) -> Iterator[Finding]:
  """Running statistics far from the data's, for no other reason that is known.

  What is compared is lost information: the Kullback-Leibler divergence of the data, as Gaussian,
  from N(running mean, running variance), in nats per element, mean over channels.

  Args:
    facts: of the network.
    batches: how many times what training itself loses to the noise of a batch's statistics, that
      is, their squared standard errors. The network was trained under that noise; an average of
      more than one batch is nearer to the data, or it is not an average of this data.
    nats: what is too little to matter, where batches are so large that they have no noise.
      Running statistics follow the parameters and are always some steps late. 0.05 is a shift by
      0.32 standard deviations, by which 1 ReLU in 8 decides otherwise, or a factor of 1.4 in the
      variance.
  """
  explained = {f.layer for find in (not_mutable, momentum_too_slow) for f in find(facts)}
  for v in facts.layers:
    if (
      v.layer.path in explained
      or is_initial(v)
      or v.trains is False
      or not drifted(v, batches, nats)
    ):
      continue
    with np.errstate(all="ignore"):
      shift = (v.data.mean - v.running.mean) / np.sqrt(v.running.var + v.epsilon)
      ratio = (v.data.var + v.epsilon) / (v.running.var + v.epsilon)
    worst = int(np.nanargmax(np.abs(shift) + np.abs(np.log(ratio))))
    evidence = (
      f"evaluation loses {v.drift:.2g} nats per element, a training batch {v.drift_of_a_batch:.2g}"
      f"; in channel {worst} the mean is off by {shift[worst]:.2g} standard deviations and the "
      f"variance by a factor of {ratio[worst]:.2g}"
    )
    mend = f"{RECALIBRATE}\n# or normalize this data as the training data: compare their means"
    yield Finding("other-domain", v.layer.path, "error", "likely", evidence, mend)


def pytorch_momentum(facts: Facts, batches: float = 3.0) -> Iterator[Finding]:
  """A momentum that is the share of the new batch, as in PyTorch, where Flax's is of the old value.

  Args:
    facts: of the network.
    batches: with momentum a, the squared standard error of the average is that of (1 + a)/(1 - a)
      batches. One of fewer than 3, a below 1/2, is hardly an average.
  """
  for v in facts.layers:
    a = v.momentum
    if a is not None and v.trains is not False and 0 <= a < 1 and (1 + a) / (1 - a) < batches:
      evidence = (
        f"momentum={a:g} keeps {a:.0%} of the old value: its running statistics are as noisy as "
        f"those of {(1 + a) / (1 - a):.2g} batches. In PyTorch it would keep {1 - a:.0%}"
      )
      mend = f"BatchNorm(momentum={1 - a:g})"
      yield Finding("pytorch-momentum", v.layer.path, "warning", "likely", evidence, mend)


def replicas_differ(facts: Facts, errors: float = 6.0) -> Iterator[Finding]:
  """Replicas with different running statistics: each averages over its own share of the batch.

  Args:
    facts: of the network.
    errors: standard errors by which rounding may tell apart averages of the same batches. Of n
      elements that are added up in another order one is sqrt(n) units in the last place; a normal
      variable exceeds 6 once in half a billion. Means of different batches differ by sqrt(2 / n) of
      the deviation.
  """
  for v in facts.layers:
    if v.replicas is None:
      continue
    mean, var = v.replicas.mean, v.replicas.var
    spread = np.sqrt(np.abs(v.running.var)) + np.abs(v.running.mean) + v.epsilon
    far = np.max(np.ptp(mean, axis=0) / spread)
    far = max(far, np.max(np.ptp(var, axis=0) / (spread**2)))
    if far > errors * v.rounding:
      evidence = f"those of {len(mean)} replicas are up to {far:.2g} standard deviations apart"
      mend = (
        "BatchNorm(axis_name='batch')  # jax.pmap(..., axis_name='batch'); or before saving:\n"
        "stats = jax.pmap(lambda s: jax.lax.pmean(s, 'batch'), 'batch')(stats)"
      )
      yield Finding("replicas-differ", v.layer.path, "warning", "certain", evidence, mend)


def _about(v: LayerFacts) -> str:
  mean, low, high = np.mean(np.abs(v.data.mean)), np.min(v.data.var), np.max(v.data.var)
  return f"about {mean:.2g} and {low:.2g} to {high:.2g}"


def _floor(momentum: float) -> float:
  """With as few digits as say it, never slower."""
  digits = 1
  while momentum > 0.5 and 1 - 10.0**-digits < momentum and digits < 4:
    digits += 1
  return float(np.floor(momentum * 10**digits) / 10**digits)
