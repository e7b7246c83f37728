"""Pure searches: what they ask, what they learn, and the rounds that drive them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from problems import error, jit, mesh
from scipy.stats import qmc

import hyperjax as hj
from hyperjax import _tree
from hyperjax.search import _differential_evolution as de

SIZE, DIM, KEYS = 6, 5, 400
PURE = {
    "random": hj.search.random(3, 8),
    "grid": hj.search.grid(3, 8, levels=3),
    "sobol": hj.search.sobol(3, 8),
    "evolution": hj.search.differential_evolution(3, 8, hj.search.genes(), most=1),
}


def sphere(key, points):
    """The optimum is off the middle; the key is part of it, so that it matters."""
    return jnp.sum((points - 0.3) ** 2, -1) + 1e-12 * jax.random.uniform(key)


def asked(search, rounds, key=0):
    """Points of rounds in which nothing is learnt, [rounds * N, D]."""
    state, points = search.init(jax.random.key(key)), []
    ask = jit(search.ask)
    for _ in range(rounds):
        more, state = ask(state)
        points.append(np.asarray(more))
    return np.concatenate(points)


# --------------------------------------------------------------------------- random, grid, Sobol


def test_sobol_is_that_of_scipy():
    ours = asked(hj.search.sobol(DIM, 12, scramble=False), 3)
    theirs = qmc.Sobol(DIM, scramble=False, bits=24).random_base2(6)[:36]
    assert np.array_equal(ours, theirs)  # sums of powers of two, exact in either


def test_scrambled_sobol_is_as_even_and_differs_by_key():
    points = asked(hj.search.sobol(DIM, 32), 2)
    # A net: of 64 points every 64th of every axis has one.
    assert np.array_equal(np.sort(np.floor(64 * points), 0), np.tile(np.arange(64.0), (DIM, 1)).T)
    # and so in two dimensions, for the first two: 8 x 8 cells
    cells = np.floor(8 * points[:, :2]) @ np.asarray([8, 1])
    assert np.array_equal(np.sort(cells), np.arange(64.0))
    other = asked(hj.search.sobol(DIM, 32), 2, key=1)
    assert not np.any(np.isin(other, points))
    # A scramble that only shifted would leave the differences of bits as they were.
    flips = lambda x: np.floor(2**10 * x).astype(int)[1:] ^ np.floor(2**10 * x).astype(int)[:1]
    assert not np.array_equal(flips(points), flips(other))


def test_sobol_repeats_when_its_index_is_spent():
    search = hj.search.sobol(2, 4)
    state = search.init(jax.random.key(0))
    first, _ = jit(search.ask)(state)
    last, _ = jit(search.ask)(state._replace(following=jnp.asarray(2**20 - 2, jnp.int32)))
    assert np.array_equal(last[2:], first[:2]) and np.all((last >= 0) & (last < 1))


def test_grid_is_that_of_the_space_and_starts_again():
    space = hj.space({"a": hj.loguniform(0.1, 1.0), "b": hj.uniform(0.0, 1.0, shape=(2,))})
    points = asked(hj.search.grid(3, 5, levels=3), 6)
    raw = space.ravel(space.from_unit(jnp.asarray(points[:27])))
    assert error(raw, space.ravel(space.grid(3))) < 1e-14
    assert np.array_equal(points[27:], points[:3])


def test_grid_in_a_batch_larger_than_itself():
    points = asked(hj.search.grid(1, 5, levels=2), 1)
    assert np.array_equal(points[:, 0], [0.25, 0.75, 0.25, 0.75, 0.25])


def test_random_points_are_uniform_and_new_in_every_round():
    points = asked(hj.search.random(DIM, 2000), 2)
    assert len(np.unique(points)) == points.size
    # 5 standard errors of the mean and of the mean square of a uniform variable
    assert np.all(abs(points.mean(0) - 1 / 2) < 5 * np.sqrt(1 / 12 / 4000))
    assert np.all(abs((points**2).mean(0) - 1 / 3) < 5 * np.sqrt(4 / 45 / 4000))


# --------------------------------------------------------------------------- differential evolution


def population():
    """Points near the middle, so that no mutant leaves the cube, with distinct scores."""
    rng = np.random.default_rng(1)
    points = rng.uniform(0.45, 0.55, (SIZE, DIM))
    scores = np.asarray([3.0, 1.0, 5.0, 0.5, 4.0, 2.0])
    key = jax.random.key(0)
    return de.EvolutionState(key, jnp.asarray(points), jnp.asarray(scores), jnp.asarray(True))


@pytest.fixture(scope="module")
def rivals():
    """genes -> trials [KEYS, SIZE, DIM] of one population: all genes in one program."""

    @jit
    def program(genes):
        search = hj.search.differential_evolution(DIM, SIZE, genes, most=2, elite=0.3)
        ask = lambda key: search.ask(population()._replace(key=key))[0]
        return jax.vmap(ask)(jax.random.split(jax.random.key(2), KEYS))

    return lambda *choices, **more: np.asarray(program(hj.search.genes(*choices, **more)))


# left, right: the bases of member i, by hand, when `a` is the random partner
HANDS = {
    ("rand", "rand"): lambda x, i, a: {x[a].tobytes()},
    ("best", "best"): lambda x, i, a: {x[3].tobytes()},
    ("current", "current"): lambda x, i, a: {x[i].tobytes()},
    ("current", "best"): lambda x, i, a: {(x[i] + 0.5 * (x[3] - x[i])).tobytes()},
    ("rand", "best"): lambda x, i, a: {(x[a] + 0.5 * (x[3] - x[a])).tobytes()},
    # the best 30 % of six are two: scores 0.5 and 1.0
    ("pbest", "pbest"): lambda x, i, a: {x[3].tobytes(), x[1].tobytes()},
}


@pytest.mark.parametrize(("left", "right"), HANDS)
@pytest.mark.parametrize("differences", [1, 2])
def test_mutants_are_those_of_the_formula(rivals, left, right, differences):
    x = np.asarray(population().points)
    got = rivals(0.5, 1.0, left, right, differences)[:40]  # rate 1: the trial is the mutant
    for i in range(SIZE):
        others = [j for j in range(SIZE) if j != i]
        allowed = []
        for a, *pairs in itertools.permutations(others, 1 + 2 * differences):
            total = sum(x[pairs[2 * k]] - x[pairs[2 * k + 1]] for k in range(differences))
            bases = HANDS[left, right](x, i, a)
            allowed += [np.frombuffer(base) + 0.5 * total for base in bases]
        gaps = abs(got[:, i, None] - np.asarray(allowed)[None]).max(-1).min(-1)
        assert gaps.max() < 1e-14  # sums of five terms of order one, in another order


def test_pbest_is_each_of_the_elite(rivals):
    x = np.asarray(population().points)
    got = rivals(0.0, 1.0, "pbest")  # no difference: the mutant is its base
    share = np.mean(abs(got - x[3]).max(-1) < 1e-12)
    assert abs(share - 0.5) < 5 * np.sqrt(0.25 / (KEYS * SIZE))
    assert np.all((abs(got - x[3]).max(-1) < 1e-12) | (abs(got - x[1]).max(-1) < 1e-12))


def test_partners_are_distinct_and_all_as_likely():
    draw = lambda key: jnp.stack(de.others_than_self(key, SIZE, 3))
    picked = np.asarray(jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)))
    with_self = np.concatenate([picked, np.tile(np.arange(SIZE), (4000, 1, 1))], 1)
    assert np.all(np.diff(np.sort(with_self, 1), axis=1) > 0)
    # Every ordered triple of the other five, 60 of them, for the member in the middle.
    codes = picked[:, :, 2] @ np.asarray([36, 6, 1])
    _, counts = np.unique(codes, return_counts=True)
    # counts of 4000 draws from 60 cells: 5 standard deviations of 66.7
    assert len(counts) == 60 and np.all(abs(counts - 4000 / 60) < 5 * np.sqrt(4000 / 60))


def test_a_rate_of_zero_copies_one_coordinate(rivals):
    # MetaDE's code copies none in exponential crossover then.
    x = np.asarray(population().points)
    for crossover in ("binomial", "exponential"):
        copied = rivals(0.5, 0.0, "rand", crossover=crossover) != x
        assert np.all(copied.sum(-1) == 1)
        # any of the five, as often: 5 standard errors
        assert np.all(abs(copied.mean((0, 1)) - 0.2) < 5 * np.sqrt(0.16 / (KEYS * SIZE)))


def test_exponential_crossover_copies_a_run(rivals):
    rate = 0.6
    copied = rivals(0.5, rate, "rand", crossover="exponential") != np.asarray(population().points)
    lengths = copied.sum(-1)
    edges = (copied & ~np.roll(copied, 1, -1)).sum(-1)  # where a run begins, around the corner
    assert np.all((edges == 1) | (lengths == DIM))
    # P(length >= k) = rate^(k - 1) up to DIM, each within 5 standard errors
    for k in range(1, DIM + 1):
        p = rate ** (k - 1)
        assert abs(np.mean(lengths >= k) - p) <= 5 * np.sqrt(p * (1 - p) / lengths.size)


def test_binomial_and_arithmetic_crossover(rivals):
    x, rate = np.asarray(population().points), 0.3
    mutants = rivals(0.5, 1.0, "rand", differences=2)  # the same keys, so the same mutants
    blended = rivals(0.5, rate, "rand", differences=2, crossover="arithmetic")
    assert error(blended, x + rate * (mutants - x)) < 1e-14
    trials = rivals(0.5, rate, "rand", differences=2)
    assert np.all((trials == x) | (trials == mutants))
    share = rate + (1 - rate) / DIM  # one coordinate is copied anyway
    got = np.mean(trials != x)
    assert abs(got - share) < 5 * np.sqrt(rate / (KEYS * SIZE * DIM))


def test_mutants_are_clipped_to_the_cube(rivals):
    got = rivals(40.0, 1.0, "rand")
    assert got.min() == 0 and got.max() == 1


def test_a_rival_takes_its_place_if_not_worse_and_never_if_failed():
    search = hj.search.differential_evolution(DIM, SIZE, hj.search.genes(), most=1)
    state = population()._replace(scores=jnp.asarray([1.0, 1.0, 1.0, jnp.inf, jnp.inf, 1.0]))
    rivals = jnp.zeros((SIZE, DIM))
    state = search.tell(state, rivals, jnp.asarray([0.5, 1.0, 1.5, 9.0, jnp.nan, -jnp.inf]))
    assert np.array_equal(jnp.all(state.points == 0, -1), [True, True, False, True, False, False])
    assert np.array_equal(state.scores, [0.5, 1.0, 1.0, 9.0, np.inf, 1.0])


def test_genes_at_points_of_the_unit_cube():
    low, high = (hj.search.genes_from_unit(jnp.full(6, u)) for u in (0.0, 1.0))
    assert [float(x) for x in low] == [0, 0, 0, 0, 1, 0]
    assert [float(x) for x in high] == [1, 1, 3, 3, 4, 2]
    middle = hj.search.genes_from_unit(jnp.asarray([0.3, 0.7, 0.26, 0.74, 0.51, 0.34]))
    assert [float(x) for x in middle] == [0.3, 0.7, 1, 2, 3, 1]
    named = hj.search.genes(0.3, 0.7, "best", "pbest", 3, "exponential")
    assert [float(x) for x in named] == [float(x) for x in middle]


# --------------------------------------------------------------------------- driving


def test_evolution_finds_the_minimum_of_a_sphere():
    search = hj.search.differential_evolution(4, 20, hj.search.genes(0.5, 0.9, "best"), most=1)
    _, trials = jit(lambda key: hj.search.drive(key, search, sphere, 60))(jax.random.key(0))
    random = np.asarray(sphere(jax.random.key(0), jax.random.uniform(jax.random.key(1), (1200, 4))))
    # Linear convergence: many orders below what as many random points reach.
    assert trials.score < 1e-6 < 1e-4 < random.min()
    assert error(trials.point, jnp.full(4, 0.3)) < 1e-3
    assert trials.failed == 0 and trials.score == trials.scores.min()


@pytest.mark.parametrize("name", PURE)
def test_runs_for_several_seeds_at_once_are_the_single_runs(name):
    search, keys = PURE[name], jax.random.split(jax.random.key(3), 2)
    state = search.init(keys[0])
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(_tree.strong(state)), strict=True):
        assert jax.typeof(x) == jax.typeof(y)  # a weak type shows in it
    run = lambda key: hj.search.drive(key, search, sphere, 4)
    state, trials = jit(jax.vmap(run))(keys)
    single, one = jit(run)(keys[1])
    assert trials.points.shape == (2, 4, 8, 3)
    assert error(trials.points[1], one.points) < 1e-15 and error(trials.score[1], one.score) < 1e-15
    assert jax.tree.structure(state) == jax.tree.structure(single)


def test_a_loop_on_the_host_is_the_scan():
    key, search = jax.random.key(4), PURE["evolution"]
    _, one = jit(lambda key: hj.search.drive(key, search, sphere, 4))(key)
    _, other = hj.search.drive_on_host(key, search, jit(sphere), 4)
    assert error(one, other) < 1e-15
    assert [x.dtype for x in jax.tree.leaves(one)] == [x.dtype for x in jax.tree.leaves(other)]


def test_what_is_evaluated_besides_is_kept_and_not_shown_to_the_search():
    def both(key, points):
        return sphere(key, points), {"twice": 2 * points, "round": jax.random.uniform(key)}

    key, search = jax.random.key(4), PURE["evolution"]
    alone = jit(lambda key: hj.search.drive(key, search, sphere, 4))(key)[1]
    traced = jit(lambda key: hj.search.drive(key, search, both, 4, has_aux=True))(key)[1]
    looped = hj.search.drive_on_host(key, search, jit(both), 4, has_aux=True)[1]
    for trials in (traced, looped):
        assert error(trials[:5], alone[:5]) < 1e-15
        assert error(trials.aux["twice"], 2 * alone.points) < 1e-15
        assert trials.aux["round"].shape == (4,) and len(set(trials.aux["round"].tolist())) == 4
    with pytest.raises(TypeError, match=r"must return \(scores, aux\); got .*leave `has_aux` out"):
        hj.search.drive(key, search, sphere, 1, has_aux=True)


def test_failures_are_never_the_best_and_are_counted():
    def broken(key, points):
        score = sphere(key, points)
        left = points[:, 0] < 0.4  # where the minimum is, and where it would be minus infinity
        return jnp.where(left, jnp.where(points[:, 1] < 0.5, jnp.nan, -jnp.inf), score)

    run = jit(lambda key: hj.search.drive(key, PURE["evolution"], broken, 12))
    _, trials = run(jax.random.key(5))
    bad = np.asarray(trials.points[..., 0]) < 0.4
    assert trials.failed == bad.sum() > 0
    assert trials.score == np.asarray(trials.scores)[~bad].min()
    assert trials.point[0] >= 0.4


def test_a_search_of_failures_alone_has_no_best():
    search = hj.search.random(2, 3)
    _, trials = hj.search.drive(jax.random.key(0), search, lambda k, x: x[:, 0] * jnp.inf, 2)
    assert jnp.isnan(trials.score) and jnp.all(jnp.isnan(trials.point)) and trials.failed == 6


def test_scores_of_float32_stay_so_and_default_types_rule_the_points():
    run = lambda score: hj.search.drive(jax.random.key(0), PURE["evolution"], score, 2)[1]
    trials = run(lambda key, points: jnp.sum(points, -1).astype(jnp.float32))
    assert trials.scores.dtype == trials.score.dtype == jnp.float32
    with jax.enable_x64(False):
        trials = run(sphere)
        assert {x.dtype for x in trials[:4]} == {jnp.dtype(jnp.float32)}


def test_inside_shard_map_with_a_key_per_device():
    keys, along = jax.random.split(jax.random.key(6), 8), PartitionSpec("seed")
    run = lambda key: hj.search.drive(key, PURE["evolution"], sphere, 3)[1]
    each = jax.shard_map(
        lambda keys: jax.tree.map(lambda x: x[None], run(keys[0])),
        mesh=mesh("seed"),
        in_specs=along,
        out_specs=along,
    )
    got, expected = jit(each)(keys), jit(jax.vmap(run))(keys)
    assert error(got.points, expected.points) < 1e-15


# --------------------------------------------------------------------------- searching a search


def test_meta_scores_a_point_by_the_search_it_makes():
    make = lambda point: hj.search.differential_evolution(
        3, 8, hj.search.genes_from_unit(point), most=3
    )
    points, now = jax.random.uniform(jax.random.key(7), (3, 6)), jax.random.key(8)
    one = jit(lambda key, p: hj.search.drive(key, make(p), sphere, 5)[1].score)
    got = jit(hj.search.meta(make, sphere, 5))(now, points)
    assert error(got, jnp.stack([one(now, p) for p in points])) < 1e-15
    # with a seed of its own, the round's does not matter
    fixed = jit(hj.search.meta(make, sphere, 5, key=jax.random.key(9)))
    again = jnp.stack([one(jax.random.key(9), p) for p in points])
    assert error(fixed(now, points), again) < 1e-15
    assert error(fixed(jax.random.key(1), points), again) < 1e-15
    assert not np.any(got == again)


# --------------------------------------------------------------------------- refusals

REFUSED = {
    r"differential_evolution: 4 difference vectors need a `batch` of at least 10; got 8": (
        lambda: hj.search.differential_evolution(3, 8, hj.search.genes())
    ),
    r"`elite` must be in \(0, 1\]; got 0": (
        lambda: hj.search.differential_evolution(3, 10, hj.search.genes(), elite=0)
    ),
    r"genes: `rate` must be in \[0, 1\]; got 1.5": lambda: hj.search.genes(rate=1.5),
    r"genes: `left` must be one of 'rand', .*; got 'worst'": lambda: hj.search.genes(left="worst"),
    r"genes_from_unit: expected `point` \[6\].*got float64\[5\]": (
        lambda: hj.search.genes_from_unit(jnp.zeros(5))
    ),
    r"grid: 10 levels of 10 coordinates": lambda: hj.search.grid(10, 4, levels=10),
    r"sobol: `dim` must be <= 21201; got 30000": lambda: hj.search.sobol(30000, 4),
    r"random: `batch` must be an integer >= 1; got 0": lambda: hj.search.random(2, 0),
    r"drive: `rounds` must be an integer >= 1; got 0": (
        lambda: hj.search.drive(jax.random.key(0), PURE["random"], sphere, 0)
    ),
    r"drive: `evaluate` must return one score per point, \[8\]; got float64\[8, 3\]": (
        lambda: hj.search.drive(jax.random.key(0), PURE["random"], lambda k, x: x, 1)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
