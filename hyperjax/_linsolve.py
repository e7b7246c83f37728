"""Linear solves by products with the matrix only: `solve(matvec, b) -> (x, SolveInfo)`.

Vectors are pytrees. A solve is a plain function with a loop inside; `linear_solve` gives it a
derivative under every transform.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks, _tree
from ._types import LinearSolve, MatVec, Params, PyTree, Scalar, SolveInfo


def cg(*, maxiter: int = 100, tol: float = 1e-6, damping: float = 0.0) -> LinearSolve:
    """Conjugate gradients on (A + damping I) x = b, safe when A is not positive definite.

    Args:
      maxiter: most products with A; a small number truncates, as is usual in bilevel work.
      tol: stop when |b - A x| <= tol |b| by the recurrence of the method; the report is exact.
      damping: added to the diagonal, in the units of A.

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
    """
    _checks.positive_int("cg", "maxiter", maxiter)
    if not tol >= 0:
        raise ValueError(f"cg: `tol` must be >= 0; got {tol!r}.")
    if not damping >= 0:
        raise ValueError(f"cg: `damping` must be >= 0; got {damping!r}.")

    def solve(matvec: MatVec, b: Params) -> tuple[Params, SolveInfo]:
        size = _tree.norm(b)
        unit = _tree.scale(1 / jnp.where(size > 0, size, 1), b)
        damped = lambda p: _tree.axpy(damping, p, matvec(p)) if damping else matvec(p)
        start = _cg_init(unit)
        running = lambda s: (s.steps < maxiter) & (s.rr > tol**2) & ~s.stopped
        end = lax.while_loop(running, lambda s: _cg_step(damped, s), start)
        x = _tree.where(end.stopped, end.best, end.x)
        # By one more product: rounding lets the residual of the recurrence fall far below the true
        # one (float32, condition 1e6: 1e-5 against 0.2).
        residual = _tree.norm(_tree.sub(unit, damped(x)))
        return _tree.scale(size, x), SolveInfo(end.steps, residual, end.low)

    return solve


class _CG(NamedTuple):
    x: Params
    r: Params
    p: Params
    rr: Scalar
    best: Params
    best_rr: Scalar
    low: Scalar  # smallest and largest curvature met
    high: Scalar
    steps: jax.Array
    stopped: jax.Array


def _cg_init(b: Params) -> _CG:
    zeros, rr = _tree.zeros_like(b), _tree.dot(b, b)
    # All derived from `b`, so that inside shard_map it varies over the axes that b varies over.
    none = rr * 0
    infinite = none + jnp.inf
    count = (none * 0).astype(jnp.int32)
    return _CG(zeros, b, b, rr, zeros, rr, infinite, none, count, none > 0)


def _cg_step(matvec: MatVec, s: _CG) -> _CG:
    ap = matvec(s.p)
    pap, pp = _tree.dot(s.p, ap), _tree.dot(s.p, s.p)
    curvature = pap / pp
    high = jnp.maximum(s.high, jnp.abs(curvature))
    # Below rounding of the largest curvature the sign means nothing. A NaN stops as well.
    usable = curvature > 4 * jnp.finfo(pap.dtype).eps * high
    step = jnp.where(usable, s.rr / jnp.where(usable, pap, 1), 0)
    x, r = _tree.axpy(step, s.p, s.x), _tree.axpy(-step, ap, s.r)
    rr = jnp.where(usable, _tree.dot(r, r), s.rr)
    p = _tree.axpy(rr / s.rr, s.p, r)
    better = usable & (rr < s.best_rr)
    return _CG(
        x=x,
        r=r,
        p=p,
        rr=rr,
        best=_tree.where(better, x, s.best),
        best_rr=jnp.where(better, rr, s.best_rr),
        low=jnp.minimum(s.low, curvature),
        high=high,
        steps=s.steps + 1,
        stopped=~usable,
    )


def neumann(terms: int, scale: float) -> LinearSolve:
    """The truncated series x = scale * sum over i < terms of (I - scale A)^i b.

    It converges for 0 < scale < 2 / (largest eigenvalue of A); `SolveInfo.residual` above 1 shows
    that it does not. Lorraine, Vicol and Duvenaud 2020 (arXiv 1911.02590), Algorithm 3; their code
    omits the leading `scale`.
    """
    _checks.positive_int("neumann", "terms", terms)
    if not scale > 0:
        raise ValueError(f"neumann: `scale` must be positive; got {scale!r}.")

    def solve(matvec: MatVec, b: Params) -> tuple[Params, SolveInfo]:
        def body(state, _):
            x, r, low = state  # r = (I - scale A)^i b is also the residual b - A x
            ar, rr = matvec(r), _tree.dot(r, r)
            curvature = _tree.dot(r, ar) / jnp.where(rr > 0, rr, 1)
            low = jnp.where(rr > 0, jnp.minimum(low, curvature), low)  # r = 0 has no curvature
            return (_tree.axpy(scale, r, x), _tree.axpy(-scale, ar, r), low), None

        size = _tree.norm(b)
        unit = _tree.scale(1 / jnp.where(size > 0, size, 1), b)
        infinite = _tree.dot(unit, unit) * 0 + jnp.inf
        (x, r, low), _ = lax.scan(body, (_tree.zeros_like(b), unit, infinite), None, length=terms)
        count = (size * 0).astype(jnp.int32) + terms
        return _tree.scale(size, x), SolveInfo(count, _tree.norm(r), low)

    return solve


def linear_solve(solve: LinearSolve, matvec: MatVec, b: Params) -> tuple[Params, SolveInfo]:
    """`solve(matvec, b)` with the derivative of A^-1 b, forward and reverse, to any order.

    The derivative is that of the exact solution, dx = A^-1 (db - dA x), with A^-1 applied by
    `solve` again. `matvec` may close over values that are differentiated. Inside shard_map, b
    must be replicated or vary over the same axes in all leaves.
    """

    def run(matvec, b):
        x, info = solve(matvec, b)
        return x, lax.stop_gradient(info)

    axes = _replicated_axes(b)
    if not axes:
        return lax.custom_linear_solve(matvec, b, run, transpose_solve=run, has_aux=True)

    # Inside shard_map the data that `matvec` closes over varies along mesh axes, b and x do not,
    # and lax.custom_linear_solve types its result by everything it closes over. So it is run on
    # vectors that vary in type and agree in value: `join` is then the identity on values, and
    # brings the type back.
    vary = lambda tree: jax.tree.map(lambda v: lax.pcast(v, axes, to="varying"), tree)
    join = lambda tree: jax.tree.map(lambda v: lax.pmean(v, axes), tree)
    # The jit keeps the product in one piece with types of its own: when it is lowered, everything
    # that it closes over is said to vary.
    product = jax.jit(lambda v: vary(matvec(join(v))))
    x, info = lax.custom_linear_solve(product, vary(b), run, transpose_solve=run, has_aux=True)
    agree = jax.tree.map(lambda v: lax.pmax(lax.stop_gradient(v), axes), info)
    return join(x), agree


def _replicated_axes(b: PyTree) -> tuple[str, ...]:
    """The manual mesh axes, if any, over which `b` does not vary."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return ()
    varying = {jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(b)}
    if len(varying) > 1:
        raise ValueError(
            "linear_solve: inside shard_map all leaves of the right-hand side must vary over the "
            f"same mesh axes; got {sorted(map(sorted, varying))}. Replicate the parameters, or "
            "shard them by jit instead of shard_map."
        )
    return tuple(a for a in manual if a not in next(iter(varying)))
