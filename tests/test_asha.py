"""ASHA in slots: who trains when, against the paper's rule written down as a loop in Python."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
import tiny_members as tiny
from jax.sharding import PartitionSpec
from problems import jit, mesh

import hyperjax as hj
from hyperjax import search

SIZE, SLOTS, BUDGETS, ETA = 13, 4, (3, 5, 8), 2
STEPS = 20


def asha(**options) -> hj.Tuner:
    return search.asha(tiny.tuner(), BUDGETS, slots=SLOTS, eta=ETA, **options)


@functools.cache
def outcome(broken=None, chunk=SLOTS):
    """Final state and metrics, as NumPy; `broken` diverges in its second step."""
    x, hparams = tiny.starts(SIZE)
    if broken is not None:
        # Its score overflows at the second step, and no earlier.
        hparams = {"rate": hparams["rate"].at[broken].set(1e100)}
    method = asha(chunk=chunk)
    run = jit(lambda s, d: hj.run(method, s, d))
    return jax.tree.map(np.asarray, run(method.init(x, hparams), tiny.splits(STEPS)))


def next_job(scores, running, started):
    """`get_job` of the paper: (candidate, rung), or None when there is nothing left."""
    for rung in reversed(range(len(BUDGETS) - 1)):
        row = scores[rung]
        ranked = sorted(row, key=lambda i: (np.isnan(row[i]), row[i]))
        top = [i for i in ranked[: len(row) // ETA] if not np.isnan(row[i])]
        ready = [i for i in top if i not in scores[rung + 1] and (i, rung + 1) not in running]
        if ready:
            return ready[0], rung + 1
    return (started, 0) if started < SIZE else None


def by_hand(broken=None):
    """Slots and scores of every step, and the steps at which each candidate has trained."""
    data = tiny.splits(STEPS)
    start, hparams = tiny.starts(SIZE)
    places, done = [np.array(x) for x in start], [0] * SIZE
    scores = [{} for _ in BUDGETS]
    slots: list[Any] = [(i, 0) for i in range(SLOTS)]
    started, history = SLOTS, []
    for t in range(STEPS):
        history.append([SIZE if job is None else job[0] for job in slots])
        free = []
        for place, job in enumerate(slots):
            if job is not None:
                who, rung = job
                row = jax.tree.map(lambda v, t=t: v[t : t + 1], data)
                x, value = tiny.train(places[who], hparams["rate"][who], row)
                places[who], done[who] = x[0], done[who] + 1
                value = np.nan if who == broken and done[who] == 2 else value[0]
                if done[who] < BUDGETS[rung] and not np.isnan(value):
                    continue
                scores[rung][who] = value
            free.append(place)
        for place in free:
            slots[place] = None
        for place in free:
            slots[place] = next_job(scores, [s for s in slots if s is not None], started)
            started += slots[place] is not None and slots[place][1] == 0
    return np.array(history), scores, np.array(places), np.array(done)


@pytest.mark.parametrize("broken", [None, 9])
def test_slots_take_the_jobs_of_the_paper(broken):
    if broken is not None:
        # It must get into its second step, or nothing would be tested.
        assert by_hand()[3][broken] > 1
    state, metrics = outcome(broken)
    history, scores, places, done = by_hand(broken)
    np.testing.assert_array_equal(metrics.slots, history)
    np.testing.assert_array_equal(state.steps, done)
    for rung, row in enumerate(scores):
        table = np.full(SIZE, np.nan)
        table[list(row)] = list(row.values())
        np.testing.assert_allclose(state.scores[:, rung], table, rtol=1e-12)
    # The same arithmetic in float64 in another order; a start anew would be far off.
    sound = np.arange(SIZE) != (-1 if broken is None else broken)
    np.testing.assert_allclose(state.members.x[sound], places[sound], rtol=1e-12, atol=1e-14)
    assert len(scores[2]) >= 2 and (history == SIZE).any()  # promotions, and idle slots at the end


def test_one_at_a_time_is_the_same():
    one, many = outcome(chunk=1)[0], outcome()[0]
    np.testing.assert_array_equal(one.steps, many.steps)
    np.testing.assert_allclose(one.members.x, many.members.x, rtol=1e-12, atol=1e-14)


def test_one_that_diverges_is_never_promoted_and_frees_its_slot():
    state, metrics = outcome(9)
    (when,) = np.nonzero((metrics.slots == 9).any(1))
    assert len(when) == 2 and state.steps[9] == 2  # of the three to the end of its rung
    assert np.isnan(state.scores[9]).all() and state.finished[9] == state.promoted[9] == 1
    assert np.isfinite(metrics.value[metrics.finite]).all()
    assert (metrics.leader[metrics.finite] != 9).all()


def test_a_score_is_not_all_that_may_diverge():
    x, hparams = tiny.starts(SIZE)
    method = search.asha(tiny.doubted(float(hparams["rate"][1])), BUDGETS, slots=SLOTS, eta=ETA)
    step, first = jit(method.step), jax.tree.map(lambda v: v[0], tiny.splits(1))
    state, metrics = step(method.init(x, hparams), first)
    assert metrics.finished.tolist() == [False, True, False, False]
    assert np.isnan(state.scores[1, 0]) and state.slots[1] == SLOTS  # the next one's turn
    # A half of those that ended may go on, but not where all have diverged.
    state, _ = step(method.init(x * np.nan, hparams), first)
    np.testing.assert_array_equal(state.slots, SLOTS + np.arange(SLOTS))


def test_the_leader_is_the_best_at_the_highest_rung():
    state, metrics = outcome()
    last = state.scores[:, -1]
    assert metrics.leader[-1] == np.nanargmin(last)
    assert metrics.value[-1] == np.nanmin(last)
    # Nobody leads before a rung is finished; then it is the best of the slots that did.
    np.testing.assert_array_equal(metrics.finite, np.arange(STEPS) >= 2)
    assert metrics.leader[2] == np.argmin(metrics.members.value[2])


def test_types_agree_and_float32_stays():
    method = asha()
    state = method.init(*tiny.starts(SIZE, np.float32))
    first = jax.tree.map(lambda v: v[0], tiny.splits(1, np.float32))
    after, _ = jit(method.step)(state, first)
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kind(after) == kind(state)
    assert not any(x.weak_type for x in jax.tree.leaves((state, after)))
    assert after.members.x.dtype == np.float32


def test_candidates_of_its_own_on_every_device():
    method, along = asha(), PartitionSpec("device")
    x, hparams = tiny.starts(8 * SIZE)
    run = lambda x, h: hj.run(method, method.init(x, h), tiny.splits(3))[1].value[None]
    each = jax.shard_map(run, mesh=mesh("device"), in_specs=along, out_specs=along)
    # Types decide whether a carry fits; the program is the one above.
    assert jax.eval_shape(each, x, hparams).shape == (8, 3)


def test_bad_input_is_refused():
    wrongs: Any = ((), (3, 1), (1, 1), (0, 1), (1.5,))
    for wrong in wrongs:
        with pytest.raises(ValueError, match="asha: `budgets` must be"):
            search.asha(tiny.tuner(), wrong, slots=2)
    with pytest.raises(ValueError, match="3 candidates cannot fill 4 slots"):
        asha().init(*tiny.starts(3))
    x, hparams = tiny.starts(13)
    with pytest.raises(ValueError, match="needs the same leading axis"):
        asha().init(x[:12], hparams)
