"""Every estimator that a task can have, one entry each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from .. import evolution, exchange, linsolve, online
from .._best_response import best_response
from .._estimators import hypergradient
from .._hypernet import gated
from .._inner import inner
from .._types import Batch, Estimate, Estimator, Key, LinearSolve, Split
from .._unroll import unroll
from .._warm_start import amortize, warm_start
from ._contest_case import ROUNDS, Case, Contestant, Facts, in_pieces, once, remembering

_PAIRS = 8
_SIGMA = 0.1  # raw values are logits or standard scores, of order one
_EXPLORE = 0.5  # what a hypernetwork sees around the present setting
_PRODUCTS = 20
_DAMPING = 1.0  # what `hyperjax tune --method implicit` takes for networks
_PIECES = 4
_MOST_TANGENTS = 1024
_MOST_DENSE = 1024


def _unrolled(mode: Any = "reverse", **options: Any) -> Callable:
    make = lambda c: hypergradient(unroll(c.step, **options), c.score, c.init, mode=mode)
    return once(make)


def _truncated(share: Callable[[int], int]) -> Callable:
    def make(c: Case) -> Estimator:
        steps = jax.tree.leaves(c.split.train)[0].shape[0]
        return hypergradient(unroll(c.step, truncate=share(steps)), c.score, c.init)

    return once(make)


def _implicit(solve: Callable[[Case], LinearSolve]) -> Callable:
    return once(lambda c: hypergradient(c.implicit(solve(c)), c.score, c.init))


def _warm(c: Case) -> Estimator:
    return warm_start(c.implicit(linsolve.cg(maxiter=5)), c.score, c.init)


def _amortized(c: Case) -> Estimator:
    sketch = linsolve.nystrom_preconditioner(c.key, _rank(c), 0.01)
    solve = lambda p: linsolve.cg(maxiter=5, preconditioner=p)
    response = c.implicit(linsolve.cg())
    return amortize(
        response, c.score, c.init, preconditioner=sketch, solve=solve, refresh=ROUNDS + 1
    )


def _rank(c: Case) -> int:
    return min(_PRODUCTS, sum(x.size for x in jax.tree.leaves(c.start.params)))


class _Draw(NamedTuple):
    data: Batch
    key: Key


def _hypernetwork(case: Case, memory: None) -> Estimate:
    """A gated hypernetwork, trained for as many steps as the model would be."""
    net, explore = gated(), exchange.perturb(_EXPLORE)
    init, noise = jax.random.split(case.key)

    def near(phi, raw, batch):
        nearby = explore(batch.key, raw)
        return case.problem.loss(net.apply(phi, nearby), nearby, batch.data)

    training = inner(near, case.problem.optimizer)
    response = best_response(net.apply, unroll(training.step))
    estimator = hypergradient(response, case.score, training.init)
    steps = jax.tree.leaves(case.split.train)[0].shape[0]
    draws = _Draw(case.split.train, jax.random.split(noise, steps))
    carry = estimator.init(net.init(init, case.start.params, case.raw), case.raw)
    return estimator.estimate(case.raw, carry, Split(draws, case.split.valid))[0]


def _smoothed(c: Case, factory: Callable[..., Estimator], **options: Any) -> Estimator:
    return factory(unroll(c.step), c.score, c.init, key=c.key, pairs=_PAIRS, **options)


def _never(case: Case, memory: None) -> Estimate:
    raise NotImplementedError("always refused")


# ---- when they do not apply --------------------------------------------------------------------


def _many_tangents(facts: Facts) -> str:
    if facts.hparams <= _MOST_TANGENTS:
        return ""
    return f"a tangent for each of {facts.hparams:,} hyperparameters is not tried"


def _too_dense(facts: Facts) -> str:
    if facts.params <= _MOST_DENSE:
        return ""
    return f"a matrix of {facts.params:,} x {facts.params:,} is not tried"


def _indivisible(facts: Facts) -> str:
    if facts.steps % _PIECES == 0:
        return ""
    return f"cuts training into {_PIECES} pieces; take a multiple of {_PIECES} steps"


def _foreign_units(facts: Facts) -> str:
    if facts.own_units:
        return _many_tangents(facts)
    return "its rule compares a hyperparameter with a derivative in it; those here are transformed"


def _continuous(facts: Facts) -> str:
    return "for choices without a derivative; these hyperparameters are continuous"


_SOLUTION = "differentiates a solution, not the run"

CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("unroll", "unroll(step)", _unrolled(), exact=True),
    Contestant(
        "unroll, square root",
        'unroll(step, checkpoint="sqrt")',
        _unrolled(checkpoint="sqrt"),
        exact=True,
    ),
    Contestant(
        "unroll, binomial",
        'unroll(step, checkpoint="binomial")',
        _unrolled(checkpoint="binomial"),
        exact=True,
    ),
    Contestant(
        "forward",
        'hypergradient(..., mode="forward")',
        _unrolled("forward"),
        refuse=_many_tangents,
        exact=True,
    ),
    Contestant(
        "rtho",
        "online.rtho(step, score, init)",
        once(lambda c: online.rtho(c.step, c.score, c.init)),
        refuse=_many_tangents,
        note="exact while hyperparameters stand still; made to move them along the way",
    ),
    Contestant(
        "rtho, decay 0.9",
        "online.rtho(..., decay=0.9)",
        once(lambda c: online.rtho(c.step, c.score, c.init, decay=0.9)),
        refuse=_many_tangents,
    ),
    Contestant(
        "marthe",
        "online.marthe(step, score, init)",
        in_pieces(lambda c: online.marthe(c.step, c.score, c.init), None),
        refuse=_foreign_units,
    ),
    Contestant(
        "unroll, last quarter",
        "unroll(step, truncate=steps // 4)",
        _truncated(lambda steps: max(1, steps // 4)),
    ),
    Contestant("unroll, last step", "unroll(step, truncate=1)", _truncated(lambda steps: 1)),
    Contestant(
        "implicit, cg",
        f"implicit(..., solve=cg(maxiter={_PRODUCTS}))",
        _implicit(lambda c: linsolve.cg(maxiter=_PRODUCTS)),
        note=_SOLUTION,
    ),
    Contestant(
        "implicit, damped cg",
        f"implicit(..., solve=cg(maxiter={_PRODUCTS}, damping={_DAMPING:g}))",
        _implicit(lambda c: linsolve.cg(maxiter=_PRODUCTS, damping=_DAMPING)),
        note=_SOLUTION,
    ),
    Contestant(
        "implicit, jacobi cg",
        f"implicit(..., solve=cg(maxiter={_PRODUCTS}, preconditioner=jacobi(key)))",
        _implicit(lambda c: linsolve.cg(maxiter=_PRODUCTS, preconditioner=linsolve.jacobi(c.key))),
        note=_SOLUTION,
    ),
    Contestant(
        "implicit, minres",
        f"implicit(..., solve=minres(maxiter={_PRODUCTS}))",
        _implicit(lambda c: linsolve.minres(maxiter=_PRODUCTS)),
        note=_SOLUTION,
    ),
    Contestant(
        "implicit, neumann",
        f"implicit(..., solve=neumann({_PRODUCTS}))",
        _implicit(lambda c: linsolve.neumann(_PRODUCTS)),
        note=_SOLUTION,
    ),
    Contestant(
        "implicit, nystrom",
        f"implicit(..., solve=nystrom(key, {_PRODUCTS}, 0.01))",
        _implicit(lambda c: linsolve.nystrom(c.key, _rank(c), 0.01)),
        note=_SOLUTION,
    ),
    Contestant(
        "implicit, dense",
        'implicit(..., solve=dense(factor="lu"))',
        _implicit(lambda c: linsolve.dense(factor="lu")),
        refuse=_too_dense,
        note=_SOLUTION,
    ),
    Contestant(
        "implicit, identity",
        "implicit(..., solve=identity())",
        _implicit(lambda c: linsolve.identity()),
        note=f"{_SOLUTION}; its size is arbitrary, look at the cosine",
    ),
    Contestant(
        "warm start, cg",
        "warm_start(implicit(..., solve=cg(maxiter=5)), score, init)",
        **remembering(_warm),
        note=f"{_SOLUTION}; estimate {ROUNDS} in a row at the same hyperparameters",
    ),
    Contestant(
        "amortize, nystrom cg",
        "amortize(implicit(...), ..., preconditioner=nystrom_preconditioner(key, rank))",
        **remembering(_amortized),
        note=f"{_SOLUTION}; estimate {ROUNDS} in a row, between two refreshes",
    ),
    Contestant(
        "best response",
        "best_response(gated().apply, train)",
        _hypernetwork,
        note="of a map trained for these steps only; treats its training as constant",
    ),
    Contestant(
        "antithetic",
        f"evolution.antithetic(..., pairs={_PAIRS}, sigma={_SIGMA})",
        once(lambda c: _smoothed(c, evolution.antithetic, sigma=_SIGMA)),
        note="of the score smoothed over sigma, in raw units",
    ),
    Contestant(
        "spsa",
        f"evolution.spsa(..., pairs={_PAIRS}, radius={_SIGMA})",
        once(lambda c: _smoothed(c, evolution.spsa, radius=_SIGMA)),
        note="of the score smoothed over the radius, in raw units",
    ),
    Contestant(
        "persistent",
        f"evolution.persistent(..., pairs={_PAIRS}, sigma={_SIGMA}, horizon={_PIECES})",
        in_pieces(
            lambda c: _smoothed(c, evolution.persistent, sigma=_SIGMA, horizon=_PIECES), _PIECES
        ),
        refuse=_indivisible,
        note=f"the last of {_PIECES} estimates along training, time of all; each allows an update",
    ),
    Contestant(
        "noise reuse",
        f"evolution.noise_reuse(..., pairs={_PAIRS}, sigma={_SIGMA}, horizon={_PIECES})",
        in_pieces(
            lambda c: _smoothed(c, evolution.noise_reuse, sigma=_SIGMA, horizon=_PIECES), _PIECES
        ),
        refuse=_indivisible,
        note=f"the last of {_PIECES} estimates along training, time of all; each allows an update",
    ),
    Contestant(
        "score function",
        "evolution.score_function(..., samples=n)",
        _never,
        refuse=_continuous,
    ),
)
