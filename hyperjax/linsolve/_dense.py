"""A direct solve, for small problems."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .. import _checks, _tree
from .._types import LinearSolve, MatVec, Params, Scalar, SolveInfo
from ._common import damped, flat, products, quotient, scaled


def dense(
    *,
    factor: Literal["cholesky", "lu"] = "cholesky",
    damping: float | Scalar = 0.0,
    chunk: int = 256,
) -> LinearSolve:
    """Solve (A + damping I) x = b by a factorization of A, which is written out.

    The n columns take n products, `chunk` of them at a time (a smaller number saves memory), and
    the factorization n^2 numbers and some n^3 / 3 operations. There is nothing to begin from: x0 is
    ignored.

    Args:
      factor: "cholesky" for symmetric positive definite A, "lu" for any other that is not singular.
        Where Cholesky meets a matrix that is not positive definite, x and `SolveInfo.residual` are
        NaN. It solves with (A + A') / 2, so that an A that is not symmetric shows by its
        residual.
      damping: added to the diagonal, in the units of A.
      chunk: columns at a time.

    `SolveInfo.curvature` is the smallest p'Ap / p'p over unit vectors, the diagonal of A + damping
    I, and x.

    Raises ValueError for arguments out of range.
    """
    _checks.one_of("dense", "factor", factor, ("cholesky", "lu"))
    _checks.number("dense", "damping", damping)
    _checks.positive_int("dense", "chunk", chunk)

    def solve(matvec: MatVec, b: Params, x0: Params | None = None, /) -> tuple[Params, SolveInfo]:
        size, unit = scaled(b)
        rhs, unravel = ravel_pytree(unit)
        product = flat(damped(matvec, damping), unit)
        eye = _tree.vary_like(jnp.eye(rhs.size, dtype=rhs.dtype), rhs)
        a = products(product, eye, chunk).T
        if factor == "cholesky":
            x = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a), True), rhs)
        else:
            x = jnp.linalg.solve(a, rhs)
        ax = product(x)
        low = jnp.minimum(jnp.min(jnp.diagonal(a)), quotient(x, ax))
        count = (size * 0).astype(jnp.int32) + rhs.size
        info = SolveInfo(count, jnp.linalg.norm(rhs - ax + damping * x), low)
        return jax.tree.map(lambda u: (size * u).astype(u.dtype), unravel(x)), info

    return solve
