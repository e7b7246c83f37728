"""Exchange rules on members that only have a name: who copies whom, and who never does."""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import PartitionSpec
from problems import jit

import hyperjax as hj


class Member(NamedTuple):
    hparams: dict
    name: jax.Array  # the slot it was born in
    weights: jax.Array


def members(size: int) -> Member:
    names = jnp.arange(size)
    return Member({"lr": 1.0 + names}, names, 0.1 * names[:, None] * jnp.ones((size, 3)))


def explore(key, hparams):
    """Far away from every hparams that a member has here."""
    return jax.tree.map(lambda h: h + 1000 + jax.random.uniform(key), hparams)


def scores(size: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).permutation(size) / 10)


RULES = {
    "truncation": lambda **options: hj.exchange.truncation(0.25, explore, **options),
    "tournament": lambda **options: hj.exchange.tournament(explore, **options),
    "isolation": lambda: hj.exchange.isolation(),
}


def once(rule, score, key=0, before=None):
    """(members, state, events) as numpy, after one call."""
    group = members(len(score)) if before is None else before
    apply = jit(rule.apply)
    return jax.tree.map(
        np.asarray, apply(jax.random.key(key), rule.init(group), group, jnp.asarray(score))
    )


def repeatedly(rule, table, before=None):
    """(members, state, events) of one call per row of scores, each with a key of its own."""
    group = members(table.shape[1])
    groups = jax.tree.map(lambda x: jnp.stack([x] * len(table)), group)
    groups = groups if before is None else groups._replace(weights=before)
    keys = jax.random.split(jax.random.key(0), len(table))
    call = lambda key, group, score: rule.apply(key, rule.init(group), group, score)
    return groups, *jax.tree.map(np.asarray, jit(jax.vmap(call))(keys, groups, table))


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def check_truthful(before, after, events):
    """Rows are those of `parents`; hparams too where nothing was copied, else explored."""
    own = np.arange(len(events.parents))
    assert events.parents.dtype == np.int32
    np.testing.assert_array_equal(after.name, np.asarray(before.name)[events.parents])
    np.testing.assert_array_equal(after.weights, np.asarray(before.weights)[events.parents])
    copied = events.parents != own
    lr, old = after.hparams["lr"], np.asarray(before.hparams["lr"])
    np.testing.assert_array_equal(lr[~copied], old[~copied])
    moved = lr[copied] - old[events.parents][copied]
    assert np.all((moved >= 1000) & (moved <= 1001))
    assert len(np.unique(moved)) == copied.sum()  # each with a key of its own


# --------------------------------------------------------------------------- truncation

# In binary 0.29 * 100 is a little less than 29; the count is that of the decimal fraction.
SHARES = [(8, 0.25), (8, 0.5), (7, 0.3), (10, 0.1), (100, 0.29), (100, 0.07), (5, 0.5), (3, 0.25)]


@pytest.mark.parametrize(("size", "fraction"), SHARES)
def test_truncation_replaces_the_worst_by_the_best(size, fraction):
    score = scores(size)
    rule = hj.exchange.truncation(fraction, explore)
    after, state, events = once(rule, score)
    check_truthful(members(size), after, events)
    count = int(Fraction(str(fraction)) * size)
    order = np.argsort(score)
    best, worst = set(order[:count]), set(order[size - count :])
    copied = set(np.flatnonzero(events.parents != np.arange(size)))
    assert copied == worst
    assert {int(p) for p in events.parents[sorted(copied)]} <= best
    assert state.calls == 1
    assert not events.diverged.any()


def test_truncation_draws_all_of_the_best():
    # 2 copies in 200 draws from 2: 200 +- 10 each, and five deviations are allowed.
    score = scores(8)
    order = np.argsort(score)
    *_, events = repeatedly(RULES["truncation"](), jnp.stack([score] * 200))
    drawn = np.bincount(events.parents[:, order[6:]].ravel(), minlength=8)
    assert np.all(np.abs(drawn[order[:2]] - 200) < 50)
    assert drawn.sum() == drawn[order[:2]].sum()


def test_ties_are_broken_without_losing_anybody():
    after, _, events = once(RULES["truncation"](), jnp.ones(8))
    check_truthful(members(8), after, events)
    assert np.sum(events.parents != np.arange(8)) == 2


# --------------------------------------------------------------------------- tournament


def test_tournament_copies_only_the_better():
    table = np.stack([scores(9, seed) for seed in range(20)])
    before, after, _, events = repeatedly(RULES["tournament"](), table)
    for i, score in enumerate(table):
        check_truthful(row(before, i), row(after, i), row(events, i))
        parents = events.parents[i]
        copied = parents != np.arange(9)
        assert np.all(score[parents[copied]] < score[copied])
        assert not copied[np.argmin(score)]
        assert copied[np.argmax(score)]  # whoever it met was better


def test_tournament_meets_everybody():
    # The worst of five meets the four others uniformly: 100 +- 9 of 400 each, five deviations.
    *_, events = repeatedly(RULES["tournament"](), jnp.stack([jnp.arange(5.0)] * 400))
    assert np.all(np.abs(np.bincount(events.parents[:, 4], minlength=5)[:4] - 100) < 45)


