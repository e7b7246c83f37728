"""Searches of other libraries behind ask and tell, and the advisor that may overrule one."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import error, jit

import hyperjax as hj

# Tests of the adapters need the libraries; what they share does not.


def by_hand(search, seed, scores):
    """Points asked in each round, told the rows of `scores` one after another."""
    state, rounds = search.init(jax.random.key(seed)), []
    for row in scores:
        points, state = search.ask(state)
        rounds.append(np.asarray(points))
        state = search.tell(state, points, np.asarray(row))
    return np.stack(rounds), state


# --------------------------------------------------------------------------- cmaes


def cma(seed, population=8):
    cmaes = pytest.importorskip("cmaes")
    mean = np.asarray([0.2, 0.5, 0.9])
    return cmaes.CMA(mean, 0.3, seed=seed, population_size=population)


def from_cma(batch, population=8):
    made = []

    def make(seed):
        made.append((seed, cma(seed, population)))
        return made[-1][1]

    return hj.search.from_cmaes(make, batch), made


def test_cmaes_through_the_adapter_is_cmaes():
    search, made = from_cma(4)
    table = np.random.default_rng(0).uniform(size=(6, 4))  # batches of half a population
    points, _ = by_hand(search, 1, table)
    own = cma(made[0][0])
    own.set_bounds(np.asarray([[0.0, 1.0]] * 3))
    for generation in range(3):
        asked = [own.ask() for _ in range(8)]
        assert np.array_equal(points[2 * generation : 2 * generation + 2].reshape(8, 3), asked)
        own.tell(list(zip(asked, table[2 * generation : 2 * generation + 2].ravel(), strict=True)))
    assert points.min() >= 0 and points.max() <= 1


def test_cmaes_is_made_anew_by_init_and_seeded_by_the_key():
    search, made = from_cma(2)
    table = np.zeros((2, 2))
    first, again, other = (by_hand(search, seed, table)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.any(first == other)
    assert len(made) == 3


def test_cmaes_collects_a_population_and_ranks_failures_last():
    search, _ = from_cma(8)
    scores = np.asarray([3.0, np.nan, 1.0, np.inf, 5.0, -np.inf, 2.0, 4.0])
    finite = np.where(np.isfinite(scores), scores, [9, 6, 9, 7, 9, 8, 9, 9])
    _, told = by_hand(search, 0, [scores])
    _, ranked = by_hand(search, 0, [finite])
    assert np.array_equal(told.optimizer.mean, ranked.optimizer.mean)
    assert np.all(np.isfinite(told.optimizer.ask()))
    _, left = by_hand(from_cma(3)[0], 0, np.ones((3, 3)))
    assert left.optimizer.generation == 1 and len(left.pending) == 1


def test_a_population_of_failures_teaches_cmaes_nothing():
    _, state = by_hand(from_cma(8)[0], 0, [np.full(8, np.nan)])
    assert state.optimizer.generation == 0 and state.pending == ()


def test_what_is_no_optimizer_is_refused():
    wrong = types.SimpleNamespace(ask=min, tell=min)
    search = hj.search.from_cmaes(lambda seed: wrong, 4)
    with pytest.raises(TypeError, match=r"`make\(seed\)` must have functions .*`set_bounds`"):
        search.init(jax.random.key(0))


# --------------------------------------------------------------------------- Optuna


def study(seed, **options):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    return optuna.create_study(sampler=sampler, **options)


def test_optuna_is_told_every_score_with_its_point():
    search = hj.search.from_optuna(study, ["a", "b"], batch=3)
    table = np.random.default_rng(0).normal(size=(4, 3))
    table[1, 1], table[2, 0] = np.nan, -np.inf
    points, state = by_hand(search, 0, table)
    trials = state.study.trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 12
    assert np.array_equal([[t.params["a"], t.params["b"]] for t in trials], points.reshape(12, 2))
    values = np.where(np.isfinite(table), table, np.inf).ravel()
    assert np.array_equal([t.value for t in trials], values)
    assert state.trials == ()


def test_optuna_takes_points_in_another_order_and_others_than_its_own():
    search = hj.search.from_optuna(study, ["a", "b"], batch=3)
    points, state = search.ask(search.init(jax.random.key(0)))
    override = np.asarray([0.25, 0.75])
    rounded = np.asarray(points, np.float32)  # as it comes back from an evaluation
    state = search.tell(state, np.stack([rounded[2], override, rounded[0]]), np.asarray([2, 9, 0]))
    trials = state.study.trials
    assert [t.value for t in trials] == [0, None, 2, 9]
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[3].params == {"a": 0.25, "b": 0.75}


def test_what_the_caller_enqueued_does_not_take_the_score_of_another_point():
    def make(seed):
        made = study(seed)
        for x in (0.1, 0.2):
            made.enqueue_trial({"a": x})
        return made

    search = hj.search.from_optuna(make, ["a"], batch=1)
    points, state = search.ask(search.init(jax.random.key(0)))
    state = search.tell(state, np.asarray([[0.9]]), np.asarray([5.0]))
    assert points[0, 0] == 0.1
    (told,) = (t for t in state.study.trials if t.state.name == "COMPLETE")
    assert (told.params, told.value) == ({"a": 0.9}, 5.0)
    assert search.ask(state)[0][0, 0] == 0.2  # still to come


def test_a_study_that_maximizes_is_refused():
    make = lambda seed: study(seed, direction="maximize")
    search = hj.search.from_optuna(make, ["a"], batch=2)
    with pytest.raises(ValueError, match=r"must minimize one value; got \['MAXIMIZE'\]"):
        search.init(jax.random.key(0))
    with pytest.raises(ValueError, match="`names` must be distinct"):
        hj.search.from_optuna(study, ["a", "a"], batch=2)


# --------------------------------------------------------------------------- evosax


def evosax(name):
    algorithms = pytest.importorskip("evosax.algorithms")
    return getattr(algorithms, name)(population_size=8, solution=jnp.zeros(3))


@pytest.fixture
def promotes():
    """evosax relies on what the tests forbid."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("promotes")
