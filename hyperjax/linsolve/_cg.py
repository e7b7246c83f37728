"""Conjugate gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .._types import LinearSolve, MatVec, Params, Preconditioner, Scalar, SolveInfo
from ._common import advance, damped, preconditioned, residual, scaled, start_from


def cg(
    *,
    maxiter: int = 100,
    tol: float | Scalar = 1e-6,
    damping: float | Scalar = 0.0,
    preconditioner: Preconditioner | None = None,
) -> LinearSolve:
    """Conjugate gradients on (A + damping I) x = b, safe when A is not positive definite.

    Args:
      maxiter: most products with A, not counting those that build the preconditioner and the one
        for a start x0; a small number truncates, as is usual in bilevel work.
      tol: stop when |b - A x| <= tol |b| by the recurrence of the method; the report is exact.
      damping: added to the diagonal, in the units of A.
      preconditioner: `jacobi`, `nystrom_preconditioner` or your own, symmetric and positive
        definite. Built anew for each solve; `prebuilt` keeps one for many.

    Four departures from the textbook, because Hessians of networks are indefinite and float32 is
    what accelerators have (Nocedal and Wright 2006, Algorithm 7.1, for the first):

    1. It stops where a direction p has p'Ap <= 0, up to rounding of the largest curvature met,
       rather than step along it to nowhere.
    2. Where it has stopped so, it returns the iterate with the smallest residual. Otherwise the
       last one, which is the optimum of its Krylov space in the norm of A, although its residual
       may be above one that came before, and on ill-conditioned systems above that of x = 0.
    3. b is scaled to unit norm first and every test is relative, so that c A and c b for any c
       give the same iterates.
    4. The result comes with a `SolveInfo`; `curvature` is that of A + damping I.

    A start x0 whose residual is above that of zero is replaced by zero.

    Raises ValueError for arguments out of range.
    """
    _checks.positive_int("cg", "maxiter", maxiter)
    _checks.number("cg", "tol", tol)
    _checks.number("cg", "damping", damping)

    def solve(matvec: MatVec, b: Params, x0: Params | None = None, /) -> tuple[Params, SolveInfo]:
        size, unit = scaled(b)
        product = damped(matvec, damping)
        precondition, built = preconditioned(preconditioner, product, unit)
        start = _cg_init(precondition, *start_from(product, unit, size, x0))
        most = maxiter + start.steps  # the start has its product beside
        running = lambda s: (s.steps < most) & (s.rr > tol**2) & ~s.stopped
        end = lax.while_loop(running, lambda s: _cg_step(product, precondition, s), start)
        x = _tree.where(end.stopped, end.best, end.x)
        info = SolveInfo(end.steps + built, residual(matvec, unit, x), end.low)
        return _tree.scale(size, x), info

    return solve


class _CG(NamedTuple):
    x: Params
    r: Params
    p: Params
    rr: Scalar
    rz: Scalar  # r'z with z the preconditioned residual
    best: Params
    best_rr: Scalar
    low: Scalar  # smallest and largest curvature met
    high: Scalar
    steps: jax.Array
    stopped: jax.Array


def _cg_init(precondition: MatVec, x: Params, r: Params, products: jax.Array) -> _CG:
    z, rr = precondition(r), _tree.dot(r, r)
    # All derived from `r`, so that inside shard_map it varies over the axes that b varies over.
    none = rr * 0
    return _CG(x, r, z, rr, _tree.dot(r, z), x, rr, none + jnp.inf, none, products, none > 0)


def _cg_step(matvec: MatVec, precondition: MatVec, s: _CG) -> _CG:
    ap = matvec(s.p)
    pap, pp = _tree.dot(s.p, ap), _tree.dot(s.p, s.p)
    curvature = pap / pp
    high = jnp.maximum(s.high, jnp.abs(curvature))
    # Below rounding of the largest curvature the sign means nothing. A NaN stops as well, and so
    # does a preconditioner that is not positive definite.
    usable = (curvature > 4 * jnp.finfo(pap.dtype).eps * high) & (s.rz > 0)
    step = jnp.where(usable, s.rz / jnp.where(usable, pap, 1), 0)
    x, r, rr, _ = advance(step, s.x, s.r, s.p, ap)
    rr = jnp.where(usable, rr, s.rr).astype(s.rr.dtype)
    z = precondition(r)
    rz = _tree.dot(r, z)
    better = usable & (rr < s.best_rr)
    return _CG(
        x=x,
        r=r,
        p=_tree.axpy(rz / jnp.where(usable, s.rz, 1), s.p, z),
        rr=rr,
        rz=rz,
        best=_tree.where(better, x, s.best),
        best_rr=jnp.where(better, rr, s.best_rr),
        low=jnp.minimum(s.low, curvature),
        high=high,
        steps=s.steps + 1,
        stopped=~usable,
    )
