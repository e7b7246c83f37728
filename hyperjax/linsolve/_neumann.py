"""The Neumann series."""

import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .._types import LinearSolve, MatVec, Params, SolveInfo


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
