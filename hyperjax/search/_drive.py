"""Rounds of ask, evaluate, tell: in one compiled scan, or in a loop on the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _checks, _tree
from .._types import Key, PyTree, Scalar, State
from ._types import Search

Evaluate = Callable[[Key, jax.Array], jax.Array | tuple[jax.Array, PyTree]]


class Trials(NamedTuple):
    """All that a search evaluated, and the best of it."""

    points: jax.Array  # [rounds, N, D]
    scores: jax.Array  # [rounds, N], as they came
    point: jax.Array  # [D], of the smallest finite score; NaN if every evaluation failed
    score: Scalar  # the smallest finite score; NaN if there is none
    failed: jax.Array  # int32: evaluations whose score was not finite
    aux: PyTree = ()  # [rounds, ...]: what `evaluate` gave besides, if asked to


def drive(
    key: Key, search: Search, evaluate: Evaluate, rounds: int, *, has_aux: bool = False
) -> tuple[State, Trials]:
    """A pure search over `rounds` rounds in one `lax.scan`; for jit, and vmap over keys.

    `evaluate(key, points [N, D]) -> scores [N]`, typically a vmapped training of N replicas from
    `Space.from_unit(points)`, has a key of its own in every round. A score that is not finite is a
    failure: it is never the best, and counted. Inside shard_map scores may differ between devices
    if the keys do.

    With `has_aux`, `evaluate` returns (scores, aux), aux any pytree of arrays, test scores for
    example: the search sees the scores alone, and `Trials.aux` is aux of all rounds, [rounds, ...].

    Raises ValueError for fewer than one round, and for scores of another shape than [N]; TypeError
    with `has_aux` if `evaluate` returns no such pair.
    """
    _check(search, evaluate, rounds, "drive")
    start, run = jax.random.split(key)

    def one(state, key):
        points, state = search.ask(state)
        scores, aux = _checked(evaluate(key, points), points, has_aux, "drive")
        return search.tell(state, points, scores), (points, scores, aux)

    state = _tree.vary_like(_tree.strong(search.init(start)), key)
    state, told = lax.scan(one, state, jax.random.split(run, rounds))
    return state, _summary(*told)


def drive_on_host(
    key: Key, search: Search, evaluate: Evaluate, rounds: int, *, has_aux: bool = False
) -> tuple[State, Trials]:
    """`drive` as a Python loop, for searches that live on the host, such as `from_optuna`'s.

    `evaluate` is called from Python with arrays of numbers: wrap it in `jax.jit`. A pure search
    gives the trials that `drive` gives. `points` of the result are in JAX's default floating type;
    the search is told those it proposed. `has_aux` as in `drive`; aux comes to the host after every
    round.
    """
    _check(search, evaluate, rounds, "drive_on_host")
    start, run = jax.random.split(key)
    state, told = search.init(start), []
    for key in jax.random.split(run, rounds):
        points, state = search.ask(state)
        shown = jnp.asarray(points, float)
        scores, aux = _checked(evaluate(key, shown), shown, has_aux, "drive_on_host")
        state = search.tell(state, points, scores)
        told.append(jax.device_get((shown, scores, aux)))
    return state, _summary(*jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *told))


def _check(search, evaluate, rounds: int, where: str) -> None:
    _checks.has_functions(where, "search", search, ("init", "ask", "tell"))
    _checks.is_callable(where, "evaluate", evaluate)
    _checks.positive_int(where, "rounds", rounds)


def _checked(found: Any, points, has_aux: bool, where: str) -> tuple[jax.Array, PyTree]:
    if has_aux and not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError(
            f"{where}: with `has_aux`, `evaluate` must return (scores, aux); got "
            f"{_checks.describe(found)}. Without aux, leave `has_aux` out."
        )
    scores: Any
    scores, aux = found if has_aux else (found, ())
    if jnp.shape(scores) != points.shape[:1]:
        raise ValueError(
            f"{where}: `evaluate` must return one score per point, [{points.shape[0]}]; got "
            f"{_checks.describe(scores)}. Map it over the points with `jax.vmap`."
        )
    return jnp.asarray(scores), aux


def _summary(points: jax.Array, scores: jax.Array, aux: PyTree) -> Trials:
    finite = jnp.isfinite(scores)
    best = jnp.argmin(jnp.where(finite, scores, jnp.inf).ravel())
    found = finite.any()
    return Trials(
        points,
        scores,
        jnp.where(found, points.reshape(-1, points.shape[-1])[best], jnp.nan),
        jnp.where(found, scores.ravel()[best], jnp.nan),
        jnp.sum(~finite, dtype=jnp.int32),
        aux,
    )