def test_evosax_through_the_adapter_is_evosax():
    algorithm = evosax("SNES")
    search, params = hj.search.from_evosax(algorithm), algorithm.default_params
    state = search.init(jax.random.key(0))
    own = algorithm.init(jax.random.key(9), jnp.zeros(3), params)  # it draws nothing
    score = lambda x: jnp.sum((x - 0.3) ** 2, -1)
    for _ in range(3):
        key, now = jax.random.split(state.key)
        free, own = algorithm.ask(now, own, params)
        points, state = search.ask(state)
        assert error(points, 1 / (1 + jnp.exp(-free))) < 1e-14
        _, now, _ = jax.random.split(key, 3)
        own, _ = algorithm.tell(now, free, score(points), own, params)
        state = search.tell(state, points, score(points))
    assert error(state.inner.mean, own.mean) < 1e-14


@pytest.mark.usefixtures("promotes")
@pytest.mark.parametrize("name", ["CMA_ES", "DifferentialEvolution"])
def test_evosax_in_a_scan_and_failures(name):
    search = hj.search.from_evosax(evosax(name))

    def score(key, points):
        value = jnp.sum((points - 0.3) ** 2, -1)
        return jnp.where(points[:, 0] > 0.8, jnp.nan, value)

    run = lambda key: hj.search.drive(key, search, score, 25)[1]
    keys = jax.random.split(jax.random.key(0), 2)
    trials = jit(jax.vmap(run))(keys)
    # A generation learns: the last is far better than the first.
    assert jnp.all(
        jnp.nanmedian(trials.scores[:, -1], -1) < 0.1 * jnp.nanmedian(trials.scores[:, 0], -1)
    )
    assert jnp.all(trials.failed == jnp.sum(trials.points[..., 0] > 0.8, (1, 2)))
    state = search.init(keys[0])
    points, state = search.ask(state)
    told = search.tell(state, points, jnp.full(8, jnp.nan))
    for x, y in zip(jax.tree.leaves(told.inner), jax.tree.leaves(state.inner), strict=True):
        assert np.array_equal(x, y, equal_nan=True)
    if name == "DifferentialEvolution":
        assert not told.started  # the first population is still to be told
        scores = jnp.asarray([1.0, jnp.nan, *range(6)])
        told = search.tell(state, points, scores)
        assert error(told.inner.population, state.free) < 1e-15
        assert np.array_equal(told.inner.fitness, jnp.where(jnp.isnan(scores), jnp.inf, scores))


@pytest.mark.usefixtures("promotes")
def test_evosax_starts_where_it_is_told_to():
    start = jnp.array([0.2, 0.5, 0.9])
    free = jnp.log(start / (1 - start))
    mean = hj.search.from_evosax(evosax("CMA_ES"), start=start).init(jax.random.key(0)).inner.mean
    assert error(mean, free) < 1e-14
    search = hj.search.from_evosax(evosax("DifferentialEvolution"), start=start)
    points, _ = search.ask(search.init(jax.random.key(0)))
    assert error(points[0], start) < 1e-14
    others = hj.search.from_evosax(evosax("DifferentialEvolution"))
    assert error(points[1:], others.ask(others.init(jax.random.key(0)))[0][1:]) == 0
    with pytest.raises(ValueError, match=r"`start` must have the shape .*\(3,\); got .*to_unit"):
        hj.search.from_evosax(evosax("CMA_ES"), start=jnp.zeros(2))


def test_a_solution_that_is_no_vector_is_refused():
    fake = types.SimpleNamespace(
        init=min, ask=min, tell=min, default_params=None, solution=jnp.zeros((2, 2))
    )
    with pytest.raises(ValueError, match=r"`solution` must be a vector .*; got \(2, 2\)"):
        hj.search.from_evosax(fake)


