"""DEHB: Hyperband at first, then children that can be taken apart into those they were made of."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import jit

from hyperjax import search

DIMENSION, BUDGET = 3, 9
SEARCH = search.dehb(DIMENSION, BUDGET)
LADDER = (1, 3, 9)
SIZES = (9, 3, 3)
FACTOR = 0.5


def objective(points, budget):
    value = jnp.sum((points - 0.3) ** 2, 1) * (1 + points[:, 0] / budget)
    return jnp.where(points[:, 1] > 0.95, jnp.nan, value)


def iterate(method):
    @jit
    def run(state):
        log = []
        for turn, now in enumerate(method.rounds):
            before = state
            asked, state = method.ask(turn, state)
            scores = objective(asked.points, now.budget)
            state = method.tell(turn, state, asked.points, scores)
            log.append((before, asked, scores, state))
        return log, state

    return run


@functools.cache
def iterations(count=4):
    """The logs of `count` iterations, rounds in a row."""
    run, state, logs = iterate(SEARCH), SEARCH.init(jax.random.key(0)), []
    for _ in range(count):
        log, state = run(state)
        logs += jax.tree.map(_host, log)
    return logs


def _host(x):
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


def test_the_first_iteration_is_hyperbands():
    hyperband = search.hyperband(DIMENSION, BUDGET)
    other, state = iterate(hyperband)(hyperband.init(jax.random.key(0)))
    assert SEARCH.rounds == hyperband.rounds
    for (_, mine, *_), (_, asked, *_) in zip(iterations(), other, strict=False):
        jax.tree.map(np.testing.assert_array_equal, mine, asked)
    after = SEARCH.best(iterations()[len(SEARCH.rounds) - 1][3])
    jax.tree.map(np.testing.assert_array_equal, after, jax.tree.map(np.asarray, state.best))


def test_children_come_from_their_parent_and_the_best_below():
    taken, moved = 0, []
    rounds = len(SEARCH.rounds)
    for turn, (state, asked, *_) in enumerate(iterations()[rounds:], rounds):
        now = SEARCH.rounds[turn % rounds]
        assert (asked.parents == -1).all()
        assert (asked.points >= 0).all() and (asked.points <= 1).all()
        if now.members < 3:
            continue  # topped up at random: below
        level = LADDER.index(now.budget)
        own, below = state.pools[level], state.pools[level - (now.rung > 0)]
        best = below.points[np.argsort(below.scores, kind="stable")[: now.members]]
        triples = np.asarray(list(itertools.permutations(range(len(best)), 3)))
        a, b, c = (best[triples[:, i]] for i in range(3))
        mutants = a + FACTOR * (b - c)
        for i, child in enumerate(asked.points):
            parent = own.points[(own.parent + i) % len(own.points)]
            from_parent = child == parent
            inside = (mutants >= 0) & (mutants <= 1)
            # A coordinate is its parent's, its mutant's, or anything where the mutant's is outside.
            fits = from_parent[None] | np.isclose(mutants, child, rtol=0, atol=1e-14) | ~inside
            assert fits.all(1).any()
            taken += from_parent.sum()
            moved.append(not from_parent.all())
    # Rows that have inherited the same coordinate differ by nothing there, so a few stay put.
    assert taken > 0 and np.mean(moved) > 0.7


def test_what_falls_out_of_the_cube_is_drawn_anew():
    # Between corners a + (b - c) / 2 is -1/2, 0, 1/2, 1 or 3/2, and the ends are not in the cube.
    method = search.dehb(DIMENSION, BUDGET, crossover=1.0)
    state, rng = method.init(jax.random.key(1)), np.random.default_rng(0)
    corners = [
        p._replace(points=jnp.asarray(rng.integers(0, 2, p.points.shape), float))
        for p in state.pools
    ]
    later = state._replace(pools=tuple(corners), told=jnp.int32(len(method.rounds)))
    points = np.asarray(jax.jit(method.ask, static_argnums=0)(0, later)[0].points)
    inside = np.isin(points, (0, 0.5, 1))
    assert inside.any() and not inside.all()
    assert len(np.unique(points[~inside])) == (~inside).sum()
    assert (points >= 0).all() and (points <= 1).all()


@pytest.mark.parametrize(("rate", "changed"), [(0.0, 1), (1.0, DIMENSION)])
def test_crossover_copies_all_or_a_single_coordinate(rate, changed):
    method = search.dehb(DIMENSION, BUDGET, crossover=rate)
    state = method.init(jax.random.key(2))
    later = state._replace(told=jnp.int32(len(method.rounds)))
    points = jax.jit(method.ask, static_argnums=0)(0, later)[0].points
    differs = np.asarray(points != state.pools[0].points)  # nine rows, each a parent in turn
    np.testing.assert_array_equal(differs.sum(1), np.full(9, changed))
    assert differs.any(0).all()


def test_small_rungs_are_topped_up_from_all_subpopulations():
    # One best point and three others drawn: a child of the last rung has some coordinate that no
    # combination of the best alone, the parent, gives; and it stays in the hull's reach.
    rounds = len(SEARCH.rounds)
    singles = [
        (state, asked.points[0])
        for turn, (state, asked, *_) in enumerate(iterations()[rounds:], rounds)
        if SEARCH.rounds[turn % rounds].members == 1
    ]
    assert len(singles) == 6
    explained = foreign = 0
    for state, child in singles:
        pool = np.concatenate([p.points for p in state.pools])
        # For each coordinate, is it a + F (b - c) of some three rows? All of them, or redrawn.
        grid = pool[:, None, None] + FACTOR * (pool[None, :, None] - pool[None, None, :])
        near = np.isclose(grid, child, rtol=0, atol=1e-14)
        parent = state.pools[2].points[state.pools[2].parent]
        best = state.pools[1].points[np.argmin(state.pools[1].scores)]
        foreign += ((child != best) & (child != parent)).any()
        explained += (near.all(-1).any() | (near | (child == parent)).all(-1).any()).item()
    assert explained >= 3
    # Two rows drawn may be the same point, and then the mutant is a third: not often.
    assert foreign >= 4


def test_a_child_takes_its_parents_place_unless_it_is_worse():
    pools = [[np.array(p.points), np.array(p.scores), 0] for p in iterations()[0][0].pools]
    assert tuple(len(p[1]) for p in pools) == SIZES
    failed = 0
    for turn, (_, asked, scores, state) in enumerate(iterations()):
        now = SEARCH.rounds[turn % len(SEARCH.rounds)]
        pool = pools[LADDER.index(now.budget)]
        for point, score in zip(asked.points, scores, strict=True):
            row = pool[2] % len(pool[1])
            if score <= pool[1][row]:
                pool[0][row], pool[1][row] = point, score
            failed += np.isnan(score)
            pool[2] += 1
        for mine, expected in zip(state.pools, pools, strict=True):
            np.testing.assert_array_equal(mine.points, expected[0])
            np.testing.assert_array_equal(mine.scores, expected[1])
    assert failed > 0 and int(iterations()[-1][3].told) == len(iterations())


def test_a_child_that_is_as_good_takes_the_place():
    state = SEARCH.init(jax.random.key(0))
    first, second = jnp.full((9, DIMENSION), 0.25), jnp.full((9, DIMENSION), 0.75)
    for points in (first, second):
        state = SEARCH.tell(0, state, points, jnp.ones(9))
    np.testing.assert_array_equal(state.pools[0].points, second)


def weak(x) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.weak_type


def test_states_keep_their_types():
    start, end = SEARCH.init(jax.random.key(0)), iterations()[-1][3]
    kind = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    assert kind(end) == kind(start)
    assert not any(weak(x) for x in jax.tree.leaves(start))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"`factor` must be in \(0, 2\]; got 0"):
        search.dehb(2, 9, factor=0)
    with pytest.raises(ValueError, match=r"`crossover` must be in \[0, 1\]; got 1.5"):
        search.dehb(2, 9, crossover=1.5)
