"""A derivative for any solve."""

import jax
import jax.numpy as jnp
from jax import lax

from .. import _tree
from .._types import LinearSolve, MatVec, Params, PyTree, SolveInfo


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
    types = jax.tree.map(jnp.result_type, b)
    wide = jax.tree.map(lambda t: jnp.promote_types(t, jnp.float32), types)
    if wide != types:
        cast = lambda tree, to: jax.tree.map(lambda v, t: v.astype(t), tree, to)
        product = lambda v: cast(matvec(cast(v, types)), wide)
        start = None if x0 is None else cast(x0, wide)
        x, info = linear_solve(solve, product, cast(b, wide), start)
        return cast(x, types), info

    def run(matvec, b, x0=None):
        x, info = solve(matvec, b, x0)
        return x, lax.stop_gradient(info)

    # Where the search begins does not move where it ends.
    x0 = lax.stop_gradient(_tree.vary_like(x0, b))
    axes = _replicated_axes(b)
    if not axes:
        first = lambda matvec, b: run(matvec, b, x0)
        return lax.custom_linear_solve(matvec, b, first, transpose_solve=run, has_aux=True)

    # Inside shard_map the data that `matvec` closes over varies along mesh axes, b and x do not,
    # and lax.custom_linear_solve types its result by everything it closes over. So it is run on
    # vectors that vary in type and agree in value: `join` is then the identity on values, and
    # brings the type back.
    vary = lambda tree: jax.tree.map(lambda v: lax.pcast(v, axes, to="varying"), tree)
    join = lambda tree: jax.tree.map(lambda v: lax.pmean(v, axes), tree)
    # A jit keeps its content in one piece with types of its own: when it is lowered, everything
    # that it closes over is said to vary. `solve` may close over a preconditioner.
    product = jax.jit(lambda v: vary(matvec(join(v))))
    start = None if x0 is None else vary(x0)
    first = lambda matvec, b: jax.jit(lambda b: run(matvec, b, start))(b)
    again = lambda matvec, b: jax.jit(lambda b: run(matvec, b))(b)
    x, info = lax.custom_linear_solve(product, vary(b), first, transpose_solve=again, has_aux=True)
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