# --------------------------------------------------------------------------- the advisor


class Fixed:
    """A stand-in for a search with a known distribution, that keeps what it is told."""

    def __init__(self, batch):
        self.told = []
        init = lambda key: 0
        ask = lambda state: (np.full((batch, 2), 0.5 + 0.01 * state), state + 1)
        self.search = hj.search.Search(init, ask, self.tell)

    def tell(self, state, points, scores):
        self.told += [(tuple(x), float(y)) for x, y in zip(points, scores, strict=True)]
        return state

    @staticmethod
    def distribution(state):
        return hj.search.Distribution(np.full(2, 0.5), 0.1, np.asarray([[4.0, 0.0], [0.0, 1.0]]))


def advise(advisor, *, rounds, batch=1, **options):
    """(stand-in, state) after rounds whose scores count up from 0."""
    inside = Fixed(batch)
    search = hj.search.advised(inside.search, advisor, distribution=inside.distribution, **options)
    state = search.init(jax.random.key(0))
    for i in range(rounds):
        points, state = search.ask(state)
        state = search.tell(state, points, batch * i + np.arange(batch, dtype=float))
    return inside, state


def test_the_advisor_is_asked_every_third_time_after_ten():
    turns = []
    inside, state = advise(lambda facts: turns.append(facts["recent"]), rounds=32)
    assert [len(rows) for rows in turns] == [10, 13, 16, 19, 20, 20, 20, 20]  # twenty at most,
    assert [rows[-1][1] for rows in turns] == [9, 12, 15, 18, 21, 24, 27, 30]  # the latest
    assert state.overridden == 0 and len(inside.told) == 32


def test_the_advisor_sees_the_state_and_its_override_is_evaluated_and_told():
    seen = []

    def advisor(facts):
        seen.append(facts)
        return np.asarray([0.1, 0.2])

    inside, state = advise(advisor, rounds=4, batch=2, every=4, warm_up=3)
    assert [row for row, (x, _) in enumerate(inside.told) if x == (0.1, 0.2)] == [3, 7]
    assert [y for _, y in inside.told] == [0, 1, 2, 3, 4, 5, 6, 7]
    facts = seen[1]
    assert set(facts) == {"mean", "sigma", "covariance", "proposal", "best", "recent"}
    assert facts["sigma"] == 0.1 and facts["covariance"][0, 0] == 4
    assert np.array_equal(facts["proposal"], [0.53, 0.53])
    assert [y for _, y in facts["best"]] == [0, 1, 2, 3, 4]
    assert [y for _, y in facts["recent"]] == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(facts["recent"][3][0], [0.1, 0.2])
    assert state.overridden == 2 and state.withheld == 0


def test_failures_are_recent_but_never_among_the_best():
    inside = Fixed(4)
    facts = []
    search = hj.search.advised(
        inside.search, facts.append, distribution=inside.distribution, every=1, warm_up=4
    )
    points, state = search.ask(search.init(jax.random.key(0)))
    state = search.tell(state, points, np.asarray([2.0, np.nan, -np.inf, 1.0]))
    search.ask(state)
    assert [y for _, y in facts[0]["best"]] == [1.0, 2.0]
    assert len(facts[0]["recent"]) == 4 and np.isnan(facts[0]["recent"][1][1])


def test_only_near_overrides_are_told_within_reach():
    # Distances 0.4 / (0.1 * 2) = 2 along the first axis, 0.4 / 0.1 = 4 along the second.
    for point, told in (([0.9, 0.5], 3), ([0.5, 0.9], 0)):
        inside, state = advise(lambda f, p=point: p, rounds=3, every=1, warm_up=0, reach=3.0)
        assert len(inside.told) == told and state.withheld == 3 - told and state.overridden == 3
        assert len(state.recent) == 3  # a trial all the same


def test_bad_advice_is_refused():
    for advice in ([0.5], [0.5, np.nan], [0.5, 1.5]):
        with pytest.raises(ValueError, match=r"return None or a point \[2\] of the unit cube; got"):
            advise(lambda facts, a=advice: a, rounds=1, warm_up=0)


def test_the_distribution_of_cmaes_is_that_of_its_points():
    search, _ = from_cma(8)
    _, state = by_hand(search, 0, np.random.default_rng(0).uniform(size=(5, 8)))
    shape = hj.search.cmaes_distribution(state)
    state.optimizer.set_bounds(None)
    draws = np.stack([state.optimizer.ask() for _ in range(4000)])
    spread = shape.sigma * np.sqrt(np.diag(shape.covariance))
    assert np.all(abs(draws.mean(0) - shape.mean) < 5 * spread / np.sqrt(4000))
    # entries of a sample covariance vary by sqrt(2 / n) of the product of deviations at most
    gap = np.cov(draws.T) - shape.sigma**2 * shape.covariance
    assert np.all(abs(gap) < 5 * np.sqrt(2 / 4000) * np.outer(spread, spread))