# ------------------------------------------------------------------------------ every


@pytest.mark.parametrize("name", ["truncation", "tournament"])
def test_exchange_waits_for_its_turn(name):
    rule = RULES[name](every=3)
    group, state = members(8), rule.init(members(8))
    apply = jit(rule.apply)
    for step in range(1, 10):
        after, state, events = apply(jax.random.key(step), state, group, scores(8, step))
        copied = np.any(events.parents != np.arange(8))
        assert copied == (step % 3 == 0)
        check_truthful(group, jax.tree.map(np.asarray, after), jax.tree.map(np.asarray, events))
        group = after
    assert state.calls == 9


@pytest.mark.parametrize("name", ["truncation", "tournament"])
def test_nothing_is_moved_between_exchanges(name):
    # `explore` is called with the copies, so that it tells when these are made.
    calls = []

    def told(key, hparams):
        jax.debug.callback(lambda: calls.append(1))
        return explore(key, hparams)

    make = {"truncation": functools.partial(hj.exchange.truncation, 0.25)}
    rule = make.get(name, hj.exchange.tournament)(told, every=3)
    # Two populations in a vmap, of which one has a diverged member at last.
    two = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    group, apply = two(members(8)), jit(jax.vmap(rule.apply))
    state, seen = two(rule.init(members(8))), []
    for step in range(4):
        score = jnp.stack([scores(8), scores(8, 1).at[1].set(np.nan if step == 3 else 0.0)])
        keys = jax.random.split(jax.random.key(step), 2)
        before, (group, state, events) = group, apply(keys, state, group, score)
        for i in range(2):
            check_truthful(row(before, i), *jax.tree.map(np.asarray, row((group, events), i)))
        jax.effects_barrier()
        seen.append(bool(calls))
        calls.clear()
    assert seen == [False, False, True, True]  # the last time for a diverged member


@pytest.mark.parametrize("name", ["truncation", "tournament"])
def test_rules_in_a_shard_map(name):
    # A population on every device; who copies whom varies over them, weights before that do not.
    rule = RULES[name](every=2)
    keys = jax.random.split(jax.random.key(0), 8)
    table = jnp.stack([scores(8, s) for s in range(8)])

    def twice(key, score):
        group, state = members(8), rule.init(members(8))
        for i in range(2):
            group, state, _ = rule.apply(jax.random.fold_in(key[0], i), state, group, score[0])
        return jax.tree.map(lambda x: x[None], group)

    lane = PartitionSpec("lane")
    spread = jax.shard_map(twice, mesh=problems.mesh("lane"), in_specs=lane, out_specs=lane)
    found = jit(spread)(keys, table)
    one = jit(lambda key, score: twice(key[None], score[None]))
    for i in (0, 5):
        for a, b in zip(*map(jax.tree.leaves, (found, one(keys[i], table[i]))), strict=True):
            np.testing.assert_array_equal(a[i], b[0])


def test_isolation_touches_nobody():
    after, state, events = once(RULES["isolation"](), np.asarray([3.0, np.nan, 1.0, -np.inf]))
    check_truthful(members(4), after, events)
    np.testing.assert_array_equal(events.parents, np.arange(4))
    np.testing.assert_array_equal(events.diverged, [False, True, False, True])
    assert state.calls == 1


# -------------------------------------------------------------------------- divergence

