"""Rungs as published, survivors as trained: what is cut costs nothing, what stays is untouched."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_members as tiny
from jax.sharding import AxisType
from problems import jit, mesh

import hyperjax as hj
from hyperjax import search

RUNGS = (search.Rung(16, 2), search.Rung(8, 3), search.Rung(4, 6))


def test_brackets_are_those_of_the_paper():
    # Li et al. 2018, table 1: R = 81, eta = 3, as (n, r) by bracket.
    table = (
        ((81, 1), (27, 3), (9, 9), (3, 27), (1, 81)),
        ((27, 3), (9, 9), (3, 27), (1, 81)),
        ((9, 9), (3, 27), (1, 81)),
        ((6, 27), (2, 81)),
        ((5, 81),),
    )
    assert search.brackets(81) == table
    assert search.rungs(81, 81) == table[0]


def test_rungs_of_other_sizes():
    assert search.rungs(10, 100, eta=3) == ((10, 1), (3, 4), (1, 11), (1, 33), (1, 100))
    assert search.rungs(16, 8, eta=2, least=2) == ((16, 2), (8, 4), (4, 8))
    assert search.rungs(4, 5, least=5) == ((4, 5),)
    # 3^5 = 243 exactly: the logarithm in floating point is 4.999...
    assert len(search.brackets(243)) == 6
    for bracket in search.brackets(729, least=9):
        for above, below in itertools.pairwise(bracket):
            assert above.members == 3 * below.members
            assert below.budget == 3 * above.budget


@pytest.mark.parametrize("size", [1, 7])
def test_compaction_is_a_selection(rng, size):
    members = {"a": rng.normal(size=(size, 3)), "b": np.arange(size)}
    score = rng.permutation(size) / 7
    score[rng.integers(size)] = np.nan
    order = sorted(range(size), key=lambda i: (np.isnan(score[i]), score[i]))
    for keep in {1, (size + 1) // 2, size}:
        found, slots = search.compact(members, jnp.asarray(score), keep)
        assert slots.dtype == np.int32
        np.testing.assert_array_equal(slots, order[:keep])
        np.testing.assert_array_equal(found["a"], members["a"][order[:keep]])
        np.testing.assert_array_equal(found["b"], np.arange(size)[order[:keep]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_diverged_members_are_kept_only_to_fill_up(bad):
    score = jnp.asarray([bad, 3.0, bad, 1.0, 2.0])
    slots = lambda keep: search.compact(jnp.arange(5), score, keep)[1].tolist()
    assert slots(3) == [3, 4, 1]
    assert slots(4) == [3, 4, 1, 0]


def members(dtype: Any = np.float64):
    return jax.vmap(tiny.tuner().init)(*tiny.starts(16, dtype))


@functools.cache
def halved(chunk):
    train = search.successive_halving(tiny.tuner(), RUNGS, chunk=chunk)
    return jax.tree.map(np.asarray, jit(train)(members(), tiny.splits(6)))


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_survivors_are_where_numpy_says(chunk):
    # The same arithmetic in float64, in another order: 1e-12 is a thousand roundings.
    result, (x, score) = halved(chunk), tiny.train_all(16, tiny.splits(6))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    rows, before = np.arange(16), 0
    for (size, budget), rung in zip(RUNGS, result.rungs, strict=True):
        assert len(rows) == size
        np.testing.assert_array_equal(rung.slots, rows)
        close(rung.metrics.value, score[rows, before:budget].T)
        close(rung.score, score[rows, budget - 1])
        rows = rows[np.argsort(score[rows, budget - 1])]
        rows, before = rows[: {16: 8, 8: 4, 4: 4}[size]], budget
    np.testing.assert_array_equal(result.slots, rows)
    close(result.members.x, x[rows, -1])
    np.testing.assert_array_equal(result.members.steps, [6] * 4)  # nobody began anew
    # The problem can tell: who is best changes on the way, and is not the first by position.
    assert len({int(np.argmin(score[:, b - 1])) for _, b in RUNGS}) > 1


def tuned():
    """Members that descend a hypergradient: nested states, an optimizer's state and a gradient."""
    loss = lambda params, hparams, batch: jnp.sum((params - batch) ** 2) / 2
    training = hj.inner(loss, lambda h: optax.sgd(jax.nn.sigmoid(h["rate"]), momentum=0.5))
    score = lambda params, hparams, batch: jnp.sum((params - batch) ** 2)
    estimator = hj.hypergradient(hj.unroll(training.step), score, training.init)
    return hj.tune(estimator, optax.adam(0.1))


