"""DEHB: differential evolution in the rungs of Hyperband (Awad et al. 2021, arXiv 2105.09821)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _tree
from .._types import Key
from ._halving import survivors
from ._hyperband import (
    Asked,
    FidelitySearch,
    HyperbandState,
    Incumbent,
    Round,
    check_told,
    hyperband,
    take_turn,
)


class Subpopulation(NamedTuple):
    """What is kept at one budget."""

    points: jax.Array  # [size, dimension]
    scores: jax.Array  # [size]; inf: not evaluated, or failed
    parent: jax.Array  # int32: the row whose turn to be a parent is next


class DehbState(NamedTuple):
    key: Key
    hyperband: HyperbandState  # of the first iteration; afterwards it only keeps the incumbent
    pools: tuple[Subpopulation, ...]  # one per budget, ascending
    told: jax.Array  # int32: rounds so far


def dehb(
    dimension: int,
    budget: int,
    *,
    eta: int = 3,
    least: int = 1,
    factor: float = 0.5,
    crossover: float = 0.5,
) -> FidelitySearch:
    """Differential evolution whose mutants at one budget come from the best at the budget below.

    The first iteration is Hyperband's, point for point with the same key, and fills one
    subpopulation per budget, as large as the largest rung there. From then on each rung of n
    evolves: parents are taken from the budget's subpopulation by turns; mutants a + factor (b - c)
    from the best n of the budget below (of the same budget in a bracket's first rung), topped up
    from all subpopulations where there are fewer than three; binomial crossover with rate
    `crossover`, and entries outside the unit cube drawn anew. A child takes its parent's place
    unless it is worse; a failed one never does.

    A batch is evaluated at once, so in a bracket's first rung no child is mutated from another of
    the same rung. The authors' code differs in the first iteration: it evolves the first rung of
    each bracket already then, and promotes from the whole subpopulation below.

    Raises ValueError unless dimension, least <= budget and eta - 1 are positive integers, factor
    is in (0, 2] and crossover in [0, 1].
    """
    if not 0 < factor <= 2:
        raise ValueError(f"dehb: `factor` must be in (0, 2]; got {factor!r}.")
    if not 0 <= crossover <= 1:
        raise ValueError(f"dehb: `crossover` must be in [0, 1]; got {crossover!r}.")
    first = hyperband(dimension, budget, eta=eta, least=least)
    plan = first.rounds
    ladder = sorted({r.budget for r in plan})
    sizes = [max(r.members for r in plan if r.budget == b) for b in ladder]

    def init(key: Key) -> DehbState:
        own, draw = jax.random.split(key)
        whole = jax.random.uniform(draw, (sum(sizes), dimension), float)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        pools = [
            Subpopulation(whole[end - n : end], jnp.full(n, jnp.inf, float), jnp.int32(0))
            for n, end in zip(sizes, ends, strict=True)
        ]
        return _tree.vary_like(DehbState(own, first.init(key), tuple(pools), jnp.int32(0)), key)

    def ask(turn: int, state: DehbState) -> tuple[Asked, DehbState]:
        now = take_turn("dehb", plan, turn)
        fresh, inner = first.ask(turn, state.hyperband)
        key, draw = jax.random.split(state.key)
        children = _evolve(draw, state.pools, ladder.index(now.budget), now, factor, crossover)
        evolved = Asked(children, jnp.full(now.members, -1, jnp.int32))
        asked = _tree.where(state.told < len(plan), fresh, evolved)
        return asked, state._replace(key=key, hyperband=inner)

    def tell(turn: int, state: DehbState, points, scores) -> DehbState:
        now = take_turn("dehb", plan, turn)
        points, scores = check_told("dehb", now, dimension, points, scores)
        level = ladder.index(now.budget)
        pools = list(state.pools)
        pools[level] = _select(pools[level], points, scores)
        inner = first.tell(turn, state.hyperband, points, scores)
        return DehbState(state.key, inner, tuple(pools), state.told + 1)

    def best(state: DehbState) -> Incumbent:
        return first.best(state.hyperband)

    return FidelitySearch(plan, init, ask, tell, best)


def _parents(pool: Subpopulation, count: int) -> jax.Array:
    return (pool.parent + jnp.arange(count, dtype=jnp.int32)) % len(pool.scores)


def _select(pool: Subpopulation, points, scores) -> Subpopulation:
    rows = _parents(pool, len(scores))
    scores = jnp.where(jnp.isfinite(scores), scores, jnp.inf).astype(pool.scores.dtype)
    take = jnp.isfinite(scores) & (scores <= pool.scores[rows])
    return Subpopulation(
        pool.points.at[rows].set(jnp.where(take[:, None], points, pool.points[rows])),
        pool.scores.at[rows].set(jnp.where(take, scores, pool.scores[rows])),
        (pool.parent + len(scores)) % len(pool.scores),
    )


def _evolve(key: Key, pools, level: int, now: Round, factor: float, crossover: float):
    """Children [members, dimension] of the parents whose turn it is."""
    own, below = pools[level], pools[level if now.rung == 0 else level - 1]
    best = below.points[survivors(below.scores, now.members)]
    everybody = jnp.concatenate([pool.points for pool in pools])
    # One more than the three that a mutant needs, so that there is something to choose.
    extra = 4 - now.members if now.members < 3 else 0

    def child(key, parent):
        fill, pick, cross, forced, redraw = jax.random.split(key, 5)
        pool = best
        if extra:
            rows = jax.random.randint(fill, (extra,), 0, len(everybody))
            pool = jnp.concatenate([best, everybody[rows]])
        a, b, c = pool[_three(pick, len(pool))]
        mutant = a + factor * (b - c)
        mixed = jax.random.uniform(cross, parent.shape) < crossover
        mixed = mixed.at[jax.random.randint(forced, (), 0, parent.size)].set(True)
        made = jnp.where(mixed, mutant, parent)
        anew = jax.random.uniform(redraw, parent.shape, parent.dtype)
        return jnp.where((made >= 0) & (made <= 1), made, anew)

    keys = jax.random.split(key, now.members)
    return jax.vmap(child)(keys, own.points[_parents(own, now.members)])


def _three(key: Key, size: int) -> jax.Array:
    """Three different rows out of `size`, uniformly, without a sort."""
    first, second, third = (
        jax.random.randint(k, (), 0, size - i) for i, k in enumerate(jax.random.split(key, 3))
    )
    # The second counts past the first, the third past both of them.
    second = second + (second >= first)
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    third = third + (third >= low)
    third = third + (third >= high)
    return jnp.stack([first, second, third])
