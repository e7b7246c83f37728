"""How the adjoint vector v, the solution of H v = f_p, follows params and hparams."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _tree
from .._types import Batch, Batches, Key, Params, PyTree
from ._rates import Rate, at, check_rate

Product = Callable[[Batch, Params], Params]  # H v on a batch


def deal(one: Callable[[PyTree, Batch], PyTree], carry: PyTree, batches: Batches, steps: int):
    """`carry` after `one` step per batch, or `steps` of them on the only one there is."""
    if _checks.count_steps("deal", batches) == 1:
        batch = _tree.last(batches)
        return lax.scan(lambda c, _: (one(c, batch), None), carry, length=steps)[0]
    return lax.scan(lambda c, batch: (one(c, batch), None), carry, batches)[0]


class AdjointRule(NamedTuple):
    """`solve` is asked before the directions are looked at, `move` after."""

    batches: int  # train batches that `solve` sees, one per product
    # (v, product, f_p, batches, count) -> the v that the hypergradient is made of
    solve: Callable[[Params, Product, Params, Batches, jax.Array], Params]
    # (v, H v - f_p, count) -> the v that the next step begins with
    move: Callable[[Params, Params, jax.Array], Params]


def together(step: Rate) -> AdjointRule:
    """v takes one gradient step at the same time as hparams, which move by the v before it."""
    check_rate("together", "step", step)
    return AdjointRule(
        0,
        lambda v, product, rhs, batches, count: v,
        lambda v, direction, count: _tree.axpy(-at(step, count), direction, v),
    )


def descent(step: Rate, steps: int) -> AdjointRule:
    """`steps` gradient steps from the v of last time, v <- v - step (H_j v - f_p).

    Raises ValueError unless `steps` is a positive integer.
    """
    check_rate("descent", "step", step)
    _checks.positive_int("descent", "steps", steps)

    def solve(v, product: Product, rhs, batches, count):
        size = at(step, count)
        one = lambda v, batch: _tree.axpy(-size, _tree.sub(product(batch, v), rhs), v)
        return deal(one, _tree.vary_like(v, rhs), batches, steps)

    return AdjointRule(steps, solve, _keep)


def neumann_series(scale: Rate, terms: int, key: Key | None = None) -> AdjointRule:
    """v = scale (1 + P_1 + P_2 P_1 + ... ) f_p with P_j = 1 - scale H_j, `terms` addends, anew.

    With the leading `scale`: without it, as in some published code, v is wrong by that factor. It
    converges for 0 < scale < 2 / (largest eigenvalue of H). A `key` draws one addend uniformly and
    takes it `terms` times: the same mean, larger variance, and no smaller cost in a scan.

    Raises ValueError unless `terms` is a positive integer.
    """
    check_rate("neumann_series", "scale", scale)
    _checks.positive_int("neumann_series", "terms", terms)

    def solve(v, product: Product, rhs, batches, count):
        size = at(scale, count)
        one = lambda v, batch: _tree.axpy(-size, _tree.sub(product(batch, v), rhs), v)
        start = _tree.scale(size, rhs)
        return deal(one, start, batches, terms - 1)

    def draw(v, product: Product, rhs, batches, count):
        size = at(scale, count)
        assert key is not None
        factors = jax.random.randint(jax.random.fold_in(key, count), (), 0, terms)

        def one(state, batch):
            v, j = state
            return _tree.where(j < factors, _tree.axpy(-size, product(batch, v), v), v), j + 1

        start = _tree.scale(terms * size, rhs)
        start = _tree.vary_like((start, jnp.zeros((), jnp.int32)), (start, factors))
        return deal(one, start, batches, terms - 1)[0]

    return AdjointRule(terms - 1, solve if key is None else draw, _keep)


def _keep(v: Params, direction: Params, count: jax.Array) -> Params:
    return v
