"""The minimum residual method, for symmetric matrices of any sign."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .._types import LinearSolve, MatVec, Params, Scalar, SolveInfo
from ._common import damped, residual, scaled, start_from


def minres(
    *, maxiter: int = 100, tol: float | Scalar = 1e-6, damping: float | Scalar = 0.0
) -> LinearSolve:
    """The x with the smallest |b - (A + damping I) x| in the Krylov space, for symmetric A.

    A may be indefinite, as it is at a saddle point. Where it is positive definite, `cg` is nearer
    to the solution after as many products. At a minimum the adjoint system is positive definite:
    negative curvature there says that the point is no minimum.

    Args:
      maxiter: most products with A, beside one for the residual of a start x0.
      tol: stop when |b - A x| <= tol |b| by the recurrence of the method; the report is exact.
      damping: added to the diagonal, in the units of A.

    It ends early where the Krylov space does: then x is exact, or A is singular and x is the best
    there is in that space. Every test is relative to b and A. `SolveInfo.curvature` is the smallest
    Rayleigh quotient of the Lanczos vectors and of the residuals (Liu and Roosta 2022, arXiv
    2206.05732, for the latter at no cost), of A + damping I.

    A start x0 whose residual is above that of zero is replaced by zero.

    Raises ValueError for arguments out of range.

    Reference: Paige and Saunders 1975, Solution of sparse indefinite systems of linear equations,
    section 6. Lanczos without reorthogonalization: rounding makes it slower, not wrong.
    """
    _checks.positive_int("minres", "maxiter", maxiter)
    _checks.number("minres", "tol", tol)
    _checks.number("minres", "damping", damping)

    def solve(matvec: MatVec, b: Params, x0: Params | None = None, /) -> tuple[Params, SolveInfo]:
        size, unit = scaled(b)
        product = damped(matvec, damping)
        start = _init(*start_from(product, unit, size, x0))
        most = maxiter + start.steps  # the start has its product beside
        running = lambda s: (s.steps < most) & (jnp.abs(s.phi) > tol) & ~s.stopped
        end = lax.while_loop(running, lambda s: _step(product, s), start)
        info = SolveInfo(end.steps, residual(matvec, unit, end.x), end.low)
        return _tree.scale(size, end.x), info

    return solve


class _MinRes(NamedTuple):
    x: Params
    v: Params  # Lanczos vectors, this one and the one before
    v_before: Params
    beta: Scalar  # v'A v_before
    # A v_k = beta_k v_(k-1) + alpha_k v_k + beta_(k+1) v_(k+1) is a tridiagonal T; reflections
    # [c s; s -c] bring it to upper triangular form with the three diagonals gamma, delta, epsilon.
    c: Scalar
    s: Scalar
    delta: Scalar  # what the reflection before left above the diagonal
    epsilon: Scalar
    d: Params  # directions: columns of V R^-1, this one and the one before
    d_before: Params
    phi: Scalar  # |b - A x|
    low: Scalar
    high: Scalar  # largest entry of T met
    steps: jax.Array
    stopped: jax.Array


def _init(x: Params, r: Params, products: jax.Array) -> _MinRes:
    phi, v = scaled(r)
    # All derived from `r`, so that inside shard_map it varies over the axes that b varies over.
    none = phi * 0
    nil = _tree.zeros_like(v)
    return _MinRes(
        x=x,
        v=v,
        v_before=nil,
        beta=none,
        c=none - 1,
        s=none,
        delta=none,
        epsilon=none,
        d=nil,
        d_before=nil,
        phi=phi,
        low=none + jnp.inf,
        high=none,
        steps=products,
        stopped=none > 0,
    )


def _step(matvec: MatVec, s: _MinRes) -> _MinRes:
    av = matvec(s.v)
    alpha = _tree.dot(s.v, av)
    beta, v = scaled(_tree.axpy(-alpha, s.v, _tree.axpy(-s.beta, s.v_before, av)))
    high = jnp.maximum(s.high, jnp.maximum(jnp.abs(alpha), beta))

    delta = s.c * s.delta + s.s * alpha
    left = s.s * s.delta - s.c * alpha
    gamma = jnp.hypot(left, beta)
    # |A r| / |r| of the residual r so far. Where it is zero, or gamma is, x is a least-squares
    # solution of a singular system, and a further step leads to nowhere. A NaN stops as well.
    reach, eps = jnp.hypot(left, s.c * beta), jnp.finfo(gamma.dtype).eps
    tiny = 4 * eps * high
    usable = (gamma > tiny) & (reach > eps**0.75 * high)
    divisor = jnp.where(usable, gamma, 1)
    c, sine = left / divisor, beta / divisor
    numerator = _tree.axpy(-s.epsilon, s.d_before, _tree.axpy(-delta, s.d, s.v))
    d = _tree.scale(1 / divisor, numerator)
    length = jnp.where(usable, c * s.phi, 0)
    return _MinRes(
        x=_tree.where(usable, _tree.axpy(length, d, s.x), s.x),
        v=v,
        v_before=s.v,
        beta=beta,
        c=c,
        s=sine,
        delta=-s.c * beta,
        epsilon=s.s * beta,
        d=d,
        d_before=s.d,
        phi=jnp.where(usable, sine * s.phi, s.phi),
        # The second is r'Ar / r'r of the residual r of the step before.
        low=jnp.minimum(s.low, jnp.minimum(alpha, -s.c * left)),
        high=high,
        steps=s.steps + 1,
        stopped=~usable | ~(beta > tiny),
    )
