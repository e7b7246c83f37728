"""Secant pairs: an approximation of an inverse Hessian that descent leaves behind.

A pair (s, y) says that H s = y, exactly for a quadratic. The BFGS inverse B of a sequence of pairs
is symmetric and positive definite, and B y = s for the last of them. It is never formed: B v takes
two passes over the pairs.

The pairs are our own and not the state of `optax.scale_by_lbfgs`, for four reasons: that one takes
the pair of a step only when the next one begins, so the last pair is missing; its scale of the
first matrix is not part of the state; pairs of negative curvature are kept, and B is then not
positive definite; and a pair that is no step, as SHINE wants it, cannot be added.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _tree
from .._types import Params, Preconditioner, Scalar


class Secants(NamedTuple):
    """Pairs of steps and changes of the gradient, from which L-BFGS knows the curvature."""

    steps: Params  # s, leaves [memory, ...], in a ring; scaled to |s| = 1
    slopes: Params  # y, likewise, by the same factor
    weights: jax.Array  # [memory]: 1 / s'y; 0 where there is no pair yet
    scale: Scalar  # the first matrix is this times the identity
    taken: jax.Array  # int32 scalar: pairs so far


def no_secants(like: Params, memory: int) -> Secants:
    """Room for `memory` pairs of trees like `like`; B is the identity."""
    room = jax.tree.map(lambda x: jnp.zeros((memory, *x.shape), x.dtype), like)
    one = jnp.ones((), _tree.dot(like, like).dtype)
    return Secants(room, room, jnp.zeros(memory, one.dtype), one, jnp.zeros((), jnp.int32))


def remember(pairs: Secants, step: Params, slope: Params) -> Secants:
    """With the pair (step, slope) as the newest; the oldest goes where there is no room.

    A pair of no positive curvature, up to rounding, is left out: B stays positive definite. The
    factor by which a pair is scaled makes no difference to B; |step| = 1 keeps float32 from
    underflow.
    """
    length = _tree.norm(step)
    unit = 1 / jnp.where(length > 0, length, 1)
    step, slope = _tree.scale(unit, step), _tree.scale(unit, slope)
    curvature, size = _tree.dot(step, slope), _tree.norm(slope)
    usable = (curvature > 4 * jnp.finfo(curvature.dtype).eps * size) & jnp.isfinite(size)
    safe = jnp.where(usable, curvature, 1)
    slot = pairs.taken % len(pairs.weights)
    put = lambda ring, x: ring.at[slot].set(x)
    new = Secants(
        jax.tree.map(put, pairs.steps, step),
        jax.tree.map(put, pairs.slopes, slope),
        put(pairs.weights, 1 / safe),
        jnp.where(usable, safe / jnp.where(usable, size, 1) ** 2, pairs.scale),
        pairs.taken + 1,
    )
    return _tree.where(usable, new, pairs)


def inverse_product(pairs: Secants, v: Params) -> Params:
    """B v by the two-loop recursion (Nocedal and Wright 2006, Algorithm 7.4). No products."""
    memory = len(pairs.weights)
    newest_first = (pairs.taken - 1 - jnp.arange(memory)) % memory

    def down(q: Params, slot: jax.Array) -> tuple[Params, Scalar]:
        step, slope = _tree.take(pairs.steps, slot), _tree.take(pairs.slopes, slot)
        share = pairs.weights[slot] * _tree.dot(step, q)
        return _tree.axpy(-share, slope, q), share

    def up(r: Params, at: tuple[jax.Array, Scalar]) -> tuple[Params, None]:
        slot, share = at
        step, slope = _tree.take(pairs.steps, slot), _tree.take(pairs.slopes, slot)
        back = pairs.weights[slot] * _tree.dot(slope, r)
        return _tree.axpy(share - back, step, r), None

    q, shares = lax.scan(down, _tree.vary_like(v, (v, pairs)), newest_first)
    return lax.scan(up, _tree.scale(pairs.scale, q), (newest_first, shares), reverse=True)[0]


def quasi_newton(pairs: Secants) -> Preconditioner:
    """B as a `Preconditioner`: for `linsolve.one_shot`, or as that of `linsolve.cg`.

    It takes no products to build, and it does not look at the matrix: it belongs to the Hessian
    that the pairs come from.
    """
    return Preconditioner(lambda matvec, like: pairs, inverse_product)
