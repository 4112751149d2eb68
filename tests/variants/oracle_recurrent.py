"""Recurrent batch normalization in float64 NumPy, step by step from the equations.

Cooijmans et al. 2016, section 3, equations 6 to 8, and the same for the GRU. Parameters are dicts
with the names of `jaxbn.variants.recurrent`'s; statistics are a list over steps of dicts. With
jax.numpy in the place of NumPy it is plain JAX, to be differentiated.
"""

import numpy as np


def sigmoid(z):
  return 1 / (1 + np.e**-z)


def run(kind, params, x, *, there=None, running=None, rows=None, xp=np):
  """Outputs (time, batch, H), and the running rows after it; x is (time, batch, features).

  there: (time, batch), which examples exist. rows: of the running statistics, name to a list of
  (mean, var). With running=True they normalize, otherwise they follow the batches.
  """
  steps, batch, _ = x.shape
  norm = _Norm(rows or {name: [(0, 1)] * steps for name in ("input", "hidden", "cell")}, running)
  there = np.ones((steps, batch), bool) if there is None else there
  h = c = xp.zeros((batch, len(params["hidden_kernel"])))
  ys = []
  for t in range(steps):
    valid = there[t]
    u = norm("input", t, x[t] @ params["input_kernel"], valid) * params["input_scale"]
    w = norm("hidden", t, h @ params["hidden_kernel"], valid) * params["hidden_scale"]
    if kind == "lstm":
      i, f, g, o = xp.split(u + w + params["bias"], 4, -1)
      new_c = sigmoid(f) * c + sigmoid(i) * xp.tanh(g)
      c = new_c if valid.all() else xp.where(valid[:, None], new_c, c)
      scaled = norm("cell", t, c, valid) * params["cell_scale"] + params["cell_bias"]
      new_h = sigmoid(o) * xp.tanh(scaled)
    else:
      (a_r, a_z, a_n), (b_r, b_z, b_n) = xp.split(w, 3, -1), xp.split(u + params["bias"], 3, -1)
      r, z = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
      new_h = (1 - z) * xp.tanh(r * a_n + b_n) + z * h
    h = new_h if valid.all() else xp.where(valid[:, None], new_h, h)
    ys.append(h)
  return xp.stack(ys), norm.rows


class _Norm:
  """Without scale and bias; the rows follow."""

  def __init__(self, rows, running, momentum=0.9, epsilon=1e-5):
    self.rows = {name: list(r) for name, r in rows.items()}
    self.running, self.momentum, self.epsilon = running, momentum, epsilon

  def __call__(self, name, t, z, valid):
    rows = self.rows[name]
    at = min(t, len(rows) - 1)
    mean, var = rows[at]
    if not self.running:
      there = z if valid.all() else z[valid]
      if not len(there):
        return 0 * z  # nobody sees it
      old, (mean, var) = rows[at], (there.mean(0), there.var(0))
      m = self.momentum
      rows[at] = (m * old[0] + (1 - m) * mean, m * old[1] + (1 - m) * var)
    return (z - mean) / (var + self.epsilon) ** 0.5
