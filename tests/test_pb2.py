"""PB2: what it remembers, whom it replaces, and that its bandit finds what the rows show."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from problems import jit

import hyperjax as hj
from hyperjax.exchange import _pb2

SPACE = hj.space({"lr": hj.loguniform(1e-4, 1.0), "shift": hj.real(shape=(1,))})
WINDOW = 24


class Member(NamedTuple):
    hparams: dict
    name: jax.Array


def members(points) -> Member:
    points = jnp.asarray(points)
    return Member(SPACE.from_unit(points), jnp.arange(len(points)))


def rule(**options):
    return hj.exchange.pb2(SPACE, 0.25, **{"window": WINDOW, **options})


def unit(group) -> np.ndarray:
    return np.asarray(SPACE.to_unit(group.hparams))


APPLY = jit(rule().apply)
APPLY_THIRD = jit(rule(every=3).apply)


def test_rows_are_the_fall_of_the_score_per_step_and_only_of_whole_intervals(rng):
    points, every = rng.uniform(0.1, 0.9, (8, 2)), 3
    group = members(points)
    state = rule().init(group)
    table = rng.normal(size=(6, 8))
    before, parents = group, {}
    for step in range(6):
        before = group
        group, state, events = APPLY_THIRD(
            jax.random.key(step), state, group, jnp.asarray(table[step])
        )
        parents[step] = np.asarray(events.parents)
        assert (parents[step] != np.arange(8)).sum() == (2 if step in (2, 5) else 0)
        if step == 2:  # the first interval has no start
            assert np.isnan(state.change).all()
    begins = table[2][parents[2]]
    change = (begins - table[5]) / every
    np.testing.assert_allclose(state.change[:8], change, rtol=1e-12)
    np.testing.assert_array_equal(state.before[:8], begins)
    np.testing.assert_array_equal(state.time[:8], np.full(8, 6.0))
    np.testing.assert_allclose(state.point[:8], unit(before), atol=1e-12)
    assert np.isnan(state.change[8:]).all() and state.rows == 8
    # the worst two took the weights of the best two
    order = np.argsort(table[2])
    assert set(np.flatnonzero(parents[2] != np.arange(8))) == set(order[6:])
    assert set(parents[2][order[6:]]) <= set(order[:2])


def test_the_ring_forgets_the_oldest(rng):
    group = members(rng.uniform(0.1, 0.9, (8, 2)))
    state = rule().init(group)
    for step in range(6):  # 5 intervals of 8 rows, a window of 24
        score = jnp.asarray(-step + 0.1 * rng.normal(size=8))
        group, state, _ = APPLY(jax.random.key(step), state, group, score)
    times, counts = np.unique(np.asarray(state.time), return_counts=True)
    np.testing.assert_array_equal(times, [4.0, 5.0, 6.0])
    np.testing.assert_array_equal(counts, [8, 8, 8])
    assert state.rows == 40 and state.calls == 6


def observed(rng, gain, size=8, rounds=4):
    """A state after some rounds in which hyperparameters were spread and `gain` was seen."""
    count = size * (rounds - 1)
    points = jnp.asarray(rng.uniform(0.0, 1.0, (count, 2)))
    group = members(points[-size:])
    state = rule().init(group)
    pad = lambda x: jnp.concatenate([x, jnp.full((WINDOW - count, *x.shape[1:]), jnp.nan)])
    return group, state._replace(
        time=pad(jnp.repeat(jnp.arange(1.0, rounds), size)),
        before=pad(jnp.repeat(-jnp.arange(1.0, rounds), size)),
        point=jnp.nan_to_num(pad(points)),
        change=pad(gain(points)),
        rows=jnp.asarray(count, jnp.int32),
        since=jnp.full(size, rounds - 1.0),
        start=jnp.full(size, 1.0 - rounds),
        calls=jnp.asarray(rounds - 1, jnp.int32),
    )


PEAK = jnp.asarray([0.7, 0.4])


def hill(points):
    return jnp.exp(-jnp.sum((points - PEAK[None]) ** 2, -1) / 0.1)


def after_one_call(group, state, apply=APPLY, key=0):
    """Points [P, 2] and events after a call in which members improve as the hill says."""
    score = state.start - hill(jnp.asarray(unit(group)))
    group, state, events = apply(jax.random.key(key), state, group, score)
    return unit(group), state, jax.tree.map(np.asarray, events)


def test_a_copy_goes_to_the_top_of_the_hill_and_the_second_keeps_off(rng):
    group, state = observed(rng, hill)
    points, _, events = after_one_call(group, state)
    chosen = points[events.parents != np.arange(8)]
    assert chosen.shape == (2, 2)
    # 24 rows know the hill, of width 0.2, to a fraction of it
    assert np.linalg.norm(chosen - np.asarray(PEAK), axis=1).min() < 0.15
    kept = events.parents == np.arange(8)
    np.testing.assert_array_equal(points[kept], unit(group)[kept])


def test_copies_of_one_round_spread(rng):
    # Where nothing changed, the choice is the place of the greatest variance; the second copy must
    # not take that of the first.
    group, state = observed(rng, lambda points: jnp.zeros(len(points)))
    for key in range(3):
        after, _, events = APPLY(jax.random.key(key), state, group, state.start)
        a, b = unit(after)[np.asarray(events.parents) != np.arange(8)]
        assert np.linalg.norm(a - b) > 0.05


def test_the_fit_beats_its_starts_and_stays_in_bounds(rng):
    group, state = observed(rng, hill)
    _, after, _ = after_one_call(group, state)  # with eight rows more
    seen = jnp.isfinite(state.change)
    rows = _pb2.Rows((state.time - 1) / 2, jnp.column_stack([(state.before + 3) / 2, state.point]))
    targets = _pb2._standardize(state.change, seen)

    def likelihood(kernel):
        k = np.asarray(kernel)
        distance = np.abs(rows.time[:, None] - rows.time[None])
        near = ((rows.x[:, None] - rows.x[None]) ** 2).sum(-1) / np.exp(k[1])
        gram = np.exp(k[0]) * np.exp(-near) * (1 - k[2]) ** (distance / 2)
        factor = np.linalg.cholesky(gram + np.exp(k[3]) * np.eye(len(targets)))
        half = np.linalg.solve(factor, targets)
        return -half @ half / 2 - np.log(np.diag(factor)).sum()

    start = jnp.asarray(_pb2.START)
    fitted = jit(_pb2._fit_kernel)(rows, targets, seen, start)
    assert likelihood(fitted) > likelihood(_pb2.START) + 1
    for kernel in (fitted, after.kernel):
        assert np.all((np.asarray(kernel) >= _pb2.LOW) & (np.asarray(kernel) <= _pb2.HIGH))


def test_diverged_members_are_reseeded_at_once_and_leave_no_row(rng):
    group = members(rng.uniform(0.1, 0.9, (8, 2)))
    state = rule().init(group)
    score = rng.normal(size=8)
    score[[1, 4]] = np.nan, np.inf
    # the first of three steps: no exchange is due
    after, state, events = APPLY_THIRD(jax.random.key(0), state, group, jnp.asarray(score))
    bad = np.asarray([1, 4])
    np.testing.assert_array_equal(np.flatnonzero(events.diverged), bad)
    np.testing.assert_array_equal(np.flatnonzero(events.parents != jnp.arange(8)), bad)
    assert np.all(np.isfinite(score[events.parents]))
    assert np.isfinite(unit(after)).all() and np.isnan(state.change).all()
    # their new interval starts from the score of the parent
    np.testing.assert_array_equal(state.start[bad], score[events.parents[bad]])
    # and one that ends in divergence is no row, where the others' are
    group, state = observed(rng, hill)
    score = np.asarray(state.start) - 0.5
    score[3] = -np.inf
    _, state, events = APPLY(jax.random.key(0), state, group, jnp.asarray(score))
    assert state.rows == 24 + 7 and 3 not in events.parents
    assert np.isfinite(state.change).all()


def test_all_diverged_or_alone_nobody_moves(rng):
    for size, score in ((8, np.nan), (1, 0.5), (1, np.nan)):
        group = members(rng.uniform(0.1, 0.9, (size, 2)))
        after, _, events = APPLY(
            jax.random.key(0), rule().init(group), group, jnp.full(size, score)
        )
        np.testing.assert_array_equal(events.parents, np.arange(size))
        np.testing.assert_array_equal(unit(after), unit(group))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_stay_in_lower_precision_and_in_a_scan(rng, dtype):
    group = members(rng.uniform(0.1, 0.9, (4, 2)))
    group = jax.tree.map(lambda x: x.astype(dtype), group.hparams)
    group = Member(group, jnp.arange(4))
    exchange = rule(window=6, spread="deviation")
    state = exchange.init(group)
    shapes = jax.eval_shape(exchange.apply, jax.random.key(0), state, group, jnp.ones(4))
    kind = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    assert kind(shapes[1]) == kind(state)
    assert kind(shapes[0]) == kind(group)
    assert state.change.dtype == jnp.float32


def test_inside_shard_map_members_may_be_the_same_on_all_devices():
    # Of types alone: the scores differ between the devices, at first nothing else does.
    exchange = rule(every=2)

    def twice(score):
        group = members(jnp.full((8, 2), 0.5))
        state = exchange.init(group)
        for i in range(2):
            group, state, _ = exchange.apply(jax.random.key(i), state, group, score[0])
        return group.name[None]

    spec, mesh = PartitionSpec("x"), Mesh(np.asarray(jax.devices()[:2]), ("x",))
    spread = jax.shard_map(twice, mesh=mesh, in_specs=spec, out_specs=spec)
    assert jax.eval_shape(spread, jnp.zeros((2, 8))).shape == (2, 8)


def test_inside_shard_map_and_under_vmap(rng):
    # Two populations at once, one of them with a diverged member.
    groups, states = zip(*[observed(rng, hill) for _ in range(2)], strict=True)
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    group, state = stack(*groups), stack(*states)
    score = (state.start - 0.5 * jnp.asarray(rng.uniform(size=(2, 8)))).at[1, 2].set(jnp.nan)
    keys = jax.random.split(jax.random.key(0), 2)
    spec = PartitionSpec("x")
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("x",))
    many = jax.vmap(rule().apply)
    spread = jit(jax.shard_map(many, mesh=mesh, in_specs=spec, out_specs=spec))
    found = spread(keys, state, group, score)
    for i in range(2):
        at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        one = APPLY(keys[i], at(state), at(group), score[i])
        for a, b in zip(jax.tree.leaves(at(found)), jax.tree.leaves(one), strict=True):
            # ascent amplifies rounding, a little
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.6}, r"`fraction` must be in \(0, 0.5\]; got 0.6"),
        ({"every": 0}, "`every` must be an integer >= 1; got 0"),
        ({"window": 2.0}, "`window` must be an integer >= 1; got 2.0"),
        ({"spread": "std"}, "`spread` must be one of 'variance', 'deviation'; got 'std'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"pb2: {message}"):
        hj.exchange.pb2(SPACE, **options)
