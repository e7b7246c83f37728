"""The Neumann series."""

from typing import Literal

import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .._types import LinearSolve, MatVec, Params, Scalar, SolveInfo
from ._common import advance, scaled, start_from


def neumann(
    terms: int, scale: float | Scalar | Literal["auto"] = "auto", *, powers: int = 6
) -> LinearSolve:
    """The truncated series x = x0 + scale * sum over i < terms of (I - scale A)^i (b - A x0).

    Args:
      terms: products with A in the series.
      scale: in the units of 1 / A. For symmetric A it converges for 0 < scale < 2 / (largest
        eigenvalue); `SolveInfo.residual` above 1 shows that it does not. "auto" takes 1 / |A v|
        for the unit vector v that `powers` - 1 power iterations make of the right-hand side: it
        converges if A is symmetric, positive definite, and |A v| has come above half the largest
        eigenvalue. The right scale for the map of a fixed point, A = I - J, is 1.
      powers: products spent on "auto"; they are counted in `SolveInfo.iterations`.

    The power iterations begin at the right-hand side and need no key: what it has no part in, the
    series does not meet either.

    Raises ValueError for arguments out of range.

    Lorraine, Vicol and Duvenaud 2020 (arXiv 1911.02590), Algorithm 3; their code omits the leading
    `scale`.
    """
    _checks.positive_int("neumann", "terms", terms)
    _checks.positive_int("neumann", "powers", powers)
    if isinstance(scale, str):
        _checks.one_of("neumann", "scale", scale, ("auto",))
    else:
        _checks.number("neumann", "scale", scale, positive=True)

    def solve(matvec: MatVec, b: Params, x0: Params | None = None, /) -> tuple[Params, SolveInfo]:
        size, unit = scaled(b)
        if isinstance(scale, str):
            step, spent = _inverse_norm(matvec, unit, powers), powers
        else:
            step, spent = scale, 0
        x, r, count = start_from(matvec, unit, size, x0)

        def body(state, _):
            x, r, rr, low = state  # r is the residual b - A x
            x, new, square, curved = advance(step, x, r, r, matvec(r))
            curvature = (curved / jnp.where(rr > 0, rr, 1)).astype(low.dtype)
            low = jnp.where(rr > 0, jnp.minimum(low, curvature), low)  # r = 0 has no curvature
            return (x, new, square.astype(rr.dtype), low), None

        rr = _tree.dot(r, r)
        (x, r, _, low), _ = lax.scan(body, (x, r, rr, rr * 0 + jnp.inf), None, length=terms)
        return _tree.scale(size, x), SolveInfo(count + terms + spent, _tree.norm(r), low)

    return solve


def _inverse_norm(matvec: MatVec, v: Params, powers: int) -> Scalar:
    """1 / |A v| after `powers` products, each on the unit vector along the last; 1 if A v = 0."""

    def body(state, _):
        v, _ = state
        size, v = scaled(matvec(v))
        return (v, size), None

    (_, size), _ = lax.scan(body, (v, _tree.dot(v, v)), None, length=powers)
    return 1 / jnp.where(size > 0, size, 1)
