"""The generalized minimum residual method, for matrices that are not symmetric."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from .. import _checks, _tree
from .._types import LinearSolve, MatVec, Params, Preconditioner, Scalar, SolveInfo
from ._common import damped, flat, preconditioned, scaled, start_from


def gmres(
    *,
    restart: int = 20,
    maxiter: int = 100,
    tol: float | Scalar = 1e-6,
    damping: float | Scalar = 0.0,
    preconditioner: Preconditioner | None = None,
) -> LinearSolve:
    """Restarted GMRES on (A + damping I) x = b, for any A: fixed points, whose A is I - J.

    Between restarts x has the smallest |b - A x| in the Krylov space. That needs `restart` + 1
    vectors of memory, and as many inner products per product with A. A small `restart` may stand
    still on a matrix that is far from positive; it then ends, and `SolveInfo.residual` shows it.

    Args:
      restart: products between restarts, at most `maxiter`; `maxiter` where it is larger.
      maxiter: most products with A, not counting those that build the preconditioner and the one
        for a start x0. One at the end of each cycle finds the true residual, and is counted unless
        it is the last.
      tol: stop when |b - A x| <= tol |b|.
      damping: added to the diagonal, in the units of A.
      preconditioner: P in A P y = b, x = P y, so that residuals stay those of A; need not be
        symmetric.

    Of all x at the ends of cycles, the one with the smallest residual comes back, which is never
    above that of the start; a start worse than zero is replaced by zero. `SolveInfo.curvature` is
    the smallest v'(A P)v over the orthonormal basis; where A is not symmetric its sign does not
    tell whether the solve can be trusted, the residual does.

    Raises ValueError for arguments out of range.

    Reference: Saad and Schultz 1986. Gram-Schmidt is done twice, so that the basis stays
    orthogonal in float32.
    """
    _checks.positive_int("gmres", "restart", restart)
    _checks.positive_int("gmres", "maxiter", maxiter)
    _checks.number("gmres", "tol", tol)
    _checks.number("gmres", "damping", damping)
    length = min(restart, maxiter)

    def solve(matvec: MatVec, b: Params, x0: Params | None = None, /) -> tuple[Params, SolveInfo]:
        size, unit = scaled(b)
        product = damped(matvec, damping)
        precondition, built = preconditioned(preconditioner, product, unit)
        x, r, count = start_from(product, unit, size, x0)
        unravel = ravel_pytree(unit)[1]
        rhs, a, p = ravel_pytree(unit)[0], flat(product, unit), flat(precondition, unit)
        x, r = ravel_pytree(x)[0], ravel_pytree(r)[0]
        start = _Cycle(x, r, _tree.norm(r), count, jnp.inf + _tree.norm(r) * 0, count < 0)
        most = maxiter + count  # the start has its product beside
        running = lambda s: (s.steps < most) & (s.norm > tol) & ~s.stopped
        cycle = lambda s: _cycle(a, p, rhs, length, most, tol, s)
        end = lax.while_loop(running, cycle, start)
        # The last product of the last cycle was for the report.
        report = (end.steps > count).astype(count.dtype)
        left = _tree.norm(end.r + damping * end.x)  # of A without damping
        left = jnp.where(jnp.isnan(end.norm), end.norm, left)
        info = SolveInfo(end.steps - report + built, left, end.low)
        return _tree.scale(size, unravel(end.x)), info

    return solve


class _Cycle(NamedTuple):
    x: jax.Array  # [n]
    r: jax.Array
    norm: Scalar  # of r, by a product
    steps: jax.Array
    low: Scalar
    stopped: jax.Array


class _Arnoldi(NamedTuple):
    basis: jax.Array  # [m + 1, n], orthonormal rows, zero where not reached
    q: jax.Array  # [m + 1, m + 1]: all rotations so far
    upper: jax.Array  # [m + 1, m + 1]: q times the Hessenberg matrix; the identity beyond
    j: jax.Array  # columns that are used
    steps: jax.Array
    high: Scalar
    low: Scalar
    left: Scalar  # norm of the residual
    stopped: jax.Array


def _cycle(
    matvec: MatVec,
    precondition: MatVec,
    b: jax.Array,
    length: int,
    most: jax.Array,
    tol: float | Scalar,
    s: _Cycle,
) -> _Cycle:
    """One run of Arnoldi from the residual of `s.x`, and the true residual where it leads."""
    budget = most - s.steps
    running = lambda a: (a.j < jnp.minimum(length, budget)) & (a.left > tol) & ~a.stopped
    step = lambda a: _arnoldi(lambda v: matvec(precondition(v)), s.norm, a)
    end = lax.while_loop(running, step, _arnoldi_init(s, length))
    # Beyond what was reached `upper` is the identity and `g` is zero.
    g = jnp.where(jnp.arange(length) < end.j, end.q[:length, 0] * s.norm, 0)
    y = jax.scipy.linalg.solve_triangular(end.upper[:length, :length], g)
    x = s.x + precondition(y @ end.basis[:length])
    r = b - matvec(x)
    norm = _tree.norm(r)
    better = norm < s.norm
    return _Cycle(
        x=jnp.where(better, x, s.x),
        r=jnp.where(better, r, s.r),
        norm=jnp.where(better | jnp.isnan(norm), norm, s.norm),  # a NaN is not hidden
        steps=s.steps + end.steps + 1,
        low=jnp.minimum(s.low, end.low),
        stopped=~(norm < 0.999 * s.norm),  # a cycle of no use is followed by others
    )


def _arnoldi_init(s: _Cycle, length: int) -> _Arnoldi:
    # All derived from `r`, so that inside shard_map it varies over the axes that b varies over.
    none, eye = s.norm * 0, jnp.eye(length + 1, dtype=s.r.dtype)
    basis = jnp.zeros((length + 1, s.r.size), s.r.dtype) + none
    basis = basis.at[0].set(s.r / jnp.where(s.norm > 0, s.norm, 1))
    return _Arnoldi(
        basis=basis,
        q=eye + none,
        upper=eye + none,
        j=s.steps * 0,
        steps=s.steps * 0,
        high=none,
        low=none + jnp.inf,
        left=s.norm,
        stopped=none > 0,
    )


def _arnoldi(matvec: MatVec, norm: Scalar, s: _Arnoldi) -> _Arnoldi:
    v = s.basis[s.j]
    w = matvec(v)
    high = jnp.maximum(s.high, _tree.norm(w))
    h = s.basis @ w
    w = w - h @ s.basis
    again = s.basis @ w
    h, w = h + again, w - again @ s.basis
    beta = _tree.norm(w)

    # The new column of the Hessenberg matrix, turned as the columns before it, and one rotation
    # more that takes `beta` below the diagonal to zero.
    column = (s.q @ h).at[s.j + 1].set(beta)
    above = column[s.j]
    rho = jnp.hypot(above, beta)
    tiny = 4 * jnp.finfo(rho.dtype).eps * high
    usable = rho > tiny  # otherwise A is singular on this space; a NaN stops as well
    divisor = jnp.where(usable, rho, 1)
    c, sine = above / divisor, beta / divisor
    first, second = s.q[s.j], s.q[s.j + 1]
    q = s.q.at[s.j].set(c * first + sine * second)
    q = q.at[s.j + 1].set(c * second - sine * first)
    column = column.at[s.j].set(rho).at[s.j + 1].set(0)
    keep = lambda new, old: jnp.where(usable, new, old)
    return _Arnoldi(
        basis=s.basis.at[s.j + 1].set(w / jnp.where(beta > 0, beta, 1)),
        q=keep(q, s.q),
        upper=keep(s.upper.at[:, s.j].set(column), s.upper),
        j=s.j + usable.astype(s.j.dtype),
        steps=s.steps + 1,
        high=high,
        low=jnp.minimum(s.low, h[s.j]),
        left=keep(jnp.abs(q[s.j + 1, 0]) * norm, s.left),
        stopped=~usable | ~(beta > tiny),
    )
