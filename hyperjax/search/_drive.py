"""Rounds of ask, evaluate, tell: in one compiled scan, or in a loop on the host."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _checks, _tree
from .._types import Key, Scalar, State
from ._types import Search

Evaluate = Callable[[Key, jax.Array], jax.Array]


class Trials(NamedTuple):
    """All that a search evaluated, and the best of it."""

    points: jax.Array  # [rounds, N, D]
    scores: jax.Array  # [rounds, N], as they came
    point: jax.Array  # [D], of the smallest finite score; NaN if every evaluation failed
    score: Scalar  # the smallest finite score; NaN if there is none
    failed: jax.Array  # int32: evaluations whose score was not finite


def drive(key: Key, search: Search, evaluate: Evaluate, rounds: int) -> tuple[State, Trials]:
    """A pure search over `rounds` rounds in one `lax.scan`; for jit, and vmap over keys.

    `evaluate(key, points [N, D]) -> scores [N]`, typically a vmapped training of N replicas from
    `Space.from_unit(points)`, has a key of its own in every round. A score that is not finite is a
    failure: it is never the best, and counted. Inside shard_map scores may differ between devices
    if the keys do.

    Raises ValueError for fewer than one round, and for scores of another shape than [N].
    """
    _check(search, evaluate, rounds, "drive")
    start, run = jax.random.split(key)

    def one(state, key):
        points, state = search.ask(state)
        scores = _checked(evaluate(key, points), points, "drive")
        return search.tell(state, points, scores), (points, scores)

    state = _tree.vary_like(_tree.strong(search.init(start)), key)
    state, (points, scores) = lax.scan(one, state, jax.random.split(run, rounds))
    return state, _summary(points, scores)


def drive_on_host(
    key: Key, search: Search, evaluate: Evaluate, rounds: int
) -> tuple[State, Trials]:
    """`drive` as a Python loop, for searches that live on the host, such as `from_optuna`'s.

    `evaluate` is called from Python with arrays of numbers: wrap it in `jax.jit`. A pure search
    gives the trials that `drive` gives. `points` of the result are in JAX's default floating type;
    the search is told those it proposed.
    """
    _check(search, evaluate, rounds, "drive_on_host")
    start, run = jax.random.split(key)
    state, told = search.init(start), []
    for key in jax.random.split(run, rounds):
        points, state = search.ask(state)
        shown = jnp.asarray(points, float)
        scores = _checked(evaluate(key, shown), shown, "drive_on_host")
        state = search.tell(state, points, scores)
        told.append((np.asarray(shown), np.asarray(scores)))
    points, scores = (jnp.asarray(np.stack(column)) for column in zip(*told, strict=True))
    return state, _summary(points, scores)


def _check(search, evaluate, rounds: int, where: str) -> None:
    _checks.has_functions(where, "search", search, ("init", "ask", "tell"))
    _checks.is_callable(where, "evaluate", evaluate)
    _checks.positive_int(where, "rounds", rounds)


def _checked(scores, points, where: str) -> jax.Array:
    if jnp.shape(scores) != points.shape[:1]:
        raise ValueError(
            f"{where}: `evaluate` must return one score per point, [{points.shape[0]}]; got "
            f"{_checks.describe(scores)}. Map it over the points with `jax.vmap`."
        )
    return jnp.asarray(scores)


def _summary(points: jax.Array, scores: jax.Array) -> Trials:
    finite = jnp.isfinite(scores)
    best = jnp.argmin(jnp.where(finite, scores, jnp.inf).ravel())
    found = finite.any()
    return Trials(
        points,
        scores,
        jnp.where(found, points.reshape(-1, points.shape[-1])[best], jnp.nan),
        jnp.where(found, scores.ravel()[best], jnp.nan),
        jnp.sum(~finite, dtype=jnp.int32),
    )
