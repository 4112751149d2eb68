"""The library alone: it learns, and its statistics are those of all devices."""

import re

import chex
import jax
import numpy as np

from examples import minimal


def test_it_learns_to_read(monkeypatch, capsys):
  monkeypatch.setattr(minimal, "STEPS", 100)
  minimal.main()
  accuracies = [float(a) for a in re.findall(r"test accuracy ([\d.]+)%", capsys.readouterr().out)]
  assert len(accuracies) == 2
  assert accuracies[-1] > 90


def test_on_four_devices_it_takes_the_step_of_one():
  params, stats = minimal.init(jax.random.key(0))
  state = params, stats, minimal.optimizer.init(params)
  random = np.random.default_rng(0)
  images = random.normal(1, 2, (64, 8, 8, 1)) * np.linspace(0.5, 2, 64).reshape(-1, 1, 1, 1)
  labels = random.integers(0, 10, 64)

  def results(devices):
    shards = (a.reshape(devices, -1, *a.shape[1:]) for a in (images, labels))
    return jax.device_get(minimal.step(*state, *shards)[1:])  # without the parameters: see below

  (of_four, opt_of_four, loss_of_four), (of_one, opt_of_one, loss_of_one) = map(results, (4, 1))
  chex.assert_trees_all_close(of_four, of_one, rtol=1e-5)
  np.testing.assert_allclose(loss_of_four, loss_of_one, rtol=1e-5)
  # Adam's first step has the sign of a gradient, which is rounding where the gradient is 0.
  chex.assert_trees_all_close(opt_of_four, opt_of_one, rtol=1e-3, atol=1e-6)