BAD = (np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("name", ["truncation", "tournament"])
@pytest.mark.parametrize("every", [1, 1000])
def test_diverged_members_are_replaced_at_once_and_never_copied(name, every):
    rng = np.random.default_rng(0)
    table = np.stack([scores(8, seed) for seed in range(40)])
    for score in table:  # one to seven of the eight
        bad = rng.permutation(8)[: rng.integers(1, 8)]
        score[bad] = rng.choice(BAD, size=len(bad))
    healthy = np.isfinite(table)
    weights = np.where(healthy, 1.0, np.nan)[:, :, None]
    before, after, _, events = repeatedly(RULES[name](every=every), table, weights)
    np.testing.assert_array_equal(events.diverged, ~healthy)
    own = np.broadcast_to(np.arange(8), table.shape)
    assert np.all(events.parents[~healthy] != own[~healthy])
    assert np.all(np.take_along_axis(healthy, events.parents, axis=1))
    assert np.all(np.isfinite(after.weights))
    if every > 1:  # nobody else moves
        np.testing.assert_array_equal(events.parents[healthy], own[healthy])
    for i in range(len(table)):
        check_truthful(row(before, i), row(after, i), row(events, i))


@pytest.mark.parametrize("name", ["truncation", "tournament"])
def test_reseeding_draws_from_all_that_are_left(name):
    # One of eight diverged, seven others: 57 +- 7 of 400 each, five deviations.
    score = np.array(scores(8))
    score[3] = np.nan
    *_, events = repeatedly(RULES[name](every=1000), np.stack([score] * 400))
    counts = np.bincount(events.parents[:, 3], minlength=8)
    assert counts[3] == 0
    assert np.all(np.abs(np.delete(counts, 3) - 400 / 7) < 35)


@pytest.mark.parametrize("bad", BAD)
def test_divergence_changes_nothing_for_the_winners(bad):
    # The same call with the diverged member merely the worst: those that keep their place then
    # keep it now, bit by bit.
    score = np.array(scores(8))
    worst = np.argmax(score)
    plain, _, events = once(RULES["truncation"](), score)
    score[worst] = bad
    after, _, again = once(RULES["truncation"](), score)
    kept = events.parents == np.arange(8)
    np.testing.assert_array_equal(again.parents[kept], np.arange(8)[kept])
    np.testing.assert_array_equal(after.weights[kept], plain.weights[kept])
    np.testing.assert_array_equal(after.hparams["lr"][kept], plain.hparams["lr"][kept])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", BAD)
def test_when_all_have_diverged_nobody_moves(name, bad):
    after, _, events = once(RULES[name](), np.full(6, bad))
    check_truthful(members(6), after, events)
    np.testing.assert_array_equal(events.parents, np.arange(6))
    assert events.diverged.all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("score", [0.5, np.nan])
def test_a_population_of_one_stays(name, score):
    after, _, events = once(RULES[name](), np.asarray([score]))
    check_truthful(members(1), after, events)
    assert events.parents == [0]


@pytest.mark.parametrize("name", RULES)
def test_rules_vmap(name):
    rule = RULES[name]()
    keys = jax.random.split(jax.random.key(0), 5)
    table = np.stack([scores(8, s) for s in range(5)])
    table[2, 4] = np.nan
    groups = jax.tree.map(lambda x: jnp.stack([x] * 5), members(8))
    many = jit(jax.vmap(rule.apply))(keys, jax.vmap(rule.init)(groups), groups, table)
    for i, key in enumerate(keys):
        one = jit(rule.apply)(key, rule.init(members(8)), members(8), jnp.asarray(table[i]))
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize("name", RULES)
def test_types_stay(name):
    rule = RULES[name]()
    group = members(8)
    half = group._replace(hparams={"lr": group.hparams["lr"].astype(jnp.float32)})
    state = rule.init(half)
    after, again, _ = jax.eval_shape(rule.apply, jax.random.key(0), state, half, scores(8))
    kind = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    assert kind(again) == kind(state)
    # `explore` adds float64 noise here, and float32 hparams stay what they were.
    assert [k[:2] for k in kind(after)] == [k[:2] for k in kind(half)]


def test_only_copies_explore():
    # An exploration that cannot be survived is survived by everybody who was not copied.
    poison = lambda key, h: jax.tree.map(lambda x: x * jnp.nan, h)
    for rule in (hj.exchange.truncation(0.25, poison), hj.exchange.tournament(poison)):
        after, _, events = once(rule, scores(8))
        copied = events.parents != np.arange(8)
        np.testing.assert_array_equal(np.isnan(after.hparams["lr"]), copied)
        assert 0 < copied.sum() < 8


def test_perturb_adds_independent_normal_noise_of_its_scale():
    hparams = {"a": jnp.arange(3.0), "b": jnp.float32(7.0)}
    keys = jax.random.split(jax.random.key(0), 4000)
    near = jit(jax.vmap(hj.exchange.perturb(0.5), (0, None)))(keys, hparams)
    assert near["b"].dtype == jnp.float32
    noise = jnp.column_stack([near["a"] - hparams["a"][None], near["b"] - hparams["b"]]) / 0.5
    # five standard errors of a mean, and of a variance or a correlation
    assert jnp.all(jnp.abs(noise.mean(0)) < 5 / 4000**0.5)
    assert jnp.all(jnp.abs(noise.T @ noise / 4000 - jnp.eye(4)) < 5 * (2 / 4000) ** 0.5)


def test_perturb_refuses_a_negative_scale():
    with pytest.raises(ValueError, match=r"`scale` must be >= 0; got -1"):
        hj.exchange.perturb(-1.0)


def test_lineage_is_the_history_that_a_state_carries_forward():
    rng = np.random.default_rng(0)
    steps, size = 9, 6
    parents = rng.integers(0, size, (steps, size))
    # Forward: each state remembers the slots in which it trained; copies copy the memory.
    memory: list[list[int]] = [[] for _ in range(size)]
    for t in range(steps):
        trained = [[*memory[m], m] for m in range(size)]
        memory = [trained[parents[t, m]] for m in range(size)]
    walk = jit(hj.exchange.lineage)
    for m in range(size):
        np.testing.assert_array_equal(walk(parents, m), memory[m])
    np.testing.assert_array_equal(walk(parents, jnp.arange(size)).T, memory)


def test_lineage_of_several_populations_at_once_is_refused():
    with pytest.raises(ValueError, match=r"`parents` \[outer steps, members\]; got .*4, 2, 3"):
        hj.exchange.lineage(jnp.zeros((4, 2, 3), int), 0)
