"""Solves without iteration."""

import jax.numpy as jnp

from .. import _checks, _tree
from .._types import LinearSolve, MatVec, Params, Preconditioner, Scalar, SolveInfo, State
from ._common import scaled


def one_shot(preconditioner: Preconditioner) -> LinearSolve:
    """x = x0 + P (b - A x0) with P the approximation of A^-1.

    Costs what P costs to build, and a product for a start x0 other than None. The residual that
    is reported is that of A, by one more product. Raises TypeError if `preconditioner` is none.
    """
    _checks.has_functions("one_shot", "preconditioner", preconditioner, ("build", "apply"))

    def solve(matvec: MatVec, b: Params, x0: Params | None = None, /) -> tuple[Params, SolveInfo]:
        size, unit = scaled(b)
        state = preconditioner.build(matvec, unit)
        count = (size * 0).astype(jnp.int32) + preconditioner.products
        if x0 is None:
            x = preconditioner.apply(state, unit)
        else:
            start = _tree.scale(1 / jnp.where(size > 0, size, 1), x0)
            left = _tree.sub(unit, matvec(start))
            x, count = _tree.axpy(1, start, preconditioner.apply(state, left)), count + 1
        ax = matvec(x)
        xx = _tree.dot(x, x)
        low = jnp.where(xx == 0, jnp.inf, _tree.dot(x, ax) / jnp.where(xx == 0, 1, xx))
        info = SolveInfo(count, _tree.norm(_tree.sub(unit, ax)), low)
        return _tree.scale(size, x), info

    return solve


def identity(scale: float | Scalar = 1.0) -> LinearSolve:
    """x = scale b: the inverse of A is taken to be `scale` times the identity. No products.

    T1-T2 (Luketina et al. 2016, arXiv 1511.06727) for a stationary point, with `scale` the rate of
    the inner steps; "Jacobian-free" backpropagation (Fung et al. 2022, arXiv 2103.12803) with
    scale 1 for a fixed point. `SolveInfo.residual` says how wrong it is.
    """
    _checks.number("identity", "scale", scale, positive=True)
    return one_shot(Preconditioner(lambda matvec, like: (), lambda state, v: _tree.scale(scale, v)))


def prebuilt(preconditioner: Preconditioner, state: State) -> Preconditioner:
    """`preconditioner` as it was built before: `state` came from its `build`.

    Solves then spend no products on it. How old the state may be depends on how fast A changes:
    with `cg` an old one costs iterations, never correctness.
    """
    _checks.has_functions("prebuilt", "preconditioner", preconditioner, ("build", "apply"))
    return Preconditioner(lambda matvec, like: state, preconditioner.apply)
