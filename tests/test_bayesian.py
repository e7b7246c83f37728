"""Bayesian search: its proposals, its batches, its buffers."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from problems import jit

import hyperjax as hj
from hyperjax import _gaussian_process as gp
from hyperjax.search import _bayesian

SMALL: dict[str, Any] = {"samples": 4, "warmup": 4, "candidates": 64, "fantasies": 3}
CENTRE = jnp.asarray([0.3, 0.8])


def bowl(points):
    return jnp.sum((points - CENTRE[None]) ** 2, -1)


def told(search, points, scores, key=0):
    """A state that knows these evaluations, told in batches of four."""
    state = search.init(jax.random.key(key))
    for rows in range(0, len(points), 4):
        state = search.tell(state, points[rows : rows + 4], scores[rows : rows + 4])
    return state


SEARCH = hj.search.bayesian(2, 4, 16, **SMALL)
ASK = jit(SEARCH.ask)


def grid(count):
    """`count` points of a Kronecker sequence."""
    steps = jnp.arange(1.0, count + 1)[:, None]
    return (steps * jnp.asarray([[0.7548776662, 0.5698402910]])) % 1.0


@pytest.mark.parametrize("hyperparameters", ["slice", "maximum"])
def test_it_finds_the_bottom_of_a_bowl_within_a_scan(hyperparameters):
    search = hj.search.bayesian(2, 1, 14, hyperparameters=hyperparameters, **SMALL)

    def step(state, _):
        points, state = search.ask(state)
        scores = bowl(points)
        return search.tell(state, points, scores), scores[0]

    run = lambda key: jax.lax.scan(step, search.init(key), length=14)[1]
    scores = jit(run)(jax.random.key(0))
    # 14 random points come within 0.15 of the bottom in the mean: 1 / (14 pi) = 0.02
    assert scores.min() < 1e-3


def test_a_batch_has_no_near_duplicates():
    points = grid(12)
    for key in range(5):
        state = told(SEARCH, points, bowl(points), key)
        batch, _ = ASK(state)
        assert jnp.all((batch >= 0) & (batch <= 1))
        gaps = [jnp.linalg.norm(a - b) for a, b in itertools.combinations(batch, 2)]
        assert min(gaps) > 1e-3


def test_without_pending_scores_a_batch_would_be_one_point():
    # The same proposal, from the same rows, twice: what fantasies prevent.
    points = grid(12)
    state = told(SEARCH, points, bowl(points))
    targets = _bayesian._standardized(state)
    choose = jit(
        lambda key: _bayesian._choose(key, state, targets, state.process[None], 1, 1, 512)[0]
    )
    one, two = (choose(jax.random.key(k)) for k in range(2))
    np.testing.assert_allclose(one, two, atol=0.02)  # candidates are 0.04 apart, then refined


def test_proposals_maximize_expected_improvement():
    points = grid(12)
    state = told(SEARCH, points, bowl(points))
    targets = _bayesian._standardized(state)
    process = jnp.asarray([0.1, 0.2, -8.0, -1.0, -0.7])
    choose = jit(lambda key: _bayesian._choose(key, state, targets, process[None], 1, 1, 512))
    chosen = choose(jax.random.key(0))

    def improvement(new):  # by dense NumPy on the rows that are there
        known = np.asarray(state.known)
        x, y = np.asarray(state.points)[known], np.asarray(targets)[known] - 0.1
        lengths = np.exp(process[3:])
        cover = lambda a, b: (
            np.exp(0.4)
            * np.asarray(
                gp.matern52(jnp.asarray((((a[:, None] - b[None]) / lengths) ** 2).sum(-1)))
            )
        )
        solved = np.linalg.solve(
            cover(x, x) + np.exp(-8.0) * np.eye(len(y)), np.column_stack([y, cover(x, new)])
        )
        mean = 0.1 + cover(new, x) @ solved[:, 0]
        variance = np.exp(0.4) - (cover(x, new) * solved[:, 1:]).sum(0)
        least = jnp.asarray(y.min() + 0.1)
        return gp.expected_improvement(least, jnp.asarray(mean), jnp.sqrt(jnp.asarray(variance)))

    lattice = np.stack(np.meshgrid(*[np.linspace(0, 1, 101)] * 2), -1).reshape(-1, 2)
    assert improvement(np.asarray(chosen))[0] > 0.999 * improvement(lattice).max()


def test_nothing_is_traced_again_while_data_grow():
    traces = []

    def counted(name, function):
        def call(*arguments):
            traces.append(name)
            return function(*arguments)

        return jit(call)

    ask, tell = counted("ask", SEARCH.ask), counted("tell", SEARCH.tell)
    state = SEARCH.init(jax.random.key(0))
    for _ in range(6):  # 24 evaluations in a buffer of 16
        points, state = ask(state)
        state = tell(state, points, bowl(points))
    assert traces == ["ask", "tell"]


def test_a_full_memory_forgets_failures_and_then_the_worst():
    search = hj.search.bayesian(1, 1, 3)
    state = search.init(jax.random.key(0))
    rows = []
    for score in (5.0, np.nan, 3.0, 4.0, 2.0, np.inf, 9.0):
        state = search.tell(state, jnp.full((1, 1), score), jnp.asarray([score]))
        rows.append(sorted(np.asarray(state.scores).tolist()))
    inf = np.inf
    assert rows[:3] == [[5, inf, inf], [5, inf, inf], [3, 5, inf]]
    assert rows[3:] == [[3, 4, 5], [2, 3, 4], [2, 3, inf], [2, 3, 9]]
    assert state.told == 7 and state.known.all()


def test_failed_evaluations_count_as_the_worst():
    points, scores = grid(12), bowl(grid(12))
    failed = told(SEARCH, points, scores.at[jnp.argmin(scores)].set(jnp.nan))
    worst = jnp.max(jnp.where(jnp.arange(12) == jnp.argmin(scores), -jnp.inf, scores))
    poor = told(SEARCH, points, scores.at[jnp.argmin(scores)].set(worst))
    order = lambda state: jnp.argsort(state.points[:, 0])
    a, b = (_bayesian._standardized(s)[order(s)] for s in (failed, poor))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    batch, _ = ASK(told(SEARCH, points, jnp.full(12, jnp.nan)))  # all of them
    assert jnp.all(jnp.isfinite(batch))


def test_first_points_are_uniform_and_counted_over_batches():
    search = hj.search.bayesian(2, 4, 16, initial=6, **SMALL)
    keys = jax.random.split(jax.random.key(0), 3)
    state = jax.vmap(search.init)(keys)
    ask = jit(jax.vmap(search.ask))
    first, _ = ask(state)
    early, _ = ask(state._replace(told=jnp.full(3, 4)))
    late, _ = ask(state._replace(told=jnp.full(3, 6)))
    np.testing.assert_array_equal(first[:, :2], early[:, :2])  # by the same key
    assert np.all(early[:, 2:] != first[:, 2:])
    np.testing.assert_array_equal(early[:, 2:], late[:, 2:])
    assert np.all(late[:, :2] != first[:, :2])


def test_types_stay():
    state = SEARCH.init(jax.random.key(0))
    points, asked = jax.eval_shape(SEARCH.ask, state)
    after = jax.eval_shape(SEARCH.tell, state, points, jnp.ones(4, jnp.float32))
    kind = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    for other in (asked, after):
        assert kind(other[1:]) == kind(state[1:])
    assert points.shape == (4, 2)


def test_vmap_and_shard_map_are_separate_searches():
    points = grid(12)
    scores = jnp.stack([bowl(points), bowl(1 - points)])
    states = [told(SEARCH, points, s, i) for i, s in enumerate(scores)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    mesh, spec = Mesh(np.asarray(jax.devices()[:2]), ("x",)), PartitionSpec("x")
    many = jax.shard_map(jax.vmap(SEARCH.ask), mesh=mesh, in_specs=spec, out_specs=spec)
    found, _ = jit(many)(stacked)
    for i, state in enumerate(states):
        # slice sampling and ascent carry rounding on, a little
        np.testing.assert_allclose(found[i], ASK(state)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 1, 8), {}, "`dim` must be an integer >= 1; got 0"),
        ((2, 1.0, 8), {}, "`batch` must be an integer >= 1; got 1.0"),
        ((2, 4, 3), {}, "`memory` must hold a batch; got memory=3, batch=4"),
        ((2, 1, 8), {"warmup": -1}, "`warmup` must be an integer >= 0; got -1"),
        ((2, 1, 8), {"hyperparameters": "mcmc"}, "`hyperparameters` must be one of 'slice', 'max"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=f"bayesian: {message}"):
        hj.search.bayesian(*arguments, **options)
