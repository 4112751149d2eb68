r"""How far rounding can take a formula: running error analysis of what JAX traces of it.

Each value of the formula's jaxpr is computed in float64 NumPy, and beside it a bound on its error
if every operation had been rounded to u (Higham 2002, "Accuracy and stability of numerical
algorithms", section 3.3):

  elementwise  f(a, b) is off by |df/da| e_a + |df/db| e_b, and for itself by 2 u |f|: its rounding,
               and that of a constant in it; 4 u |f| where f is not an operation of IEEE 754
  sums         of n terms: by the sum of theirs, and min(n, 6 sqrt(n)) u times the sum of their
               magnitudes (see tests/bounds.py), and 4 u for products that another order takes
               before a sum or after it
  selects      by that of what is selected; a comparison whose sides are nearer to each other than
               their errors could fall either way: then nothing is known, and `evaluate` says so

To first order in u: terms of second order are left out. It knows the operations of real and complex
formulas as tests/textbook.py has them and of all their derivatives.
"""

from typing import Any, NamedTuple

import jax
import numpy as np


class Rounded(NamedTuple):
  """A value and a bound on its error."""

  value: np.ndarray
  error: np.ndarray


class Undecided(Exception):
  """A comparison that rounding could turn round."""


SHAPES: dict[str, Any] = {  # operations that round nothing
  "broadcast_in_dim": lambda v, shape, broadcast_dimensions, **_: np.broadcast_to(
    np.expand_dims(v, [a for a in range(len(shape)) if a not in broadcast_dimensions]), shape
  ),
  "reshape": lambda v, new_sizes, **_: v.reshape(new_sizes),
  "squeeze": lambda v, dimensions: np.squeeze(v, dimensions),
  "transpose": lambda v, permutation: v.transpose(permutation),
  "real": np.real,
  "imag": np.imag,
  "conj": lambda v, **_: np.conj(v),
  "neg": lambda v, **_: -v,
  "copy": lambda v: v,
  "stop_gradient": lambda v: v,
}
UNARY: dict[str, Any] = {  # the function, its derivative from argument and result, and its rounding
  "square": (lambda a: a * a, lambda a, f: 2 * a, 2),
  "sqrt": (np.sqrt, lambda a, f: 0.5 / f, 2),
  "rsqrt": (lambda a: 1 / np.sqrt(a), lambda a, f: 0.5 * f / a, 4),
  "exp": (np.exp, lambda a, f: f, 4),
  "tanh": (np.tanh, lambda a, f: 1 - f * f, 4),
  "one_minus_square": (lambda a: 1 - a * a, lambda a, f: -2 * a, 4),  # in the derivative of tanh
}
BINARY: dict[str, Any] = {  # the function, and its two derivatives
  "add": (np.add, lambda a, b: (1, 1)),
  "add_any": (np.add, lambda a, b: (1, 1)),
  "sub": (np.subtract, lambda a, b: (1, 1)),
  "mul": (np.multiply, lambda a, b: (b, a)),
  "div": (np.divide, lambda a, b: (1 / b, a / b**2)),
}
COMPARISONS = {"gt": np.greater, "lt": np.less, "ge": np.greater_equal, "le": np.less_equal}


def evaluate(function, u, args, errors):
  """function(*args), a tree of `Rounded`, where args (trees of float64 arrays) are off by errors.

  Raises:
    Undecided: a comparison between what is not known well enough.
  """
  with jax.enable_x64(True):
    traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
  given = [
    Rounded(np.asarray(v), np.broadcast_to(e, np.shape(v)))
    for v, e in zip(jax.tree.leaves(args), jax.tree.leaves(errors), strict=True)
  ]
  with np.errstate(all="ignore"):
    results = _run(traced.jaxpr, [_exact(c) for c in traced.consts], given, u)
  return jax.tree.unflatten(jax.tree.structure(shape), results)


def _exact(value):
  value = np.asarray(value)
  return Rounded(value, np.zeros(value.shape))


def _run(jaxpr, consts, args, u):
  known = dict(zip(jaxpr.constvars, consts, strict=True))
  known |= dict(zip(jaxpr.invars, args, strict=True))

  def read(atom):
    return _exact(atom.val) if hasattr(atom, "val") else known[atom]

  for equation in jaxpr.eqns:
    inputs = [read(atom) for atom in equation.invars]
    inner = equation.params.get("jaxpr")
    if inner is None:
      outputs = [_operation(equation, inputs, u)]
    else:
      outputs = _run(inner.jaxpr, [_exact(c) for c in inner.consts], inputs, u)
    known |= dict(zip(equation.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _operation(equation, inputs, u):
  name, params = equation.primitive.name, equation.params
  values, errors = [v.value for v in inputs], [v.error for v in inputs]
  if name in SHAPES:
    of_errors = "copy" if name in ("real", "imag", "conj", "neg") else name
    error = SHAPES[of_errors](errors[0], **(params if of_errors == name else {}))
    return Rounded(SHAPES[name](values[0], **params), error)
  if name == "convert_element_type":
    to_real = not np.issubdtype(params["new_dtype"], np.complexfloating)
    return Rounded(np.real(values[0]) if to_real else values[0] + 0j, errors[0])
  if name == "complex":
    return Rounded(values[0] + 1j * values[1], errors[0] + errors[1])
  if name == "select_n":
    which = values[0].astype(bool)
    return Rounded(*(np.where(which, v[2], v[1]) for v in (values, errors)))
  if name in COMPARISONS:
    return _comparison(name, values, errors)
  if name == "reduce_sum":
    return _sum(values[0], errors[0], params["axes"], u)
  if name == "integer_pow":
    n = params["y"]
    value, slope = values[0] ** n, n * values[0] ** (n - 1)
    return Rounded(value, np.abs(slope) * errors[0] + 2 * abs(n) * u * np.abs(value))
  if name in UNARY:
    function, derivative, roundings = UNARY[name]
    value = function(values[0])
    error = _times(np.abs(derivative(values[0], value)), errors[0])
    return Rounded(value, error + roundings * u * np.abs(value))
  function, derivatives = BINARY[name]
  value = function(*values)
  slopes = derivatives(*values)
  error = sum(_times(np.abs(s), e) for s, e in zip(slopes, errors, strict=True))
  return Rounded(value, error + 2 * u * np.abs(value))


def _times(slope, error):
  """Their product: 0 where there is no error, however steep it is."""
  return np.where(error == 0, 0, slope * error)


def _comparison(name, values, errors):
  margin = errors[0] + errors[1]
  if np.any((margin > 0) & (np.abs(values[0] - values[1]) <= margin)):
    raise Undecided
  value = COMPARISONS[name](*values)
  return Rounded(value, np.zeros(value.shape))


def _sum(values, errors, axes, u):
  n = np.prod([values.shape[a] for a in axes])
  share = (min(n, 6 * np.sqrt(n)) + 4) * u
  return Rounded(values.sum(axes), errors.sum(axes) + share * np.abs(values).sum(axes))