def test_promotion_goes_on_bit_for_bit():
    # One member at a time is one program, whatever the number of members: no bit may differ from
    # the run of everybody in which nobody is cut.
    tuner, data = tuned(), tiny.splits(6)
    start = jax.vmap(tuner.init)(*tiny.starts(16))
    halved = jit(search.successive_halving(tuner, RUNGS, chunk=1))(start, data)
    group = hj.population(tuner, hj.exchange.isolation(), chunk=1)
    state = group.init(jax.random.key(0), *tiny.starts(16))
    state, _ = jit(lambda s, x: hj.run(group, s, x))(state, data)
    expected = jax.tree.map(lambda x: x[halved.slots], state.members)
    jax.tree.map(np.testing.assert_array_equal, halved.members, expected)
    moved = halved.members.hparams["rate"] - tiny.starts(16)[1]["rate"][halved.slots]
    assert (jnp.abs(moved) > 0.01).all()  # six steps of Adam at 0.1, to and fro


def test_a_diverged_member_is_never_promoted():
    best = int(halved(16).slots[0])
    start = members()
    broken = start._replace(x=start.x.at[best, 0].set(jnp.nan))
    train = search.successive_halving(tiny.tuner(), RUNGS, chunk=16)
    result = jit(train)(broken, tiny.splits(6))
    assert_left_out(result, best)
    # Nor is one whose score is finite, but not all else.
    doubted = tiny.doubted(float(start.hparams["rate"][best]))
    train = search.successive_halving(doubted, RUNGS[:2], chunk=16)
    data = jax.tree.map(lambda x: x[:3], tiny.splits(6))
    assert_left_out(jit(train)(start, data), best)


def assert_left_out(result, best):
    assert np.isnan(result.rungs[0].score[best])
    assert best not in np.concatenate([r.slots for r in result.rungs[1:]])
    assert all(np.isfinite(r.score).all() for r in result.rungs[1:])


def test_types_stay_float32_and_populations_vmap():
    train = search.successive_halving(tiny.tuner(), RUNGS, chunk=16)
    start, data = members(np.float32), tiny.splits(6, np.float32)
    result = jit(train)(start, data)
    kind = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert kind(result.members) == kind(start)
    assert result.rungs[-1].score.dtype == np.float32
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), start)
    both = jit(jax.vmap(train, (0, None)))(twice, data)
    np.testing.assert_array_equal(both.slots[0], result.slots)
    np.testing.assert_array_equal(15 - both.slots[1], result.slots)


def test_devices_share_each_rung():
    stages = (search.Rung(16, 2), search.Rung(8, 4))
    data = tiny.splits(4)
    outcome = lambda devices: jit(
        search.successive_halving(tiny.tuner(), stages, chunk=1, mesh=devices)
    )(members(), data)
    # Each member is one program here and there.
    jax.tree.map(np.testing.assert_array_equal, outcome(None), outcome(mesh("member")))
    with pytest.raises(ValueError, match="4 members cannot be shared equally by 8 devices"):
        search.successive_halving(tiny.tuner(), RUNGS, mesh=mesh("member"))
    # Members lie along the first axis; others are for data inside a member.
    both = jax.make_mesh((4, 2), ("member", "data"), axis_types=(AxisType.Auto,) * 2)
    search.successive_halving(tiny.tuner(), RUNGS, mesh=both)


def test_bad_input_is_refused():
    train = search.successive_halving(tiny.tuner(), RUNGS)
    with pytest.raises(ValueError, match="holds 5 outer steps, but the rungs end at 6"):
        train(members(), tiny.splits(5))
    with pytest.raises(ValueError, match="leading axis 16, the members of the first rung"):
        train(jax.tree.map(lambda x: x[:15], members()), tiny.splits(6))
    wrongs: Any = ([], [(4, 2), (5, 3)], [(4, 2), (2, 2)], [(0, 1)], [(4, 1.5)])
    for wrong in wrongs:
        with pytest.raises(ValueError, match="successive_halving: `rungs"):
            search.successive_halving(tiny.tuner(), wrong)
    with pytest.raises(ValueError, match="`keep` must be at most the 3 members; got 4"):
        search.compact(jnp.zeros(3), jnp.zeros(3), 4)
    for options in ({"eta": 1}, {"least": 0}, {"least": 28}):
        with pytest.raises(ValueError, match="must be an integer >="):
            search.rungs(9, 27, **options)
