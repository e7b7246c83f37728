"""Implicit differentiation: the derivative of a solution, without that of the solver."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks, _tree
from ._error_bound import error_bound
from ._types import (
    Batch,
    Batches,
    Carry,
    Estimate,
    HParams,
    LinearSolve,
    Loss,
    Optimality,
    Params,
    Response,
    Scalar,
    SolveInfo,
    Split,
)
from .linsolve import AdaptiveSolve, cg, gmres, linear_solve


class AdjointInfo(NamedTuple):
    """Whether an implicit hypergradient can be trusted."""

    solve: SolveInfo  # of the adjoint system
    stationarity: Scalar  # |optimality(params)|, 2-norm: the derivative assumes that it is zero
    # Like hparams, a bool per leaf. False warns: the leaf has no effect on optimality along the
    # adjoint vector, at these params, so that its gradient is the direct term alone. A learning
    # rate is such a leaf, and so is a penalty while what it penalizes is zero.
    reached: HParams
    # On |grad - true hypergradient|, 2-norm, to first order in the distance from a solution; inf
    # where `implicit` was told no `convexity`.
    bound: Scalar


class Adjoint(NamedTuple):
    """What `root_vjp` finds."""

    grad: HParams  # the cotangent of hparams
    vector: Params  # u with A' u = cotangent: where to start next time
    info: AdjointInfo


@dataclass(frozen=True)  # jit holds what it compiles by a weak reference, which tuples refuse
class ImplicitResponse:
    """See `implicit`. A response by `__call__`; `estimate` is its hypergradient with a report."""

    response: Response
    optimality: Optimality
    solve: LinearSolve | AdaptiveSolve
    convexity: float | None

    def __call__(self, hparams: HParams, carry: Carry, batches: Batches) -> tuple[Params, Carry]:
        params, carry = self._train(hparams, carry, batches)
        batch = _tree.last(batches)
        # custom_root differentiates in whatever `zero` closes over, so hyperparameters may reach
        # the loss through a closure as well as through the argument.
        zero = lambda p: self.optimality(p, hparams, batch)
        solve = self.solve
        if isinstance(solve, AdaptiveSolve):
            solve = solve.at(lax.stop_gradient(_tree.norm(zero(params))))
        tangent_solve = lambda linear, b: linear_solve(solve, linear, b)[0]
        return lax.custom_root(zero, params, lambda _, guess: guess, tangent_solve), carry

    def estimate(
        self, score: Loss, hparams: HParams, carry: Carry, split: Split
    ) -> tuple[Estimate, Carry]:
        """The gradient of score(self(hparams), hparams), with an `AdjointInfo`.

        The products with the Hessian are taken reverse over reverse, so that operations with only
        a `custom_vjp` are allowed in the loss.
        """
        result, carry, _ = self.estimate_from(None, score, hparams, carry, split)
        return result, carry

    def estimate_from(
        self, start: Params | None, score: Loss, hparams: HParams, carry: Carry, split: Split
    ) -> tuple[Estimate, Carry, Params]:
        """`estimate` with the adjoint solve begun at `start`; the adjoint vector comes last."""
        # Not `_train`: an estimate that is differentiated again must know that params move.
        params, carry = self(hparams, carry, split.train)
        outer = jax.value_and_grad(lambda p, h: score(p, h, split.valid), argnums=(0, 1))
        value, (through, direct) = outer(params, hparams)
        batch = _tree.last(split.train)
        adjoint = root_vjp(
            self.optimality, params, hparams, batch, through, solve=self.solve, start=start
        )
        info = adjoint.info
        if self.convexity is not None:
            bound = error_bound(
                lambda p, h: score(p, h, split.valid),
                lambda p, h: self.optimality(p, h, batch),
                params,
                hparams,
                adjoint.vector,
                self.convexity,
            )
            info = info._replace(bound=bound)
        grad = jax.tree.map(jnp.add, direct, adjoint.grad)
        return Estimate(value, grad, info), carry, adjoint.vector

    def _train(self, hparams, carry, batches):
        _checks.count_steps("implicit", batches)
        # Stopped on the way in as well as out: the loop is then never linearized at all.
        inputs = lax.stop_gradient((hparams, carry, batches))
        params, carry = lax.stop_gradient(self.response(*inputs))
        _checks.differentiable("implicit", "params", params)
        zero = jax.eval_shape(self.optimality, params, hparams, _tree.last(batches))
        _checks.same_tree("implicit", "optimality", zero, "params", params)
        return params, carry


def implicit(
    response: Response,
    optimality: Optimality,
    *,
    solve: LinearSolve | AdaptiveSolve | None = None,
    convexity: float | None = None,
) -> ImplicitResponse:
    """A response with the value of `response` and the derivative of an exact inner solution.

    Where optimality(params, hparams, batch) = 0, with A = d optimality / d params,

        d params / d hparams = -A^-1 (d optimality / d hparams),

    applied to a tangent, or transposed to a cotangent, by one linear solve. The training loop
    inside `response` is never differentiated. `batch` is the last of the batches: where training
    sees minibatches, let `optimality` look at the whole training set.

    Args:
      response: any response; where it ends decides how good the derivative is.
      optimality: zero at the solution. `stationary(loss)` for a minimum, `fixed_point(map)` for an
        equilibrium, `proximal(loss, prox, rate)` for a minimum with constraints or kinks.
      solve: default `cg()`, or `gmres()` where `optimality` is one of the latter two, whose A is
        not symmetric. `adaptive` ties its tolerance to how far training is from a solution.
      convexity: a lower bound on the smallest singular value of A near the solution, in the units
        of A (for a convex training loss and an l2 penalty beside it, the weight of the penalty).
        With it, `AdjointInfo.bound` is computed, at the price of some fifty products with second
        derivatives. It is to first order in the distance from the solution: where `stationarity`
        is large it may be far too small. It contains three estimated norms, each of which comes out
        too small with a probability of 1e-3. Refused for `proximal`, since a kink on the way to the
        solution voids it.

    The value is whatever `response` returns. Away from a stationary point the derivative is not
    that of the value: look at `Estimate.info`, an `AdjointInfo`, before trusting it. The carry
    has no derivative, since a solution does not depend on where the search for it began; and
    hyperparameters that only change how it is reached, such as learning rates, get exactly zero,
    which `AdjointInfo.reached` reports.

    Works under grad, jvp, jacfwd, Hessians in both orders, vmap, jit with sharded data, and
    shard_map; docs/transforms.md has the table that the tests write.

    Raises ValueError at trace time if `optimality` does not return a tree like params, or
    `convexity` is not positive or does not apply; TypeError for params that are not real
    floating-point arrays.

    Reference: Lorraine, Vicol and Duvenaud 2020 (arXiv 1911.02590), Theorem 1. They approximate
    the inverse by a Neumann series, here it is truncated CG; see `linsolve` for theirs.
    """
    _checks.is_callable("implicit", "response", response)
    _checks.is_callable("implicit", "optimality", optimality)
    if solve is None:
        solve = cg() if getattr(optimality, "symmetric", True) else gmres()
    if not isinstance(solve, AdaptiveSolve):
        _checks.is_callable("implicit", "solve", solve)
    if convexity is not None:
        _checks.number("implicit", "convexity", convexity, positive=True)
        if not getattr(optimality, "smooth", True):
            raise ValueError(
                "implicit: `convexity` makes no bound for an optimality with kinks, as that of "
                "`proximal`; leave it out."
            )
    return ImplicitResponse(response, optimality, solve, convexity)


def root_vjp(
    optimality: Optimality,
    params: Params,
    hparams: HParams,
    batch: Batch,
    cotangent: Params,
    *,
    solve: LinearSolve | AdaptiveSolve,
    start: Params | None = None,
) -> Adjoint:
    """The cotangent of `hparams` at a root of `optimality` in params, and how it was obtained.

    With u the solution of A' u = cotangent, found by `solve` from `start` (None: zero), it is
    -(d optimality / d hparams)' u: one transposed linear map gives both products.
    """
    zero, pullback = jax.vjp(lambda p, h: optimality(p, h, batch), params, hparams)
    stationarity = _tree.norm(zero)
    if isinstance(solve, AdaptiveSolve):
        solve = solve.at(lax.stop_gradient(stationarity))
    u, info = linear_solve(solve, lambda v: pullback(v)[0], cotangent, start)
    through = pullback(u)[1]
    # Exactly zero in every entry: nothing connects the leaf to the solution, or u is zero. A score
    # that does not depend on params asks for nothing, and is no warning.
    asked = _tree.norm(cotangent) > 0
    reached = jax.tree.map(lambda g: jnp.any(g != 0) | ~asked, through)
    bound = lax.stop_gradient(stationarity * 0 + jnp.inf)
    info = AdjointInfo(info, stationarity, reached, bound)
    return Adjoint(jax.tree.map(jnp.negative, through), u, info)
