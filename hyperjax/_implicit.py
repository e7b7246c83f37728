"""Implicit differentiation: the derivative of a solution, without that of the solver."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks, _tree
from ._types import (
    Batch,
    Batches,
    Carry,
    HParams,
    LinearSolve,
    Optimality,
    Params,
    Response,
    Scalar,
    SolveInfo,
)
from .linsolve import cg, linear_solve


class AdjointInfo(NamedTuple):
    """Whether an implicit hypergradient can be trusted."""

    solve: SolveInfo  # of the adjoint system
    stationarity: Scalar  # |optimality(params)|, 2-norm: the derivative assumes that it is zero


@dataclass(frozen=True)  # jit holds what it compiles by a weak reference, which tuples refuse
class ImplicitResponse:
    """See `implicit`. A response by `__call__`; `vjp` adds the report of the adjoint solve."""

    response: Response
    optimality: Optimality
    solve: LinearSolve

    def __call__(self, hparams: HParams, carry: Carry, batches: Batches) -> tuple[Params, Carry]:
        params, carry = self._train(hparams, carry, batches)
        batch = _tree.last(batches)
        # custom_root differentiates in whatever `zero` closes over, so hyperparameters may reach
        # the loss through a closure as well as through the argument.
        zero = lambda p: self.optimality(p, hparams, batch)
        tangent_solve = lambda linear, b: linear_solve(self.solve, linear, b)[0]
        return lax.custom_root(zero, params, lambda _, guess: guess, tangent_solve), carry

    def vjp(
        self, hparams: HParams, carry: Carry, batches: Batches
    ) -> tuple[tuple[Params, Carry], Callable[[Params], tuple[HParams, AdjointInfo]]]:
        """Like `jax.vjp` in `hparams`, with an `AdjointInfo` beside the cotangent.

        The products with the Hessian are taken reverse over reverse, so that operations with only
        a `custom_vjp` are allowed in the loss.
        """
        # Not `_train`: an estimate that is differentiated again must know that params move.
        params, carry = self(hparams, carry, batches)

        def pullback(cotangent: Params) -> tuple[HParams, AdjointInfo]:
            return root_vjp(
                self.optimality,
                params,
                hparams,
                _tree.last(batches),
                cotangent,
                solve=self.solve,
            )

        return (params, carry), pullback

    def _train(self, hparams, carry, batches):
        _checks.count_steps("implicit", batches)
        # Stopped on the way in as well as out: the loop is then never linearized at all.
        inputs = lax.stop_gradient((hparams, carry, batches))
        params, carry = lax.stop_gradient(self.response(*inputs))
        zero = jax.eval_shape(self.optimality, params, hparams, _tree.last(batches))
        _checks.same_tree("implicit", "optimality", zero, "params", params)
        return params, carry


def implicit(
    response: Response, optimality: Optimality, *, solve: LinearSolve | None = None
) -> ImplicitResponse:
    """A response with the value of `response` and the derivative of an exact inner solution.

    Where optimality(params, hparams, batch) = 0, with A = d optimality / d params,

        d params / d hparams = -A^-1 (d optimality / d hparams),

    applied to a tangent, or transposed to a cotangent, by one linear solve (default: `cg()`). The
    training loop inside `response` is never differentiated. `batch` is the last of the batches:
    where training sees minibatches, let `optimality` look at the whole training set.

    The value is whatever `response` returns. Away from a stationary point the derivative is not
    that of the value: look at `Estimate.info`, an `AdjointInfo`, before trusting it. The carry
    has no derivative, since a solution does not depend on where the search for it began; and
    hyperparameters that only change how it is reached, such as learning rates, get exactly zero.

    Works under grad, jvp, jacfwd, Hessians in both orders, vmap, jit with sharded data, and
    shard_map; docs/transforms.md has the table that the tests write.

    Raises ValueError at trace time if `optimality` does not return a tree like params.

    Reference: Lorraine, Vicol and Duvenaud 2020 (arXiv 1911.02590), Theorem 1. They approximate
    the inverse by a Neumann series, here it is truncated CG; see `neumann` for theirs.
    """
    _checks.is_callable("implicit", "response", response)
    _checks.is_callable("implicit", "optimality", optimality)
    solve = cg() if solve is None else solve
    _checks.is_callable("implicit", "solve", solve)
    return ImplicitResponse(response, optimality, solve)


def root_vjp(
    optimality: Optimality,
    params: Params,
    hparams: HParams,
    batch: Batch,
    cotangent: Params,
    *,
    solve: LinearSolve,
) -> tuple[HParams, AdjointInfo]:
    """The cotangent of `hparams` at a root of `optimality` in params, and how it was obtained.

    With u the solution of A' u = cotangent, it is -(d optimality / d hparams)' u: one transposed
    linear map gives both products.
    """
    zero, pullback = jax.vjp(lambda p, h: optimality(p, h, batch), params, hparams)
    u, info = linear_solve(solve, lambda v: pullback(v)[0], cotangent)
    grad = jax.tree.map(jnp.negative, pullback(u)[1])
    return grad, AdjointInfo(info, _tree.norm(zero))
