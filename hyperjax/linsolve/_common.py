"""What solves share."""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from hyperjax import kernels

from .. import _tree
from .._types import MatVec, Params, Preconditioner, Scalar


def scaled(b: Params) -> tuple[Scalar, Params]:
    """|b| and b / |b|, so that no test depends on units; zero stays zero."""
    size = _tree.norm(b)
    return size, _tree.scale(1 / jnp.where(size > 0, size, 1), b)


def widened(matvec: MatVec, b: Params) -> tuple[MatVec, Params]:
    """The same system with leaves of half precision in float32; products stay in their own."""
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), b)
    return lambda v: _tree.cast_like(matvec(_tree.cast_like(v, b)), wide), wide


def start_from(
    matvec: MatVec, unit: Params, size: Scalar, x0: Params | None
) -> tuple[Params, Params, jax.Array]:
    """Where to start in the scaled system: x, its residual and the products that it took.

    A start that is worse than zero, as one is after hyperparameters have jumped, becomes zero.
    """
    zeros, count = _tree.zeros_like(unit), (size * 0).astype(jnp.int32)
    if x0 is None:
        return zeros, unit, count
    x = _tree.scale(1 / jnp.where(size > 0, size, 1), x0)
    r = _tree.sub(unit, matvec(x))
    better = _tree.dot(r, r) < _tree.dot(unit, unit)
    return _tree.where(better, x, zeros), _tree.where(better, r, unit), count + 1


def damped(matvec: MatVec, damping: float | Scalar) -> MatVec:
    """Products with A + damping I."""
    if isinstance(damping, int | float) and damping == 0:
        return matvec
    return lambda v: _tree.axpy(damping, v, matvec(v))


def advance(
    step: Scalar | float, x: Params, r: Params, p: Params, q: Params
) -> tuple[Params, Params, Scalar, Scalar]:
    """x + step p, r - step q, the square of the latter's norm, and p'q: one pass over each leaf."""
    rest = (_tree.cast_like(y, x) for y in (r, p, q))
    done = jax.tree.map(functools.partial(kernels.vector_update, step=step), x, *rest)
    whole = lambda part: isinstance(part, kernels.VectorUpdate)
    new_x, new_r, rr, pq = (
        jax.tree.map(operator.attrgetter(name), done, is_leaf=whole)
        for name in ("x", "r", "rr", "pq")
    )
    total = lambda terms: functools.reduce(operator.add, jax.tree.leaves(terms))
    return new_x, new_r, total(rr), total(pq)


def preconditioned(
    preconditioner: Preconditioner | None, matvec: MatVec, like: Params
) -> tuple[MatVec, int]:
    """The preconditioner as a function, and the products that building it took."""
    if preconditioner is None:
        return lambda r: r, 0
    state = preconditioner.build(matvec, like)
    return lambda r: preconditioner.apply(state, r), preconditioner.products


def quotient(x: Params, ax: Params) -> Scalar:
    """x'Ax / x'x, whatever the size of x; inf where x = 0."""
    size, unit = scaled(x)
    return jnp.where(size == 0, jnp.inf, _tree.dot(unit, ax) / jnp.where(size == 0, 1, size))


def residual(matvec: MatVec, unit: Params, x: Params) -> Scalar:
    """|unit - A x|, by one product.

    Rounding lets the residual of a recurrence fall far below the true one (float32, condition
    1e6: 1e-5 against 0.2).
    """
    return _tree.norm(_tree.sub(unit, matvec(x)))


def flat(matvec: MatVec, like: Params) -> MatVec:
    """`matvec` on vectors [n], with the leaves of `like` one after another."""
    unravel = ravel_pytree(like)[1]
    return lambda v: ravel_pytree(matvec(unravel(v)))[0]


def products(matvec: MatVec, vectors: jax.Array, chunk: int) -> jax.Array:
    """A v for each row v of `vectors`, `chunk` at a time: [k, n] to [k, n]."""
    if len(vectors) <= chunk:
        return jax.vmap(matvec)(vectors)
    return lax.map(matvec, vectors, batch_size=chunk)
