"""Estimators: a response and a score make a hypergradient."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from . import _checks, _tree
from ._types import Carry, Estimate, Estimator, HParams, Loss, Params, Response, Split


def hypergradient(
    response: Response,
    score: Loss,
    init: Callable[[Params, HParams], Carry],
    *,
    mode: Literal["reverse", "forward"] = "reverse",
) -> Estimator:
    """The gradient in hparams of score(response(hparams), hparams), direct term included.

    `init` makes the carry that `response` trains from, as `Inner.init` does. The carry that an
    estimate returns is the trained one, so that the next estimate goes on from there; `restart`
    begins every time anew instead.

    `mode="forward"` costs one tangent pass per scalar hyperparameter, all at once, and memory that
    does not grow with the number of steps: for few hyperparameters. `mode="reverse"` costs the
    same for any number.

    `Estimate.info` is what the response reports: an `AdjointInfo` from `implicit` in reverse mode,
    `()` from responses that have nothing to solve. A response reports by a method `estimate` like
    that of `ImplicitResponse`.

    Raises TypeError at trace time for hparams that are not floating point or a score that is not a
    scalar.
    """
    _checks.is_callable("hypergradient", "response", response)
    _checks.one_of("hypergradient", "mode", mode, ("reverse", "forward"))
    score = _checks.scalar_loss("hypergradient", "score", score)
    differentiate = _reverse if mode == "reverse" else _forward

    def estimate(hparams: HParams, carry: Carry, split: Split) -> tuple[Estimate, Carry]:
        _checks.differentiable("hypergradient", "hparams", hparams)
        return differentiate(response, score, hparams, carry, split)

    return Estimator(_strong("hypergradient", init), estimate)


def _reverse(response, score, hparams, carry, split):
    if hasattr(response, "estimate"):
        return response.estimate(score, hparams, carry, split)
    params, pull, carry = jax.vjp(lambda h: response(h, carry, split.train), hparams, has_aux=True)
    outer = jax.value_and_grad(lambda p, h: score(p, h, split.valid), argnums=(0, 1))
    value, (through, direct) = outer(params, hparams)
    (indirect,) = pull(through)
    return Estimate(value, jax.tree.map(jnp.add, direct, indirect), ()), carry


def _forward(response, score, hparams, carry, split):
    def objective(h):
        params, end = response(h, carry, split.train)
        value = score(params, h, split.valid)
        return value, (value, end)

    grad, (value, carry) = jax.jacfwd(objective, has_aux=True)(hparams)
    # jacfwd gives the type of the score, reverse mode that of each hyperparameter.
    grad = jax.tree.map(lambda g, h: g.astype(jnp.result_type(h)), grad, hparams)
    return Estimate(value, grad, ()), carry


def score_only(
    response: Response, score: Loss, init: Callable[[Params, HParams], Carry]
) -> Estimator:
    """The score without a gradient (zeros), for members that learn by exchange alone.

    With `tune(..., optax.set_to_zero())` and an exchange it is population based training; without
    an exchange it is random or grid search.

    Raises TypeError for a `response` that is no function, and at trace time for a score that is not
    a scalar.
    """
    _checks.is_callable("score_only", "response", response)
    score = _checks.scalar_loss("score_only", "score", score)

    def estimate(hparams: HParams, carry: Carry, split: Split) -> tuple[Estimate, Carry]:
        params, carry = response(hparams, carry, split.train)
        value = score(params, hparams, split.valid)
        return Estimate(value, _tree.zeros_like(hparams), ()), carry

    return Estimator(_strong("score_only", init), estimate)


class Restarted(NamedTuple):
    """Carry of `restart`."""

    start: Carry  # of the estimator within: where each estimate begins
    trained: Carry  # where the last one ended; `start` before the first


def restart(estimator: Estimator) -> Estimator:
    """`estimator` from the same carry every time: each estimate trains from the beginning.

    The carry is a `Restarted`, whose `trained` is what the last estimate came to. All else that an
    estimator carries begins anew as well (the adjoint vector of `warm_start`, the derivatives of
    `online.rtho`), but for a field `key` of the carry: an estimator that draws goes on drawing,
    since the same noise every time would never average out.

    Raises TypeError unless `estimator` has the functions of an `Estimator`.
    """
    _checks.has_functions("restart", "estimator", estimator, ("init", "estimate"))

    def init(params: Params, hparams: HParams) -> Restarted:
        start = estimator.init(params, hparams)
        return Restarted(start, start)

    def estimate(hparams: HParams, carry: Restarted, split: Split) -> tuple[Estimate, Restarted]:
        result, trained = estimator.estimate(hparams, carry.start, split)
        start = carry.start
        if "key" in getattr(start, "_fields", ()):
            start = start._replace(key=trained.key)
        return result, Restarted(start, trained)

    return Estimator(init, estimate)


def _strong(where, init):
    _checks.is_callable(where, "init", init)
    return lambda params, hparams: _tree.strong(init(params, hparams))
