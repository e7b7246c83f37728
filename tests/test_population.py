"""Populations: members step as if they were alone, in chunks and on devices, and then exchange."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from problems import error, fused_jit, jit

import hyperjax as hj

SIZE = 16  # two on each of eight devices


def member_tuner(p: problems.Problem) -> hj.Tuner:
    estimator = hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)
    return hj.tune(estimator, optax.adam(0.01))


def explore(key, hparams):
    return jax.tree.map(lambda h: h * jax.random.uniform(key, minval=0.8, maxval=1.2), hparams)


EXCHANGES = {
    "isolation": hj.exchange.isolation(),
    "truncation": hj.exchange.truncation(0.25, explore, every=2),
    "tournament": hj.exchange.tournament(explore),
}


def starts(p: problems.Problem, size: int = SIZE):
    """Params and hparams of `size` different members."""
    rng = np.random.default_rng(0)
    vary = lambda x: jnp.stack([x * rng.uniform(0.5, 1.5) for _ in range(size)])
    return jax.tree.map(vary, p.params), jax.tree.map(vary, p.hparams)


@functools.cache
def problem() -> problems.Problem:
    return problems.net(steps=4)


def run(tuner, state, steps: int):
    splits = problems.repeat(problem().split, steps)
    return fused_jit(lambda s, x: hj.run(tuner, s, x))(state, splits)


@functools.cache
def outcome(exchange: str, chunk=SIZE, sharded: bool = False, steps: int = 5):
    """State and metrics after some steps, as numpy."""
    p = problem()
    mesh = problems.mesh("member") if sharded else None
    tuner = hj.population(member_tuner(p), EXCHANGES[exchange], chunk=chunk, mesh=mesh)
    state, metrics = run(tuner, tuner.init(jax.random.key(0), *starts(p)), steps)
    members = jax.tree.map(np.asarray, state.members)
    return state, members, jax.tree.map(np.asarray, metrics)


# --------------------------------------------------------- members as if they were alone


def test_isolated_members_are_single_runs():
    p = problem()
    _, members, metrics = outcome("isolation")
    tuner = member_tuner(p)
    params, hparams = starts(p)
    step = jit(lambda s, x: hj.run(tuner, s, x))
    for i in (0, 5, 15):
        alone = jax.tree.map(lambda x, i=i: x[i], (params, hparams))
        state, single = step(tuner.init(*alone), problems.repeat(p.split, 5))
        # vmapped and single runs sum in another order: last bits, carried through five steps.
        assert error(jax.tree.map(lambda x, i=i: x[i], members), state) < 1e-12
        assert error(metrics.members.value[:, i], single.value) < 1e-12


@pytest.mark.parametrize(
    ("exchange", "chunk"),
    [("isolation", 1), ("truncation", 1), ("truncation", 3), ("tournament", "auto")],
)
def test_chunks_do_not_matter(exchange, chunk):
    # 3 does not divide 16: the last chunk is a rest.
    _, members, metrics = outcome(exchange)
    _, again, same = outcome(exchange, chunk)
    np.testing.assert_array_equal(same.events.parents, metrics.events.parents)
    assert error(again, members) < 1e-12  # last bits, as above
    assert error(same.members.value, metrics.members.value) < 1e-12


@pytest.mark.parametrize("exchange", ["truncation", "tournament"])
def test_devices_do_not_matter(exchange):
    _, members, metrics = outcome(exchange)
    state, again, same = outcome(exchange, SIZE, True)
    np.testing.assert_array_equal(same.events.parents, metrics.events.parents)
    assert error(again, members) < 1e-12
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state.members)} == {8}


def test_chunks_within_devices():
    _, members, _ = outcome("truncation")
    _, again, _ = outcome("truncation", 1, True)
    assert error(again, members) < 1e-12


def given(value, grad=lambda h: 0.0 * h) -> hj.Tuner:
    """Members whose score and hypergradient are these functions of their only hyperparameter."""
    estimate = lambda h, carry, split: (hj.Estimate(value(h), grad(h), ()), carry)
    return hj.tune(hj.Estimator(lambda params, h: params, estimate), optax.sgd(0.1))


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_as_many_members_at_once_as_asked_for(chunk):
    # A callback that is handed the batch sees how many there are.
    seen = []

    def look(h):
        seen.append(h.size)
        return h

    value = lambda h: jax.pure_callback(look, h, h, vmap_method="expand_dims")
    tuner = hj.population(given(value), hj.exchange.isolation(), chunk=chunk)
    state = tuner.init(jax.random.key(0), jnp.zeros(8), jnp.arange(8.0))
    _, metrics = jax.jit(tuner.step)(state, None)
    np.testing.assert_array_equal(metrics.members.value, np.arange(8))
    assert sorted(seen) == {1: [1] * 8, 3: [2, 3, 3], 8: [8], 100: [8]}[chunk]


def test_every_step_draws_anew():
    # Scores and hparams never change, so that only the key tells one step from the next.
    stay = hj.exchange.tournament(lambda key, h: h)
    tuner = hj.population(given(lambda h: h), stay)
    state = tuner.init(jax.random.key(0), jnp.zeros(8), jnp.arange(8.0))
    step = jit(tuner.step)
    after, first = step(state, None)
    _, second = step(state._replace(key=after.key), None)
    assert np.any(first.events.parents != second.events.parents)


def test_sharding_by_jit_does_not_matter():
    # Without `mesh`, members may lie on devices all the same; the compiler follows them.
    p = problem()
    _, members, metrics = outcome("truncation")
    tuner = hj.population(member_tuner(p), EXCHANGES["truncation"], chunk=SIZE)
    state = tuner.init(jax.random.key(0), *starts(p))
    place = NamedSharding(problems.mesh("member"), PartitionSpec("member"))
    state = state._replace(members=jax.device_put(state.members, place))
    state, same = run(tuner, state, 5)
    np.testing.assert_array_equal(same.events.parents, metrics.events.parents)
    assert error(jax.tree.map(np.asarray, state.members), members) < 1e-12


def test_seeds_vmap():
    p = problem()
    tuner = hj.population(member_tuner(p), EXCHANGES["tournament"], chunk=4)
    keys = jax.random.split(jax.random.key(1), 5)
    params, hparams = starts(p, 4)
    init = lambda key: tuner.init(key, params, hparams)
    state = jax.vmap(init)(keys)
    splits = problems.repeat(p.split, 3)
    many, metrics = jit(jax.vmap(lambda s: hj.run(tuner, s, splits)))(state)
    one = jit(lambda key: hj.run(tuner, init(key), splits))
    parents = []
    for i, key in enumerate(keys):
        single, expected = one(key)
        np.testing.assert_array_equal(metrics.events.parents[i], expected.events.parents)
        row = jax.tree.map(lambda x, i=i: x[i], many.members)
        assert error(row, single.members) < 1e-12
        parents.append(np.asarray(expected.events.parents))
    assert len({x.tobytes() for x in parents}) == 5  # five seeds, five histories


def test_the_score_of_a_population_is_its_best_members():
    _, _, metrics = outcome("truncation")
    assert error(metrics.value, metrics.members.value.min(axis=1)) == 0
    assert metrics.finite.all()


def test_exchange_hands_on_whole_states():
    # After the last step's exchange a copy has its parent's training, optimizer and metrics.
    state, members, metrics = outcome("truncation", steps=4)
    parents = metrics.events.parents[-1]
    copied = np.flatnonzero(parents != np.arange(SIZE))
    assert len(copied) == 4  # a quarter, as 4 is a multiple of `every`
    assert state.exchange.calls == 4
    for i in copied:
        take = lambda j: jax.tree.map(lambda x: x[j], (members.carry, members.opt_state))
        assert error(take(i), take(parents[i])) == 0
        factor = members.hparams["lr"][i] / members.hparams["lr"][parents[i]]
        assert 0.8 <= factor <= 1.2 and factor != 1


# ------------------------------------------------------------------------------- types


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("chunk", [1, 3, SIZE])
def test_types_of_a_population_never_change(exchange, chunk):
    p = problem()
    tuner = hj.population(member_tuner(p), EXCHANGES[exchange], chunk=chunk)
    # Weakly typed hparams and float32 params.
    params = jax.tree.map(lambda x: jnp.stack([x.astype(jnp.float32)] * SIZE), p.params)
    hparams = {name: jnp.full((SIZE,), 0.1) for name in p.hparams}
    state = jax.eval_shape(tuner.init, jax.random.key(0), params, hparams)
    after, _ = jax.eval_shape(tuner.step, state, p.split)
    kind = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    assert kind(after) == kind(state)
    assert not any(weak for *_, weak in kind(state))


def test_losses_are_traced_once_and_then_never():
    calls = [0]
    p = problems.net(steps=4)

    def loss(params, hparams, batch):
        calls[0] += 1
        return p.loss(params, hparams, batch)

    inner = hj.inner(loss, lambda h: optax.sgd(h["lr"], momentum=h["momentum"]))
    tuner = hj.population(member_tuner(p._replace(inner=inner)), EXCHANGES["truncation"])
    go = jax.jit(lambda s, x: hj.run(tuner, s, x))
    counts = []
    for seed in range(2):
        state = tuner.init(jax.random.key(seed), *starts(p, 4))
        before = calls[0]
        state, _ = go(state, problems.repeat(p.split, 3))
        go(state, problems.repeat(p.split, 3))
        counts.append(calls[0] - before)
    assert counts[0] > 0 and counts[1] == 0


# -------------------------------------------------------------------------- divergence


def diverging(exchange, bad: list[int], steps: int, size: int = 8, chunk=1):
    """A run in which some members have a learning rate that takes them to infinity."""
    p = problem()
    params, hparams = starts(p, size)
    hparams["lr"] = hparams["lr"].at[jnp.asarray(bad, int)].set(1e8)
    tuner = hj.population(member_tuner(p), exchange, chunk=chunk)
    state, metrics = run(tuner, tuner.init(jax.random.key(0), params, hparams), steps)
    return jax.tree.map(np.asarray, state.members), jax.tree.map(np.asarray, metrics)


@pytest.mark.parametrize("chunk", [1, 8])
def test_isolated_members_do_not_feel_a_diverged_one(chunk):
    healthy, _ = diverging(EXCHANGES["isolation"], [], 8, chunk=chunk)
    members, metrics = diverging(EXCHANGES["isolation"], [2, 5], 8, chunk=chunk)
    others = [0, 1, 3, 4, 6, 7]
    assert not np.isfinite(metrics.members.value[-1, [2, 5]]).any()
    for a, b in zip(*map(jax.tree.leaves, (members, healthy)), strict=True):
        np.testing.assert_array_equal(a[others], b[others])  # bit by bit
    np.testing.assert_array_equal(metrics.events.diverged[-1], np.isin(range(8), [2, 5]))
    assert not metrics.members.finite[-1, [2, 5]].any()


@pytest.mark.parametrize("name", ["truncation", "tournament"])
def test_diverged_members_are_reseeded_in_a_run(name):
    # They exchange at no other time: `every` is longer than the run.
    rule = {"truncation": functools.partial(hj.exchange.truncation, 0.25)}
    rule = rule.get(name, hj.exchange.tournament)(explore, every=1000)
    healthy, _ = diverging(rule, [], 8)  # by the same program, as another may differ in last bits
    members, metrics = diverging(rule, [2, 5], 8)
    diverged = metrics.events.diverged
    assert diverged[:, [2, 5]].any(axis=0).all()  # sooner or later, each at a step of its own
    assert not diverged[-1].any()
    others = [0, 1, 3, 4, 6, 7]
    for step, parents in enumerate(metrics.events.parents):
        np.testing.assert_array_equal(parents != np.arange(8), diverged[step])
        assert not diverged[step][parents].any()
    for a, b in zip(*map(jax.tree.leaves, (members, healthy)), strict=True):
        np.testing.assert_array_equal(a[others], b[others])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(members))


def test_a_hypergradient_that_is_not_finite_is_a_divergence():
    # The score of member 3 is the best of all, yet nobody may copy it.
    slope = lambda h: jnp.where(h == 3.0, jnp.nan, 0.0)
    rule = hj.exchange.truncation(0.25, explore)
    tuner = hj.population(given(lambda h: (h - 3.0) ** 2, slope), rule)
    state = tuner.init(jax.random.key(0), jnp.zeros(8), jnp.arange(8.0))
    _, metrics = jit(tuner.step)(state, None)
    np.testing.assert_array_equal(metrics.events.diverged, np.arange(8) == 3)
    assert not np.isin(metrics.events.parents, 3).any()
    assert metrics.value == 1.0  # of members 2 and 4


@pytest.mark.parametrize("name", EXCHANGES)
def test_all_may_diverge(name):
    members, metrics = diverging(EXCHANGES[name], list(range(8)), 8)
    assert metrics.events.diverged[-1].all()
    np.testing.assert_array_equal(metrics.events.parents[-1], np.arange(8))
    assert np.isfinite(jax.tree.leaves(members.hparams)).all()
    assert not metrics.finite[-1] and np.isnan(metrics.value[-1])


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_population_of_one_is_a_single_run(name):
    p = problem()
    params, hparams = starts(p, 1)
    tuner = hj.population(member_tuner(p), EXCHANGES[name])
    state, _ = run(tuner, tuner.init(jax.random.key(0), params, hparams), 5)
    alone = member_tuner(p)
    first = jax.tree.map(lambda x: x[0], (params, hparams))
    expected, _ = run(alone, alone.init(*first), 5)
    assert error(jax.tree.map(lambda x: x[0], state.members), expected) < 1e-12


def test_a_population_may_be_a_member():
    # Two islands of four: vmapped populations, whose score is that of their best.
    p = problem()
    islands = hj.population(member_tuner(p), EXCHANGES["truncation"], chunk=4)
    params, hparams = starts(p, 8)
    fold = lambda x: x.reshape(2, 4, *x.shape[1:])
    keys = jax.random.split(jax.random.key(0), 2)
    state = jax.vmap(islands.init)(keys, *jax.tree.map(fold, (params, hparams)))
    after, metrics = jit(jax.vmap(islands.step, (0, None)))(state, p.split)
    assert metrics.value.shape == (2,)
    assert error(metrics.value, metrics.members.value.min(axis=1)) == 0
    assert after.members.hparams["lr"].shape == (2, 4)
