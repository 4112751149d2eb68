"""Choose, for whitening: the inverse square root of a covariance matrix, and its derivative."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _checks
from jaxbn._dtypes import accumulation_dtype
from jaxbn._names import shown
from jaxbn._types import Array, Numeric
from jaxbn.variants._covariance import real

_METHODS = ("zca", "newton")
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def whitening_matrix(
  cov: Array, *, method: str = "zca", iterations: int = 5, epsilon: Numeric = 1e-5
) -> jax.Array:
  r"""W = (cov + epsilon I)^(-1/2), symmetric, for each covariance matrix.

      "zca"      W = U diag(1/sqrt(l)) U^T  with the eigenvalues l and eigenvectors U of
                 cov + epsilon I                                 (DBN: Huang et al. 2018)
      "newton"   P_0 = I,  P_k = (3 P_{k-1} - P_{k-1}^3 N) / 2,  W = P_T / sqrt(tr)  with
                 N = (cov + epsilon I) / tr, tr its trace    (IterNorm: Huang et al. 2019)

  Newton's method needs no decomposition, only products of matrices, and approaches the other from
  below: directions of little variance, below tr / 2.25^T, are left short of variance 1.

  Args:
    cov: real symmetric matrices, not negative, of shape (..., g, g).
    method: "zca" or "newton".
    iterations: T, for "newton".
    epsilon: added to the diagonal; finite and not negative.

  Returns:
    W, of cov's shape, in float32 at least. An eigenvalue below the largest one's last place, which
    rounding has made, is taken by "zca" to be of that size. NaN where cov is not finite.

  Raises:
    TypeError: iterations that are no integer.
    ValueError: another method; iterations below 1; epsilon out of range; no square matrices.

  >>> import jax.numpy as jnp
  >>> from jaxbn.variants import whitening
  >>> print(whitening.whitening_matrix(jnp.diag(jnp.array([4.0, 0.25])), epsilon=0.0))
  [[0.5 0. ]
   [0.  2. ]]
  """
  cov = real(cov, "cov")
  if cov.ndim < 2 or cov.shape[-1] != cov.shape[-2]:
    raise ValueError(f"cov has shape {cov.shape}; square matrices are needed, (..., g, g).")
  _checks.epsilon_in_range(epsilon)
  require_method(method, iterations)
  cov = cov.astype(accumulation_dtype(cov.dtype))
  identity = _checks.widen(jnp.eye(cov.shape[-1], dtype=cov.dtype), cov)
  # Symmetric but for rounding; the derivative relies on it.
  a = 0.5 * (cov + cov.mT) + jnp.asarray(epsilon, cov.dtype) * identity
  return _roots(a)[0] if method == "zca" else _newton(a, iterations)


@jax.custom_jvp
def _roots(a: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
  r"""W = A^(-1/2) and R = A^(1/2), and the eigenvectors and eigenvalues of R.

  The derivative follows from R R = A and W R = I, and needs no derivative of an eigenvector:

      R dR + dR R = dA,   dW = -W dR W.

  In the basis of eigenvectors the first has the solution dR_ij = dA_ij / (r_i + r_j), so that
  dW_ij = -dA_ij / (r_i r_j (r_i + r_j)): the divided differences of the Daleckii-Krein formula for
  l^(-1/2), without a difference. `custom_linear_solve` differentiates the equation and not its
  solution, so that this holds for derivatives of any order; the third result is only for it.
  """
  eigenvalues, u = jnp.linalg.eigh(a, symmetrize_input=False)
  # What is below the last place of the largest one is rounding, and may be negative.
  eigenvalues = jnp.maximum(eigenvalues, jnp.finfo(a.dtype).eps * eigenvalues[..., -1:])
  r = jnp.sqrt(eigenvalues)
  columns = r[..., None, :]
  return _matmul(u / columns, u.mT), _matmul(u * columns, u.mT), (u, r)


@_roots.defjvp
def _roots_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
  w, root, basis = _roots(*primals)
  u, r = basis

  def solve(_: Any, c: jax.Array) -> jax.Array:
    in_basis = _matmul(_matmul(u.mT, c), u)
    return _matmul(_matmul(u, in_basis / (r[..., :, None] + r[..., None, :])), u.mT)

  def equation(d_root: jax.Array) -> jax.Array:
    return _matmul(root, d_root) + _matmul(d_root, root)

  (d_a,) = tangents
  d_root = lax.custom_linear_solve(equation, d_a, solve, symmetric=True)
  d_w = -_matmul(_matmul(w, d_root), w)
  return (w, root, basis), (d_w, d_root, jax.tree.map(jnp.zeros_like, basis))


def _newton(a: jax.Array, iterations: int) -> jax.Array:
  """IterNorm's P_k, with Q_k = P_k N beside it.

  P_k = T P_{k-1} and Q_k = Q_{k-1} T with T = (3 I - P_{k-1} Q_{k-1}) / 2 are the same matrices as
  the paper's, by as many products; but there rounding grows from step to step unless all
  eigenvalues are of one size (Higham 2008, Functions of Matrices, chapter 6).
  """
  trace = jnp.trace(a, axis1=-2, axis2=-1)[..., None, None]
  identity = _checks.widen(jnp.eye(a.shape[-1], dtype=a.dtype), a)
  p, q = jnp.broadcast_to(identity, a.shape), a / trace
  for _ in range(iterations):
    t = 1.5 * identity - 0.5 * _matmul(p, q)
    p, q = _matmul(t, p), _matmul(q, t)
  return p * lax.rsqrt(trace)


def require_method(method: Any, iterations: Any) -> None:
  if method not in _METHODS:
    raise ValueError(f"method={shown(method)}: it is 'zca' (DBN) or 'newton' (IterNorm).")
  if isinstance(iterations, bool) or not hasattr(iterations, "__index__"):
    raise TypeError(f"iterations={shown(iterations)} is not an integer: pass how many; 5 is usual.")
  if operator.index(iterations) < 1:
    raise ValueError(f"iterations={shown(iterations)}: at least one is needed; 5 is usual.")
