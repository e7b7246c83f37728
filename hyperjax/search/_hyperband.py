"""Hyperband (Li et al. 2018, arXiv 1603.06560) by ask and tell, and what such searches share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._types import Key, State
from ._halving import brackets, survivors


class Round(NamedTuple):
    """One batch of evaluations, in plain integers."""

    bracket: int
    rung: int
    members: int
    budget: int  # the fidelity of the evaluations


class Asked(NamedTuple):
    """What to evaluate in one round of n."""

    points: jax.Array  # [n, dimension], in the unit cube
    # int32 [n]: the row of the round before whose training goes on here; -1: a new one
    parents: jax.Array


class Incumbent(NamedTuple):
    """The best point so far, judged at the highest budget that anything has been evaluated at."""

    point: jax.Array  # [dimension]
    score: jax.Array  # inf before the first
    budget: jax.Array  # int32; 0 before the first


class FidelitySearch(NamedTuple):
    """A search that chooses budgets too, by ask and tell.

    One iteration is `rounds`, in order, and may be repeated for as long as one likes. A round's
    number is a static integer, which makes every shape static: all functions are pure and work
    under jit, vmap (many searches at once) and, an iteration at a time, in a scan.

      for turn, (_, _, members, budget) in enumerate(search.rounds):
          asked, state = search.ask(turn, state)
          state = search.tell(turn, state, asked.points, evaluate(asked, budget))

    Smaller scores are better; one that is not finite has failed. `Space.from_unit` turns points
    into hyperparameters. An evaluation may go on from the training that `Asked.parents` names, or
    begin anew.
    """

    rounds: tuple[Round, ...]
    init: Callable[[Key], State]
    ask: Callable[[int, State], tuple[Asked, State]]
    tell: Callable[[int, State, jax.Array, jax.Array], State]
    best: Callable[[State], Incumbent]


class HyperbandState(NamedTuple):
    key: Key
    points: jax.Array  # [most members, dimension]: of the round before, then padding
    scores: jax.Array  # [most members]
    best: Incumbent


def hyperband(dimension: int, budget: int, *, eta: int = 3, least: int = 1) -> FidelitySearch:
    """Random points, and of each rung the best 1/eta at the next budget: see `brackets`.

    The scores decide alone, so failed ones are promoted only where there are too few others. For
    training populations that are kept in memory `successive_halving` does the same without a
    search, a bracket at a time.

    Raises ValueError unless dimension, least <= budget and eta - 1 are positive integers.
    """
    _checks.positive_int("hyperband", "dimension", dimension)
    plan = rounds(budget, eta=eta, least=least)
    most = max(r.members for r in plan)

    def init(key: Key) -> HyperbandState:
        points = jnp.zeros((most, dimension), float)
        state = HyperbandState(key, points, jnp.full(most, jnp.inf, float), nobody(dimension))
        return _tree.vary_like(state, key)

    def ask(turn: int, state: HyperbandState) -> tuple[Asked, HyperbandState]:
        now = take_turn("hyperband", plan, turn)
        if now.rung == 0:
            key, draw = jax.random.split(state.key)
            points = jax.random.uniform(draw, (now.members, dimension), state.points.dtype)
            parents = jnp.full(now.members, -1, jnp.int32)
            return Asked(points, parents), state._replace(key=key)
        before = plan[turn - 1].members
        parents = survivors(state.scores[:before], now.members)
        return Asked(state.points[parents], parents), state

    def tell(turn: int, state: HyperbandState, points, scores) -> HyperbandState:
        now = take_turn("hyperband", plan, turn)
        points, scores = check_told("hyperband", now, dimension, points, scores)
        room = most - now.members
        return HyperbandState(
            state.key,
            jnp.pad(points.astype(state.points.dtype), ((0, room), (0, 0))),
            jnp.pad(scores.astype(state.scores.dtype), (0, room), constant_values=jnp.inf),
            better(state.best, points, scores, now.budget),
        )

    return FidelitySearch(plan, init, ask, tell, lambda state: state.best)


def rounds(budget: int, *, eta: int, least: int) -> tuple[Round, ...]:
    """All rungs of all brackets in the order they are run."""
    listing = enumerate(brackets(budget, eta=eta, least=least))
    return tuple(Round(b, i, *rung) for b, bracket in listing for i, rung in enumerate(bracket))


def take_turn(where: str, plan: tuple[Round, ...], turn: int) -> Round:
    if isinstance(turn, bool) or not isinstance(turn, int) or not 0 <= turn < len(plan):
        raise ValueError(
            f"{where}: `turn` must be a plain integer from 0 to {len(plan) - 1}, the number of a "
            f"round; got {turn!r}. Under jit make it a static argument."
        )
    return plan[turn]


def check_told(where: str, now: Round, dimension: int, points, scores):
    points, scores = jnp.asarray(points), jnp.asarray(scores)
    if points.shape != (now.members, dimension) or scores.shape != (now.members,):
        raise ValueError(
            f"{where}: this round has `points` [{now.members}, {dimension}] and `scores` "
            f"[{now.members}]; got {_checks.describe(points)} and {_checks.describe(scores)}."
        )
    return points, scores


def nobody(dimension: int) -> Incumbent:
    return Incumbent(jnp.zeros(dimension, float), jnp.full((), jnp.inf, float), jnp.int32(0))


def better(best: Incumbent, points, scores, budget: int) -> Incumbent:
    """The incumbent after a round at `budget`: a higher budget wins, then the lower score."""
    row = survivors(scores, 1)[0]
    score = jnp.where(jnp.isfinite(scores[row]), scores[row], jnp.inf).astype(best.score.dtype)
    found = Incumbent(points[row].astype(best.point.dtype), score, jnp.int32(budget))
    higher = (budget > best.budget) & jnp.isfinite(score)
    win = higher | ((budget == best.budget) & (score < best.score))
    return jax.tree.map(lambda new, old: jnp.where(win, new, old), found, best)
