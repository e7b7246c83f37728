"""A derivative for any solve."""

import jax
from jax import lax

from .. import _tree
from .._types import LinearSolve, MatVec, Params, PyTree, SolveInfo
from ._common import widened


def linear_solve(
    solve: LinearSolve, matvec: MatVec, b: Params, x0: Params | None = None
) -> tuple[Params, SolveInfo]:
    """`solve(matvec, b, x0)` with the derivative of A^-1 b, forward and reverse, to any order.

    The derivative is that of the exact solution, dx = A^-1 (db - dA x), with A^-1 applied by
    `solve` again, from zero. `matvec` may close over values that are differentiated. Inside
    shard_map, b must be replicated or vary over the same axes in all leaves, and x0 like b.

    Leaves of half precision are solved for in float32, where inner products and residuals mean
    something; only their products with A are in their own precision.
    """
    product, rhs = widened(matvec, b)
    if x0 is None:
        x, info = _from_zero(solve, product, rhs)
    else:
        x, info = _from(_tree.cast_like(_tree.vary_like(x0, b), rhs), solve, product, rhs)
    return _tree.cast_like(x, b), info


def _from(x0, solve, matvec, b):
    """As a root of A x = b that is given: where the search begins does not move where it ends.

    Not by a start in `lax.custom_linear_solve`, which would serve for the tangents as well.
    """
    product, consts = jax.closure_convert(matvec, b)
    constants = lax.stop_gradient((b, x0, consts))
    x, info = lax.stop_gradient(_search(solve, product, *constants))
    zero = lambda v: _tree.sub(matvec(v), b)
    tangent_solve = lambda linear, y: _from_zero(solve, linear, y)[0]
    return lax.custom_root(zero, x, lambda _, guess: guess, tangent_solve), info


def _search(solve, product, b, x0, consts):
    return solve(lambda v: product(v, *consts), b, x0)


def _from_zero(solve, matvec, b):
    def run(matvec, b):
        x, info = solve(matvec, b, None)
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
    # A jit keeps its content in one piece with types of its own: when it is lowered, everything
    # that it closes over is said to vary. `solve` may close over a preconditioner.
    product = jax.jit(lambda v: vary(matvec(join(v))))
    whole = lambda matvec, b: jax.jit(lambda b: run(matvec, b))(b)
    x, info = lax.custom_linear_solve(product, vary(b), whole, transpose_solve=whole, has_aux=True)
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
