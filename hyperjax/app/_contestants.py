"""Every estimator that a task can have, one entry each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import evolution, exchange, linsolve, online
from .._best_response import best_response
from .._estimators import hypergradient
from .._forward_sharing import forward_sharing
from .._inner import inner
from .._planned import planned
from .._types import Batch, Estimate, Estimator, Key, LinearSolve, Split
from .._unroll import unroll
from .._warm_start import amortize, warm_start
from ..hypernet import gated
from ._contest_case import ROUNDS, Case, Contestant, Facts, in_pieces, once, remembering

_PAIRS = 8
_SIGMA = 0.1  # raw values are logits or standard scores, of order one
_EXPLORE = 0.5  # what a hypernetwork sees around the present setting
_PRODUCTS = 20
_SKETCH_DAMPING = 0.01
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


def _warm(c: Case) -> Estimator:
    return warm_start(c.implicit(linsolve.cg(maxiter=5)), c.score, c.init)


def _amortized(c: Case) -> Estimator:
    sketch = linsolve.nystrom_preconditioner(c.key, _rank(c), _SKETCH_DAMPING)
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


def _shared(case: Case, memory: None) -> Estimate:
    """Of a schedule with one value in all its windows."""
    estimator = forward_sharing(case.step, case.score, case.init, windows=_PIECES)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (_PIECES, *x.shape)), case.raw)
    result = estimator.estimate(rows, estimator.init(case.start.params, rows), case.split)[0]
    return result._replace(grad=jax.tree.map(lambda g: jnp.sum(g, axis=0), result.grad))


def _never(case: Case, memory: None) -> Estimate:
    raise AssertionError("this contestant is refused for every task")


# ---- when they do not apply --------------------------------------------------------------------


def _many_tangents(facts: Facts) -> str:
    if facts.hparams <= _MOST_TANGENTS:
        return ""
    return f"a tangent for each of {facts.hparams:,} hyperparameters is not tried"


def _many_windows(facts: Facts) -> str:
    if facts.steps < _PIECES:
        return f"has {_PIECES} windows, and there are fewer steps"
    return _many_tangents(facts._replace(hparams=_PIECES * facts.hparams))


def _without_budget(facts: Facts) -> str:
    return "" if facts.budget else "chooses one of those above by a budget of memory; give one"


def _opaque(facts: Facts) -> str:
    return "takes rate and momentum as functions, which an optax optimizer does not show"


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


def _solved(
    name: str,
    text: str,
    solve: Callable[[Case], LinearSolve | linsolve.AdaptiveSolve],
    refuse: Callable[[Facts], str] = lambda facts: "",
) -> Contestant:
    make = lambda c: hypergradient(c.implicit(solve(c)), c.score, c.init)
    call = f"implicit(..., solve={text})"
    return Contestant(f"implicit, {name}", call, once(make), refuse=refuse, note=_SOLUTION)


# Every estimator that `compare_estimators` knows, in the order of its table.
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
        "planned",
        "planned(step, score, init, budget=bytes)",
        once(lambda c: planned(c.step, c.score, c.init, budget=c.budget or 1)),
        refuse=_without_budget,
        exact=True,
    ),
    Contestant(
        "forward, sharing",
        f"forward_sharing(step, score, init, windows={_PIECES})",
        _shared,
        refuse=_many_windows,
        exact=True,
        note=f"a gradient for each of {_PIECES} windows of a schedule, summed here",
    ),
    Contestant(
        "reversible",
        "reversible(loss, rate, momentum)",
        _never,
        refuse=_opaque,
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
    _solved("cg", f"cg(maxiter={_PRODUCTS})", lambda c: linsolve.cg(maxiter=_PRODUCTS)),
    _solved(
        "adaptive cg",
        f"adaptive(lambda tol: cg(maxiter={_PRODUCTS}, tol=tol))",
        lambda c: linsolve.adaptive(lambda tol: linsolve.cg(maxiter=_PRODUCTS, tol=tol)),
    ),
    _solved(
        "damped cg",
        f"cg(maxiter={_PRODUCTS}, damping={_DAMPING:g})",
        lambda c: linsolve.cg(maxiter=_PRODUCTS, damping=_DAMPING),
    ),
    _solved(
        "jacobi cg",
        f"cg(maxiter={_PRODUCTS}, preconditioner=jacobi(key))",
        lambda c: linsolve.cg(maxiter=_PRODUCTS, preconditioner=linsolve.jacobi(c.key)),
    ),
    _solved("minres", f"minres(maxiter={_PRODUCTS})", lambda c: linsolve.minres(maxiter=_PRODUCTS)),
    _solved("neumann", f"neumann({_PRODUCTS})", lambda c: linsolve.neumann(_PRODUCTS)),
    _solved(
        "nystrom",
        f"nystrom(key, {_PRODUCTS}, {_SKETCH_DAMPING})",
        lambda c: linsolve.nystrom(c.key, _rank(c), _SKETCH_DAMPING),
    ),
    _solved("dense", 'dense(factor="lu")', lambda c: linsolve.dense(factor="lu"), _too_dense),
    _solved("identity", "identity()", lambda c: linsolve.identity()),
    Contestant(
        "warm start, cg",
        "warm_start(implicit(..., solve=cg(maxiter=5)), score, init)",
        *remembering(_warm),
        note=f"{_SOLUTION}; estimate {ROUNDS} in a row at the same hyperparameters",
    ),
    Contestant(
        "amortize, nystrom cg",
        "amortize(implicit(...), ..., preconditioner=nystrom_preconditioner(key, rank))",
        *remembering(_amortized),
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
