"""Faults of a layer: its batch, its parameters, its numbers."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jaxbn.diagnostics._facts import Facts, LayerFacts, lost
from jaxbn.diagnostics._finding import Finding


def inverted_flag(facts: Facts) -> Iterator[Finding]:
  """A layer that normalizes by the batch in the call that evaluates; no threshold."""
  for v in facts.layers:
    if v.layer.evaluating is False:
      evidence = "with the arguments for evaluation it normalizes by the statistics of the batch"
      mend = "BatchNorm(use_running_average=not train)  # NNX: model.eval() before evaluation"
      yield Finding("inverted-flag", v.layer.path, "error", "certain", evidence, mend)


def frozen(facts: Facts) -> Iterator[Finding]:
  """A layer that uses its running statistics in training while others train; no threshold."""
  for v in facts.layers:
    if v.trains is False:
      evidence = "in training it normalizes by its running statistics, which so never change"
      if any(other.trains for other in facts.layers):
        evidence += "; other layers of this network train"
      mend = "BatchNorm()(x, use_running_average=not train)  # not use_running_average=True above"
      yield Finding("frozen", v.layer.path, "error", "likely", evidence, mend)


def called_twice(facts: Facts, batches: float = 4.0, nats: float = 0.05) -> Iterator[Finding]:
  """A layer whose calls are given different data: its running statistics are those of neither.

  Args:
    facts: of the network.
    batches: how many times what is lost to the noise of one batch a call may lose to the mean over
      calls. Two calls on the same data differ by the noise of two batches, and such noise,
      squared, exceeds 4 times its mean in 1 of 20 channels.
    nats: as of `other_domain`.
  """
  for v in facts.layers:
    if v.layer.calls < 2 or not v.is_finite:
      continue
    first = np.mean([lost(v.data, s.first, v.epsilon) for s in v.training])
    last = np.mean([lost(v.data, s.last, v.epsilon) for s in v.training])
    apart = max(first, last)
    if apart > max(batches * v.drift_of_a_batch, nats):
      evidence = (
        f"it is called {v.layer.calls} times on different data: by the statistics of all calls the "
        f"first loses {first:.2g} nats per element and the last {last:.2g}"
      )
      mend = (
        "jaxbn.linen.DomainBatchNorm(num_domains=2)  # statistics of each kind of data\n"
        "# or one call of both: norm(jnp.concatenate([real, fake]))"
      )
      yield Finding("called-twice", v.layer.path, "error", "likely", evidence, mend)


def noisy_statistics(facts: Facts, elements: float = 8.0) -> Iterator[Finding]:
  """Batch statistics of too few independent elements.

  Args:
    facts: of the network.
    elements: fewest that are independent, var / (squared standard error of a batch's mean). Of n
      such the standard error of the variance is sqrt(2 / n) of it: one half at 8.
  """
  for v in facts.layers:
    count = float(np.max(v.batches.count))
    rows, several = max(facts.rows), len(v.training)
    noise = np.nanmean(v.noise) if several > 1 and not np.isnan(v.noise).all() else 1 / count
    size = facts.batch_size or rows
    n = min(1 / max(noise, 1e-30), count) * size / rows
    # One side of its interval: chi-square's, of several - 1 degrees of freedom, is so wide.
    error = 3 * np.sqrt(2 / max(several - 1, 1)) if several > 1 else 0.0
    surely = count * size / rows
    if v.trains is not False and (surely < elements or n * (1 + error) < elements):
      enough = int(np.ceil(size * elements / n))
      evidence = (
        f"a batch of {size} examples tells as much as {n:.2g} independent elements: the standard "
        f"error of its mean is {np.sqrt(1 / n):.0%} of a standard deviation"
      )
      mend = (
        f"batch_size = {enough}  # or share: BatchNorm(axis_name='batch') over "
        f"{int(np.ceil(enough / size))} devices; or jaxbn.linen.BatchRenorm(), or nn.GroupNorm()"
      )
      yield Finding("noisy-statistics", v.layer.path, "warning", "certain", evidence, mend)


def last_batch_of_one(facts: Facts) -> Iterator[Finding]:
  """A batch of one example after larger ones; no threshold: the variance of one element is 0."""
  if min(facts.rows) == 1 < max(facts.rows):
    at = facts.rows.index(1)
    evidence = f"batch {at + 1} of {len(facts.rows)} has one example, others {max(facts.rows)}"
    few = [v for v in facts.layers if np.min(v.batches.count) <= 1]
    severity, where = (
      ("error", few[0].layer.path) if few else ("warning", facts.layers[0].layer.path)
    )
    if few:
      evidence += ", and so one element per channel: what it normalizes to is the bias alone"
    mend = "batches = loader(..., drop_remainder=True)  # in training; evaluation may keep it"
    yield Finding("last-batch-of-one", where, severity, "certain", evidence, mend)


def dead_channels(
  facts: Facts, share: float = 2.0**-10, rounding: float = 16.0
) -> Iterator[Finding]:
  """Channels that say nothing: no scale, no variance, or nothing above 0 for a ReLU.

  Args:
    facts: of the network.
    share: of the layer's root-mean-square scale that is as good as none: the unit of float16, and
      more than that of bfloat16, by which a channel is lost where these add it to the others.
    rounding: variance of the input that is only rounding, in squared units in the last place of
      the mean. One rounding has a variance of 1/12 of that; 16 are those of a sum of 192 terms.
  """
  for v in facts.layers:
    if not v.is_finite:
      continue
    dead: dict[str, np.ndarray] = {}
    if v.scale is not None and np.any(v.scale):
      rms = np.sqrt(np.mean(np.square(v.scale)))
      dead["scale"] = np.abs(v.scale) < share * rms
    unit = np.finfo(np.float32).eps * np.abs(v.data.mean)
    dead["variance"] = np.asarray(v.data.var) <= rounding * np.square(unit)
    negative = np.max([s.largest for s in v.training], axis=0) <= 0
    if v.layer.options.get("activation") is None:  # then it is behind: what it does to gradients
      negative &= v.gradient is not None and np.any(v.gradient) and v.gradient == 0
    dead["activation"] = negative & ~dead.get("scale", False) & ~dead["variance"]
    for kind, channels in dead.items():
      if channels.any():
        yield _dead(v, kind, np.flatnonzero(channels))


def _dead(v: LayerFacts, kind: str, channels: np.ndarray) -> Finding:
  about = {
    "scale": "have a scale of about 0",
    "variance": "are given a constant",
    "activation": "give nothing above 0, which what is behind them takes for 0",
  }[kind]
  shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
  evidence = f"{len(channels)} of {v.data.var.size} channels {about}: {shown}"
  mend = {
    "scale": "optax.add_decayed_weights(decay, mask=...)  # not of scale; or prune these channels",
    "variance": "# look at what makes these channels: weights of 0, or a dead layer before",
    "activation": "optax.adam(learning_rate / 10)  # smaller steps; or nn.leaky_relu",
  }[kind]
  sure = "likely" if kind == "activation" else "certain"
  return Finding("dead-channels", v.layer.path, "warning", sure, evidence, mend)


def exploding_scale(facts: Facts, times: float = 32.0) -> Iterator[Finding]:
  """A scale so large that one channel, or one layer, is all that the rest of the network hears.

  Args:
    facts: of the network.
    times: the median of all scales of the network. In 1024 channels one of 32 times the scale has
      as much variance as all others together: sqrt(1024) is 32.
  """
  scales = [np.abs(v.scale) for v in facts.layers if v.scale is not None]
  usual = max(np.median(np.concatenate(scales)), 1.0) if scales else 1.0
  for v in facts.layers:
    if v.scale is None or not np.isfinite(v.scale).all():
      continue
    large = np.flatnonzero(np.abs(v.scale) > times * usual)
    if large.size:
      worst = large[np.argmax(np.abs(v.scale[large]))]
      evidence = (
        f"{large.size} of {v.scale.size} scales are more than {times:g} times the usual "
        f"{usual:.2g}; that of channel {worst} is {v.scale[worst]:.3g}"
      )
      mend = "optax.chain(optax.clip_by_global_norm(1.0), optimizer)  # and a smaller learning rate"
      yield Finding("exploding-scale", v.layer.path, "warning", "certain", evidence, mend)


def epsilon_dominates(facts: Facts, share: float = 1.0) -> Iterator[Finding]:
  """Variances below epsilon: the output has not variance 1, and depends on the weights' scale.

  Args:
    facts: of the network.
    share: of epsilon that the median variance must exceed. At 1 the output's variance is one half.
  """
  for v in facts.layers:
    if not v.is_finite or not v.data.var.any():
      continue
    median = float(np.median(v.data.var))
    if median < share * v.epsilon:
      left = median / (median + v.epsilon)
      evidence = (
        f"the median variance {median:.2g} is below epsilon={v.epsilon:.2g}: its output has "
        f"{left:.1%} of the variance it should have"
      )
      mend = f"BatchNorm(epsilon={max(median * 1e-3, 1e-12):.0e})  # or larger inputs"
      yield Finding("epsilon-dominates", v.layer.path, "warning", "certain", evidence, mend)


def half_precision(facts: Facts) -> Iterator[Finding]:
  """Statistics in half precision, or of data that half precision has lost.

  No threshold but that of the format: one unit in the last place of the mean is a standard
  deviation, or the step (1 - momentum) of an average is below half a unit of its value.
  """
  for v in facts.layers:
    if v.dtype.itemsize < 4:
      unit = float(jnp.finfo(v.dtype).eps)
      evidence = (
        f"its running statistics are {v.dtype}, which rounds to {unit:.1g} of their values; an "
        f"average that changes by {1 - (v.momentum or 0):.2g} of a difference stands still"
      )
      mend = "variables['batch_stats'] = jax.tree.map(jnp.float32, variables['batch_stats'])"
      yield Finding("half-precision", v.layer.path, "error", "certain", evidence, mend)
      continue
    given = v.layer.input
    dtype = getattr(given, "dtype", np.dtype(np.float32))
    if dtype.itemsize < 4 and jnp.issubdtype(dtype, jnp.floating) and v.is_finite:
      lost = float(jnp.finfo(dtype).eps) * np.abs(v.data.mean) > np.sqrt(v.data.var)
      if lost.any():
        evidence = (
          f"in {lost.sum()} of {lost.size} channels the mean is so large that {dtype} rounds its "
          "elements by more than their standard deviation"
        )
        mend = "x = norm(x.astype(jnp.float32))  # and the layer that makes x in float32"
        yield Finding("half-precision", v.layer.path, "error", "certain", evidence, mend)


def padding(facts: Facts, rounding: float | None = None) -> Iterator[Finding]:
  """Statistics that change when something else is in the padding.

  Args:
    facts: of the network.
    rounding: share of the standard deviation by which the moments may change; default, the square
      root of the unit of rounding, which is half way, in digits, between what rounding changes and
      what all elements do. Padding changes about its share of the elements.
  """
  rounding = float(np.sqrt(facts.unit)) if rounding is None else rounding
  for v in facts.layers:
    if v.other_padding is None:
      continue
    before, after = v.training[0].given, v.other_padding
    spread = np.sqrt(before.var + v.epsilon)
    unit = 1 + np.abs(before.mean) / spread
    far = np.abs(after.mean - before.mean) / spread + np.abs(
      after.var / (before.var + v.epsilon) - 1
    )
    if np.max(far / unit) > rounding:
      evidence = (
        "its batch statistics change with what is in the padding: the mean by up to "
        f"{np.max(np.abs(after.mean - before.mean) / spread):.2g} standard deviations"
      )
      mend = "y = norm(x, mask=valid)  # valid broadcasts against x: (N, T, 1) for x of (N, T, C)"
      yield Finding("padding", v.layer.path, "error", "certain", evidence, mend)
      return  # those behind it are given what it made of it
