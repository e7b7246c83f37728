"""Hyperband by ask and tell: random points, then the best of them, at the budgets of the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_members as tiny
from jax.sharding import PartitionSpec
from problems import jit, mesh

from hyperjax import search

SEARCH = search.hyperband(2, 9)  # brackets 9@1 3@3 1@9, 3@3 1@9, 3@9


def objective(points, budget):
    """Coordinates matter more or less as the budget grows, and corners fail."""
    value = points[:, 0] + points[:, 1] / budget
    return jnp.where(points.min(1) > 0.9, jnp.nan, value)


@functools.cache
def iteration(seed=0):
    """What was asked and answered in each round, and the state at the end."""

    @jit
    def run(state):
        log = []
        for turn, now in enumerate(SEARCH.rounds):
            asked, state = SEARCH.ask(turn, state)
            scores = objective(asked.points, now.budget)
            state = SEARCH.tell(turn, state, asked.points, scores)
            log.append((asked, scores, SEARCH.best(state)))
        return log, state

    log, state = run(SEARCH.init(jax.random.key(seed)))
    return jax.tree.map(np.asarray, log), state


def test_rounds_and_their_cost():
    flat = [(r.members, r.budget) for r in SEARCH.rounds]
    assert flat == [(9, 1), (3, 3), (1, 9), (3, 3), (1, 9), (3, 9)]
    # Section 3 of the paper: no bracket costs more than (s_max + 1) R.
    large = search.hyperband(1, 81).rounds
    costs = [sum(r.members * r.budget for r in large if r.bracket == b) for b in range(5)]
    assert max(costs) == costs[0] == 5 * 81
    assert sum(costs) == (5 + 4 + 3 + 4 + 5) * 81


def test_rungs_are_the_best_of_the_rung_before():
    log, _ = iteration()
    for turn, (now, (asked, _, _)) in enumerate(zip(SEARCH.rounds, log, strict=True)):
        assert asked.points.shape == (now.members, 2)
        assert (asked.points >= 0).all() and (asked.points < 1).all()
        if now.rung == 0:
            assert (asked.parents == -1).all()
            continue
        before, known, _ = log[turn - 1]
        best = np.argsort(np.where(np.isnan(known), np.inf, known))[: now.members]
        np.testing.assert_array_equal(asked.parents, best)
        np.testing.assert_array_equal(asked.points, before.points[best])
    pairs = zip(log, SEARCH.rounds, strict=True)
    starts = np.concatenate([asked.points for (asked, *_), now in pairs if now.rung == 0])
    assert len(np.unique(starts, axis=0)) == 9 + 3 + 3


def test_the_incumbent_is_the_best_at_the_highest_budget():
    log, _ = iteration()
    seen = {}
    for now, (asked, scores, best) in zip(SEARCH.rounds, log, strict=True):
        rows = seen.setdefault(now.budget, [])
        rows += [(s, *p) for s, p in zip(scores, asked.points, strict=True) if np.isfinite(s)]
        top = max(b for b, found in seen.items() if found)
        expected = min(seen[top])
        assert int(best.budget) == top
        assert (float(best.score), *best.point) == pytest.approx(expected, abs=0)


def test_failures_are_never_promoted_nor_the_best():
    state = SEARCH.init(jax.random.key(0))
    asked, state = SEARCH.ask(0, state)
    scores = jnp.asarray([jnp.nan, 3.0, -jnp.inf, 1.0, jnp.inf, 2.0, jnp.nan, 5.0, 4.0])
    state = SEARCH.tell(0, state, asked.points, scores)
    assert SEARCH.ask(1, state)[0].parents.tolist() == [3, 5, 1]
    state = SEARCH.tell(1, state, asked.points[:3], jnp.full(3, jnp.nan))
    best = SEARCH.best(state)
    assert (float(best.score), int(best.budget)) == (1.0, 1)
    np.testing.assert_array_equal(best.point, asked.points[3])


def test_going_on_is_as_good_as_beginning_anew():
    # The same bracket twice: asked and told with trainings from the beginning, by NumPy, and as a
    # population that is cut and goes on. Nobody may be kept by one and lost by the other.
    data, (x, _) = tiny.splits(9), tiny.starts(9)
    state = SEARCH.init(jax.random.key(3))
    ask, tell = (jax.jit(f, static_argnums=0) for f in (SEARCH.ask, SEARCH.tell))
    rows, promoted = np.arange(9), []
    rates = ask(0, state)[0].points[:, 0]
    for turn in range(3):
        asked, state = ask(turn, state)
        rows = rows[np.asarray(asked.parents)] if turn else rows
        promoted.append(rows)
        budget = SEARCH.rounds[turn].budget
        part = jax.tree.map(lambda v, b=budget: v[:b], data)
        ends = [tiny.train(x[i], rates[i], part)[1][-1] for i in rows]
        state = tell(turn, state, asked.points, jnp.asarray(ends))
    members = jax.vmap(tiny.tuner().init)(x, {"rate": rates})
    train = search.successive_halving(tiny.tuner(), search.brackets(9)[0], chunk=9)
    for expected, rung in zip(promoted, jit(train)(members, data).rungs, strict=True):
        np.testing.assert_array_equal(rung.slots, expected)


def weak(x) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.weak_type


def test_states_keep_their_types_and_searches_vmap():
    _, end = iteration()
    start = SEARCH.init(jax.random.key(0))
    kind = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    assert kind(end) == kind(start)
    assert not any(weak(x) for x in jax.tree.leaves(start))
    keys = jax.random.split(jax.random.key(1), 3)
    many = jit(jax.vmap(lambda k: SEARCH.ask(0, SEARCH.init(k))[0].points))(keys)
    for row, key in zip(many, keys, strict=True):
        np.testing.assert_array_equal(row, SEARCH.ask(0, SEARCH.init(key))[0].points)


@pytest.mark.parametrize("method", [SEARCH, search.dehb(2, 9)], ids=["hyperband", "dehb"])
def test_iterations_scan_inside_shard_map(method):
    def again(state, _):
        for turn, now in enumerate(method.rounds):
            asked, state = method.ask(turn, state)
            state = method.tell(turn, state, asked.points, objective(asked.points, now.budget))
        return state, method.best(state).score

    along = PartitionSpec("seed")
    each = jax.shard_map(
        lambda keys: jax.lax.scan(again, method.init(keys[0]), length=2)[1][None],
        mesh=mesh("seed"),
        in_specs=along,
        out_specs=along,
    )
    # Types decide whether a carry fits; the program is the one above.
    keys = jax.random.split(jax.random.key(0), 8)
    assert jax.eval_shape(each, keys).shape == (8, 2)


def test_bad_input_is_refused():
    state = SEARCH.init(jax.random.key(0))
    for turn in (-1, 6, True, jnp.int32(0)):
        with pytest.raises(ValueError, match="`turn` must be a plain integer from 0 to 5"):
            SEARCH.ask(turn, state)
    with pytest.raises(ValueError, match=r"this round has `points` \[3, 2\] and `scores` \[3\]"):
        SEARCH.tell(1, state, jnp.zeros((9, 2)), jnp.zeros(9))
    with pytest.raises(ValueError, match="`dimension` must be an integer >= 1"):
        search.hyperband(0, 9)
