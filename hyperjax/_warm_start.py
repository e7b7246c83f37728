"""Implicit hypergradients that remember: the adjoint vector and the preconditioner."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks, _tree
from ._implicit import ImplicitResponse
from ._types import (
    Carry,
    Estimate,
    Estimator,
    HParams,
    LinearSolve,
    Loss,
    Params,
    Preconditioner,
    PyTree,
    Split,
)
from .linsolve import prebuilt
from .linsolve._common import widened


class WarmCarry(NamedTuple):
    """The carry of `warm_start`."""

    carry: Carry  # of training
    adjoint: Params  # the solution of the last adjoint system, where the next solve starts


class AmortizedCarry(NamedTuple):
    """The carry of `amortize`."""

    carry: Carry
    adjoint: Params
    factor: PyTree  # state of the preconditioner
    age: jax.Array  # int32: estimates so far


def warm_start(
    response: ImplicitResponse, score: Loss, init: Callable[[Params, HParams], Carry]
) -> Estimator:
    """`hypergradient(response, score, init)` whose adjoint solves start from the last solution.

    Hyperparameters move little between outer steps, so the adjoint vector does too: with a
    truncated solve the error of the hypergradient falls over outer steps instead of staying. As in
    stochastic approximate implicit differentiation (Arbel and Mairal 2022, arXiv 2111.14580).

    The carry is a `WarmCarry`; `params` given to its `init` must be like those of the response.

    Raises TypeError for a response that was not made by `implicit`, a score that is not a scalar,
    or hparams that are not floating point.
    """
    _check("warm_start", response, init)
    score = _checks.scalar_loss("warm_start", "score", score)

    def first(params: Params, hparams: HParams) -> WarmCarry:
        carry = _tree.strong(init(params, hparams))
        return WarmCarry(carry, _tree.zeros_like(_tree.strong(params)))

    def estimate(hparams: HParams, carry: WarmCarry, split: Split) -> tuple[Estimate, WarmCarry]:
        _checks.differentiable("warm_start", "hparams", hparams)
        result, trained, adjoint = response.estimate_from(
            carry.adjoint, score, hparams, carry.carry, split
        )
        return result, WarmCarry(trained, _usable(adjoint))

    return Estimator(first, estimate)


def amortize(
    response: ImplicitResponse,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    *,
    preconditioner: Preconditioner,
    solve: Callable[[Preconditioner], LinearSolve],
    refresh: int,
) -> Estimator:
    """`warm_start` that also keeps a preconditioner and rebuilds it every `refresh` estimates.

    Args:
      preconditioner: built from products with the transposed Jacobian of optimality.
      solve: makes the adjoint solve from it, for example
        `lambda p: linsolve.cg(maxiter=5, preconditioner=p)`; it takes the place of `response`'s.
      refresh: estimates for which one preconditioner serves.

    Under vmap every estimate pays for building, since there both sides of a condition are computed.
    Raises ValueError unless `refresh` is a positive integer.
    """
    _check("amortize", response, init)
    _checks.has_functions("amortize", "preconditioner", preconditioner, ("build", "apply"))
    _checks.is_callable("amortize", "solve", solve)
    _checks.positive_int("amortize", "refresh", refresh)
    score = _checks.scalar_loss("amortize", "score", score)

    def first(params: Params, hparams: HParams) -> AmortizedCarry:
        carry = _tree.strong(init(params, hparams))
        zeros = _tree.zeros_like(_tree.strong(params))
        # Of the identity: only its shapes matter, since the first estimate builds.
        factor = _tree.strong(preconditioner.build(*widened(lambda v: v, zeros)))
        return AmortizedCarry(carry, zeros, factor, jnp.zeros((), jnp.int32))

    def estimate(
        hparams: HParams, carry: AmortizedCarry, split: Split
    ) -> tuple[Estimate, AmortizedCarry]:
        _checks.differentiable("amortize", "hparams", hparams)
        params, trained = response(hparams, carry.carry, split.train)
        end = lax.stop_gradient((params, hparams, _tree.last(split.train)))
        _, pullback = jax.vjp(lambda p: response.optimality(p, *end[1:]), end[0])
        due = carry.age % refresh == 0
        factor = lax.cond(
            due,
            lambda: preconditioner.build(*widened(lambda v: pullback(v)[0], end[0])),
            lambda: _tree.vary_like(carry.factor, hparams),
        )
        # Trained once: what is left to do starts from the params that came out.
        solved = dataclasses.replace(
            response,
            response=lambda h, c, b: (params, trained),
            solve=solve(prebuilt(preconditioner, factor)),
        )
        result, trained, adjoint = solved.estimate_from(
            carry.adjoint, score, hparams, carry.carry, split
        )
        result = _charge(result, jnp.where(due, preconditioner.products, 0))
        return result, AmortizedCarry(trained, _usable(adjoint), factor, carry.age + 1)

    return Estimator(first, estimate)


def _charge(result: Estimate, products: jax.Array) -> Estimate:
    """`result` with the products that building took among the iterations of its solve."""
    solve = result.info.solve
    solve = solve._replace(iterations=solve.iterations + products)
    return result._replace(info=result.info._replace(solve=solve))


def _usable(adjoint: Params) -> Params:
    """A start for the next solve: zero if this one diverged. It carries no derivative."""
    adjoint = lax.stop_gradient(adjoint)
    return _tree.where(_tree.all_finite(adjoint), adjoint, _tree.zeros_like(adjoint))


def _check(where: str, response: ImplicitResponse, init: Callable) -> None:
    if not isinstance(response, ImplicitResponse):
        raise TypeError(
            f"{where}: `response` must come from `implicit`, since others solve nothing; got "
            f"{type(response).__name__}. Take `hypergradient` for those."
        )
    _checks.is_callable(where, "init", init)
