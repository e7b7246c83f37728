"""Solves without iteration."""

from .. import _checks, _tree
from .._types import LinearSolve, MatVec, Params, Preconditioner, Scalar, SolveInfo, State
from ._common import quotient, scaled, start_from


def one_shot(preconditioner: Preconditioner) -> LinearSolve:
    """x = x0 + P (b - A x0) with P the approximation of A^-1.

    Costs what P costs to build, and a product for a start x0 other than None; one that is worse
    than zero is replaced by zero. The residual that is reported is that of A, by one more product.

    Raises TypeError if `preconditioner` is none.
    """
    _checks.has_functions("one_shot", "preconditioner", preconditioner, ("build", "apply"))

    def solve(matvec: MatVec, b: Params, x0: Params | None = None, /) -> tuple[Params, SolveInfo]:
        size, unit = scaled(b)
        state = preconditioner.build(matvec, unit)
        start, left, count = start_from(matvec, unit, size, x0)
        x = _tree.axpy(1, preconditioner.apply(state, left), start)
        ax = matvec(x)
        left = _tree.norm(_tree.sub(unit, ax))
        info = SolveInfo(count + preconditioner.products, left, quotient(x, ax))
        return _tree.scale(size, x), info

    return solve


def identity(scale: float | Scalar = 1.0) -> LinearSolve:
    """x = scale b: the inverse of A is taken to be `scale` times the identity. No products.

    T1-T2 (Luketina et al. 2016, arXiv 1511.06727) for a stationary point, with `scale` the rate of
    the inner steps; "Jacobian-free" backpropagation (Fung et al. 2022, arXiv 2103.12803) with
    scale 1 for a fixed point. `SolveInfo.residual` says how wrong it is.

    Raises ValueError unless `scale` is a positive number.
    """
    _checks.number("identity", "scale", scale, positive=True)
    return one_shot(Preconditioner(lambda matvec, like: (), lambda state, v: _tree.scale(scale, v)))


def prebuilt(preconditioner: Preconditioner, state: State) -> Preconditioner:
    """`preconditioner` as it was built before: `state` came from its `build`.

    Solves then spend no products on it. How old the state may be depends on how fast A changes:
    with `cg` an old one costs iterations, never correctness.

    Raises TypeError for what is no `Preconditioner`.
    """
    _checks.has_functions("prebuilt", "preconditioner", preconditioner, ("build", "apply"))
    return Preconditioner(lambda matvec, like: state, preconditioner.apply)
