"""Studies, folds, transfer and subsets: what is declared is enforced, and nothing leaks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import jit

import hyperjax as hj
from hyperjax import protocol

SPACE = hj.space({"x": hj.uniform(-2.0, 2.0, init=1.5)})


def halton(batch, dims=1):
    """A search that proposes van der Corput points and remembers what it was told."""

    def corput(i):
        out, base = 0.0, 0.5
        while i:
            out, base, i = out + base * (i % 2), base / 2, i // 2
        return out

    def ask(state):
        first = len(state) * batch + 1
        return np.array([[corput(i)] * dims for i in range(first, first + batch)]), state

    return hj.search.Search(lambda key: [], ask, lambda state, points, scores: [*state, scores])


def noisy(raw, key):
    """(x - 0.5)^2 and noise that depends on the seed and on the configuration."""
    x = SPACE.constrain(raw)["x"]
    return (x - 0.5) ** 2 + 0.3 * jnp.sin(1e3 * x + 1e3 * jax.random.uniform(key))


# -------------------------------------------------------------------------------- study


def test_study_keeps_tuning_and_test_apart():
    declared = protocol.declare(SPACE, budget=12, tuning=range(5), test=[10, 11, 12])
    got = protocol.study(declared, noisy, halton(4), jax.random.key(0))
    points, _ = halton(12).ask([])
    configurations = SPACE.from_unit(jnp.asarray(points))
    score = jit(noisy)
    table = lambda raw, seeds: np.array([score(raw, jax.random.key(s)) for s in seeds])
    rows = [jax.tree.map(lambda x, i=i: x[i], configurations) for i in range(12)]
    each = np.stack([table(row, range(5)) for row in rows])
    # Vmapped and single runs may differ in the last bits, which the sine enlarges a thousandfold.
    np.testing.assert_allclose(got.trials.each, each, atol=1e-9)
    best = int(np.argmin(each.mean(axis=1)))
    assert best != int(np.argmin(each[:, 0]))  # one seed alone would have chosen another
    np.testing.assert_allclose(got.incumbent["x"], rows[best]["x"], 1e-12)
    np.testing.assert_allclose(got.tuning_score, each[best].mean(), atol=1e-9)
    np.testing.assert_allclose(got.scores, table(rows[best], [10, 11, 12]), atol=1e-9)
    np.testing.assert_allclose(got.default_scores, table(SPACE.init(), [10, 11, 12]), atol=1e-9)
    assert got.runs == 12 * 5 + 2 * 3
    again = protocol.study(declared, noisy, halton(4), jax.random.key(0), chunk=7)
    np.testing.assert_allclose(again.trials.each, got.trials.each, atol=1e-9)


def test_a_failed_seed_fails_the_configuration():
    def train(raw, key):
        x = SPACE.constrain(raw)["x"]
        seed = jax.random.key_data(key)[-1]
        return jnp.where((seed == 2) & (x < 0), jnp.nan, x)  # the best x fail on one seed

    declared = protocol.declare(SPACE, budget=7, tuning=range(4), test=[7, 8])
    got = protocol.study(declared, train, halton(7), jax.random.key(0))
    below = SPACE.constrain(got.trials.hparams)["x"] < 0
    np.testing.assert_array_equal(np.isnan(got.trials.mean), below)
    assert below.any()
    assert SPACE.constrain(got.incumbent)["x"] >= 0
    with pytest.raises(ValueError, match="study: each of 7 configurations failed"):
        protocol.study(declared, lambda raw, key: raw["x"] * jnp.nan, halton(7), jax.random.key(0))


def test_the_search_is_told_means():
    told = []
    base = halton(3)
    search = base._replace(tell=lambda state, points, scores: [*state, told.append(scores)])
    declared = protocol.declare(SPACE, budget=6, tuning=[3, 1], test=[0])
    got = protocol.study(declared, noisy, search, jax.random.key(0))
    np.testing.assert_allclose(np.concatenate(told), got.trials.each.mean(axis=1), 1e-6)


def test_what_is_declared_is_checked():
    with pytest.raises(ValueError, match=r"`tuning` and `test` .* both hold \[3, 4\]"):
        protocol.declare(SPACE, budget=4, tuning=range(5), test=[3, 4, 5])
    with pytest.raises(ValueError, match=r"declare: `test` must hold seeds, each once; got \[\]"):
        protocol.declare(SPACE, budget=4, tuning=range(5), test=[])
    with pytest.raises(ValueError, match=r"declare: `tuning` must hold seeds, each once"):
        protocol.declare(SPACE, budget=4, tuning=[1, 1], test=[2])
    for wrong in ([-1, 1], [1, 2**32]):  # the keys of 2**32 - 1 and, without x64, of 0
        with pytest.raises(ValueError, match=r"`tuning` must hold seeds from 0 to 2\*\*32 - 1"):
            protocol.declare(SPACE, budget=4, tuning=wrong, test=[0])
    with pytest.raises(ValueError, match=r"declare: `budget` must be an integer >= 1"):
        protocol.declare(SPACE, budget=0, tuning=[1], test=[2])
    declared = protocol.declare(SPACE, budget=10, tuning=[1], test=[2])
    with pytest.raises(ValueError, match=r"budget of 10 .* multiple of the 4 .* declare 12"):
        protocol.study(declared, noisy, halton(4), jax.random.key(0))
    with pytest.raises(TypeError, match=r"study: `train` must return a scalar; got float64\[2\]"):
        protocol.study(declared, lambda raw, key: jnp.ones(2), halton(5), jax.random.key(0))
    with pytest.raises(ValueError, match=r"study: `default` must have the structure"):
        never = lambda raw, key: pytest.fail("trained before the default was looked at")
        protocol.study(declared, never, halton(5), jax.random.key(0), default={"y": jnp.zeros(())})


# -------------------------------------------------------------------------------- folds


@pytest.mark.parametrize(("n", "outer", "inner"), [(20, 4, 3), (23, 5, 4), (6, 3, 2)])
def test_folds_never_leak(n, outer, inner):
    folds = protocol.nested_folds(jax.random.key(1), n, outer=outer, inner=inner)
    tested = np.asarray(folds.test).ravel()
    assert len(set(tested)) == len(tested) == outer * (n // outer)
    for i in range(outer):
        train, test = (
            set(np.asarray(folds.train[i]).tolist()),
            set(np.asarray(folds.test[i]).tolist()),
        )
        assert train | test == set(range(n))
        assert not train & test
        held = np.asarray(folds.inner_valid[i]).ravel()
        assert len(set(held)) == len(held) == inner * (len(train) // inner)
        for j in range(inner):
            inside = set(np.asarray(folds.inner_train[i, j]).tolist())
            aside = set(np.asarray(folds.inner_valid[i, j]).tolist())
            assert inside | aside == train
            assert not inside & aside
    assert folds.train.dtype == jnp.int32
    other = protocol.nested_folds(jax.random.key(2), n, outer=outer, inner=inner)
    assert not np.array_equal(folds.test, other.test)


def test_folds_under_jit_and_refusals():
    many = jit(jax.vmap(lambda key: protocol.nested_folds(key, 12, outer=3, inner=2)))
    keys = jax.random.split(jax.random.key(0), 3)
    got = many(keys)
    for i, key in enumerate(keys):
        one = protocol.nested_folds(key, 12, outer=3, inner=2)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), got, one)
    with pytest.raises(ValueError, match="`outer` must be an integer >= 2"):
        protocol.nested_folds(keys[0], 12, outer=1, inner=2)
    with pytest.raises(ValueError, match="`n` must be an integer >= 5"):
        protocol.nested_folds(keys[0], 3, outer=5, inner=2)


# ----------------------------------------------------------------------------- transfer


def test_transfer_by_hand():
    source = jnp.array([[0.1, 0.3], [0.5, 0.5], [0.9, 0.1]])  # means .2 .5 .5: chooses 0
    target = jnp.array([[0.6], [0.4], [0.5]])  # chooses 1
    judged = jnp.array([[0.9, 0.7], [0.5, 0.6], [0.4, 0.5]])  # best is 2
    got = jit(protocol.transfer)(source, target, judged)
    np.testing.assert_array_equal(got.choices, [2, 1, 0])
    np.testing.assert_allclose(got[:4], (0.45, 0.55, 0.8, 0.35), 1e-12)


def test_transfer_knows_failures_and_vmaps(rng):
    tables = [jnp.asarray(rng.normal(size=(3, 6, 2))) for _ in range(3)]
    tables[0] = (
        tables[0].at[1, :, 0].set(jnp.nan).at[2, jnp.argmin(tables[0][2].mean(1))].set(jnp.inf)
    )
    got = jit(jax.vmap(protocol.transfer))(*tables)
    assert got.choices[1, 2] == -1
    assert np.isnan(got.transferred[1])
    assert np.isnan(got.overestimate[1])
    for i in (0, 2):
        one = protocol.transfer(*[t[i] for t in tables])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, 1e-12), got, one)
        assert one.overestimate >= 0
    finite = np.where(np.isfinite(tables[0][2]).all(axis=1), np.mean(tables[0][2], axis=1), np.inf)
    assert got.choices[2, 2] == np.argmin(finite)
    with pytest.raises(ValueError, match=r"transfer: expected \[N, runs\] with the same N"):
        protocol.transfer(tables[0][0], tables[1][0][:5], tables[2][0])


# ------------------------------------------------------------------------------- subset


def star(points, chosen):
    """From the definition: every corner of the grid."""
    worst = 0.0
    for corner in itertools.product(*[np.unique(column) for column in points.T]):
        inside = np.all(points <= np.array(corner), axis=1)
        worst = max(worst, abs(inside[chosen].mean() - inside.mean()))
    return worst


def test_discrepancy_is_the_definition(rng):
    points = protocol.rank_coordinates(np.round(rng.normal(size=(11, 3)), 1))
    subsets = np.stack([rng.permutation(11) < size for size in (1, 4, 7, 11)])
    got = protocol.discrepancies(points, subsets)
    # Shares are sums in float32.
    np.testing.assert_allclose(got, [star(points, s) for s in subsets], atol=1e-6)
    assert got[-1] < 1e-6


def test_the_search_finds_the_best_subset(rng):
    points = rng.uniform(size=(10, 2))
    every = [np.isin(np.arange(10), c) for c in itertools.combinations(range(10), 4)]
    best = min(star(points, s) for s in every)
    got = protocol.representative(points, 4, restarts=30)
    np.testing.assert_allclose(got.discrepancy, best, atol=1e-6)
    np.testing.assert_allclose(star(points, got.tasks), got.discrepancy, atol=1e-6)
    np.testing.assert_allclose(got.discrepancy, got.restarts.min())
    # A search that ends where it began would find no more than the best of thirty at random.
    starts = [star(points, np.random.default_rng(i).permutation(10) < 4) for i in range(30)]
    assert np.median(got.restarts) < np.min(starts) + 1e-6


def test_ranks_ignore_the_scale(rng):
    regrets = rng.exponential(size=(8, 3))
    np.testing.assert_array_equal(
        protocol.rank_coordinates(regrets), protocol.rank_coordinates(np.log(regrets))
    )
    column = protocol.rank_coordinates([[3.0], [1.0], [1.0], [2.0]])[:, 0]
    np.testing.assert_allclose(column, [0.875, 0.25, 0.25, 0.625])


def test_subset_refusals():
    with pytest.raises(ValueError, match=r"`size` must be an integer in \[1, 4\]; got 5"):
        protocol.representative(np.ones((5, 2)), 5)
    with pytest.raises(ValueError, match=r"`regrets` must be a finite table .* with NaN"):
        protocol.rank_coordinates([[1.0], [np.nan]])
    with pytest.raises(ValueError, match=r"`subsets` must be bool \[B, 5\], none of them empty"):
        protocol.discrepancies(np.eye(5), np.zeros((1, 5), bool))
