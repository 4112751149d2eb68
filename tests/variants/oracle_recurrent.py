"""Recurrent batch normalization in float64 NumPy, step by step from the equations.

Cooijmans et al. 2016, section 3, equations 6 to 8, and the same for the GRU. Parameters are dicts
with the names of `jaxbn.variants.recurrent`'s; statistics are a list over steps of dicts.
"""

import numpy as np


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def run(kind, params, x, *, there=None, running=None, rows=None, momentum=0.9, epsilon=1e-5, h0=0):
  """Outputs (time, batch, H), and the running rows after it; x is (time, batch, features).

  there: (time, batch), which examples exist. rows: of the running statistics, name to a list of
  (mean, var). With running=True they normalize, otherwise they follow the batches.
  """
  norm = _Norm(rows, running, momentum, epsilon)
  steps, batch, _ = x.shape
  there = np.ones((steps, batch), bool) if there is None else there
  units = len(params["hidden_kernel"])
  h, c = np.zeros((batch, units)) + h0, np.zeros((batch, units))
  ys = []
  for t in range(steps):
    valid = there[t]
    u = norm("input", t, x[t] @ params["input_kernel"], valid) * params["input_scale"]
    w = norm("hidden", t, h @ params["hidden_kernel"], valid) * params["hidden_scale"]
    if kind == "lstm":
      i, f, g, o = np.split(u + w + params["bias"], 4, -1)
      new_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
      c = np.where(valid[:, None], new_c, c)
      scaled = norm("cell", t, c, valid) * params["cell_scale"] + params["cell_bias"]
      new_h = sigmoid(o) * np.tanh(scaled)
    else:
      (a_r, a_z, a_n), (b_r, b_z, b_n) = np.split(w, 3, -1), np.split(u + params["bias"], 3, -1)
      r, z = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
      new_h = (1 - z) * np.tanh(r * a_n + b_n) + z * h
    h = np.where(valid[:, None], new_h, h)
    ys.append(h)
  return np.stack(ys), norm.rows


class _Norm:
  """Without scale and bias; the rows follow."""

  def __init__(self, rows, running, momentum, epsilon):
    self.rows = {name: [tuple(map(np.array, row)) for row in r] for name, r in rows.items()}
    self.running, self.momentum, self.epsilon = running, momentum, epsilon

  def __call__(self, name, t, z, valid):
    rows = self.rows[name]
    at = min(t, len(rows) - 1)
    mean, var = rows[at]
    if not self.running:
      there = z[valid]
      if not len(there):
        return np.zeros_like(z)  # nobody sees it
      old, (mean, var) = rows[at], (there.mean(0), there.var(0))
      m = self.momentum
      rows[at] = (m * old[0] + (1 - m) * mean, m * old[1] + (1 - m) * var)
    return (z - mean) / np.sqrt(var + self.epsilon)
