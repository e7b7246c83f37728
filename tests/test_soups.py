"""Soups: closed forms, brute force, and members that must never be averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import jit

import hyperjax as hj
from hyperjax import merge


def population(size=6, seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(size, *shape)), dtype)
    return {"w": draw(3, 2), "b": draw(2), "scale": draw()}


def spoil(members, index, value=jnp.nan):
    return members | {"b": members["b"].at[index, 0].set(value)}


def pick(members, rows):
    return jax.tree.map(lambda x: x[jnp.asarray(rows)], members)


def mean(members, rows):
    return jax.tree.map(lambda x: np.mean(np.asarray(x)[list(rows)], axis=0), members)


def close(a, b, rtol=1e-12):
    # A mean of a few numbers of order one: 1e-12 is rounding in float64 with room to spare.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, 1e-12), a, b)


# ------------------------------------------------------------------------------ uniform


def test_uniform_is_the_mean():
    members = population()
    soup = jit(merge.uniform)(members)
    close(soup.params, mean(members, range(6)))
    np.testing.assert_allclose(soup.weights, np.full(6, 1 / 6), 1e-12)
    assert not soup.excluded.any()


def test_a_mask_leaves_out():
    members = population()
    mask = jnp.array([True, False, True, True, False, False])
    soup = merge.uniform(members, mask)
    close(soup.params, mean(members, [0, 2, 3]))
    np.testing.assert_array_equal(soup.excluded, ~mask)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_diverged_member_is_left_out_bit_for_bit(value):
    members, left = population(), [0, 1, 3, 4, 5]
    mask = jnp.arange(6) != 2
    spoilt = spoil(members, 2, value)
    loss = lambda params: jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2)
    batches = jnp.zeros(3)
    learn = lambda m, mask: merge.learned(m, lambda p, t, batch: t * loss(p), batches, mask=mask)
    recipes = {
        "uniform": merge.uniform,
        "greedy": lambda m, mask: merge.greedy(m, loss, mask=mask),
        "learned": learn,
    }
    for name, recipe in recipes.items():
        want, got = jit(recipe)(members, mask), jit(recipe)(spoilt, jnp.ones(6, bool))
        jax.tree.map(np.testing.assert_array_equal, got, want)
        np.testing.assert_array_equal(got.excluded, np.arange(6) == 2, err_msg=name)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got.params)), name
    close(recipes["uniform"](spoilt, None).params, mean(members, left))


def test_nobody_left_is_not_a_model():
    members = jax.tree.map(lambda x: x * jnp.nan, population())
    score = lambda params: jnp.zeros(())
    for soup in (merge.uniform(members), merge.greedy(members, score)):
        assert all(np.isnan(x).all() for x in jax.tree.leaves(soup.params))
        assert soup.excluded.all()
        assert not soup.weights.any()
    learnt = merge.learned(members, lambda p, t, batch: t * smooth(p), jnp.zeros(1)).params
    for params in (merge.mix(members, jnp.zeros(6)), learnt):
        assert all(np.isnan(x).all() for x in jax.tree.leaves(params))


# ------------------------------------------------------------------------------- greedy


def by_hand(members, score, ties, excluded=()):
    """Recipe 1 in plain Python, from the pooled mean each time."""
    size = len(members["scale"])
    alone = [float(score(pick(members, i))) for i in range(size)]
    order = sorted((i for i in range(size) if i not in excluded), key=lambda i: alone[i])
    kept, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        got = float(score(jax.tree.map(jnp.asarray, mean(members, [*kept, i]))))
        if got < best or (ties == "add" and got == best):
            kept, best = [*kept, i], got
    return sorted(kept), best


def rough(params):
    """An error rate: many ties."""
    return jnp.round(16 * jnp.mean(jnp.abs(params["w"] - 0.2))) / 16


def smooth(params):
    return jnp.sum((params["w"] - 0.2) ** 2) + jnp.sum(params["b"] ** 2)


@pytest.mark.parametrize("ties", ["add", "discard"])
@pytest.mark.parametrize("score", [rough, smooth])
def test_greedy_is_the_recipe(score, ties):
    taste = jit(lambda members: merge.greedy(members, score, ties=ties))
    sizes = set()
    for seed in range(6):
        members = population(8, seed)
        soup = taste(members)
        kept, best = by_hand(members, score, ties)
        assert np.flatnonzero(soup.weights).tolist() == kept
        close(soup.params, mean(members, kept))
        np.testing.assert_allclose(soup.info.score, best, 1e-12)
        assert soup.info.score <= np.min(soup.info.scores) + 1e-12
        sizes.add(len(kept))
    assert len(sizes) > 1


def test_ties_decide():
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 4, axis=0), population())
    count = lambda ties: int(jnp.sum(merge.greedy(same, rough, ties=ties).weights > 0))
    assert (count("add"), count("discard")) == (4, 1)


def test_greedy_ignores_a_score_that_hides_divergence():
    # argmax of NaN is 0, so that an error rate of a diverged model is a finite number, even zero.
    members = spoil(population(), 3)
    blind = lambda params: jnp.where(jnp.isnan(params["b"]).any(), 0.0, smooth(params))
    soup = merge.greedy(members, blind)
    kept, _ = by_hand(members, blind, "add", excluded=[3])
    assert np.flatnonzero(soup.weights).tolist() == kept
    assert soup.excluded.tolist() == [False, False, False, True, False, False]


def test_scores_that_are_known_are_not_computed():
    members, calls = population(), []

    def score(params):
        calls.append(1)
        return smooth(params)

    scores = jax.vmap(smooth)(members)
    given = merge.greedy(members, score, scores=scores)
    assert len(calls) == 1  # traced once, in the scan
    close(given, merge.greedy(members, smooth))


# ------------------------------------------------------------------------------ learned


def held_out(steps=40, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(steps, 5, 3))), jnp.asarray(
        rng.integers(2, size=(steps, 5))
    )


def cross_entropy(params, temperature, batch):
    x, y = batch
    logits = temperature * (x @ params["w"] + params["b"][None]) * params["scale"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@pytest.mark.parametrize("per", ["tensor", "model"])
def test_learned_follows_its_gradient(per):
    """Plain SGD for three steps against a loop with finite differences of the mixture."""
    members, batches = population(4), held_out(3)
    rate = 0.3
    soup = jit(lambda m, b: merge.learned(m, cross_entropy, b, optimizer=optax.sgd(rate), per=per))(
        members, batches
    )
    names = list(members)
    shape = (3, 4) if per == "tensor" else (1, 4)
    recipe = np.zeros(shape[0] * 4 + 1)

    def mixture(recipe):
        logits = np.broadcast_to(recipe[:-1].reshape(shape), (3, 4))
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        params = {
            name: jnp.asarray(np.tensordot(w, np.asarray(members[name]), 1))
            for name, w in zip(names, weights, strict=True)
        }
        return params, weights

    value = jit(cross_entropy)
    for i in range(3):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        at = lambda r, batch=batch: float(value(mixture(r)[0], np.exp(r[-1]), batch))
        slope = [(at(recipe + e) - at(recipe - e)) / 2e-5 for e in 1e-5 * np.eye(len(recipe))]
        np.testing.assert_allclose(soup.info.losses[i], at(recipe), 1e-8)
        recipe = recipe - rate * np.array(slope)
    params, weights = mixture(recipe)
    # Central differences with steps of 1e-5 leave errors near 1e-10.
    close(soup.params, params, 1e-7)
    np.testing.assert_allclose(soup.info.temperature, np.exp(recipe[-1]), 1e-7)
    for name, w in zip(names, weights, strict=True):
        np.testing.assert_allclose(soup.weights[name], w, 1e-7)
    assert soup.info.finite


def test_learned_is_better_than_uniform():
    members, batches = population(5), held_out(1)
    many = jax.tree.map(lambda x: jnp.repeat(x, 60, axis=0), batches)
    soup = jit(lambda m, b: merge.learned(m, cross_entropy, b))(members, many)
    np.testing.assert_allclose(
        soup.info.losses[0],
        cross_entropy(merge.uniform(members).params, 1.0, pick(batches, 0)),
        1e-12,
    )
    assert soup.info.losses[-1] < 0.9 * soup.info.losses[0]


def test_mix_is_a_response():
    """The tuner that ascends to the recipe: its hypergradient is that of the mixture."""
    members, (x, y) = population(4), pick(held_out(1), 0)
    response = lambda h, carry, batches: (merge.mix(members, h), carry)
    score = lambda params, h, batch: cross_entropy(params, 1.0, batch)
    estimator = hj.hypergradient(response, score, lambda params, h: ())
    h = jnp.array([0.1, -0.3, 0.2, 0.5])
    split = hj.Split(jnp.zeros(1), (x, y))
    estimate, _ = estimator.estimate(h, estimator.init((), h), split)
    at = lambda h: cross_entropy(merge.mix(members, h), 1.0, (x, y))
    slope = [(at(h + e) - at(h - e)) / 2e-5 for e in 1e-5 * jnp.eye(4)]
    np.testing.assert_allclose(estimate.grad, slope, 1e-6, 1e-9)
    np.testing.assert_allclose(jnp.sum(estimate.grad), 0, atol=1e-12)  # softmax ignores a shift


def test_gradients_do_not_see_the_excluded():
    members = spoil(population(4), 1)
    grad = jax.grad(lambda h: smooth(merge.mix(members, h)))(jnp.zeros(4))
    assert np.isfinite(grad).all()
    assert grad[1] == 0


def test_mixing_far_from_zero_stays_finite():
    weights = merge.mix(population(3), jnp.array([1e4, 1e4, -1e4]))
    close(weights, mean(population(3), [0, 1]))


# ------------------------------------------------------------------ transformations, types


def test_vmap_equals_separate_runs():
    many = jax.tree.map(lambda *x: jnp.stack(x), *[population(5, seed) for seed in range(3)])
    for recipe in (merge.uniform, lambda m: merge.greedy(m, smooth)):
        together = jit(jax.vmap(recipe))(many)
        for i in range(3):
            close(pick(together, i), recipe(pick(many, i)))


def test_in_a_scan_and_in_half_precision():
    members = population(64, dtype=jnp.bfloat16)

    def step(carry, _):
        soup = merge.greedy(carry, smooth)  # a score in half precision
        return jax.tree.map(lambda x, m: (x + m[None]) / 2, carry, soup.params), soup

    after, soups = jax.lax.scan(step, members, length=2)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, members)
    assert {x.dtype for x in jax.tree.leaves(soups.params)} == {jnp.dtype(jnp.bfloat16)}
    # Summed in float32, the mean is off by half a unit of the last of bfloat16's 8 bits at most.
    exact = mean(jax.tree.map(lambda x: x.astype(jnp.float64), members), range(64))
    got = jax.tree.map(lambda x: x.astype(jnp.float64), merge.uniform(members).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2**-8, 1e-6), got, exact)
    assert merge.uniform(population(dtype=jnp.float32)).weights.dtype == jnp.float32
    assert soups.weights.dtype == jnp.float32


def test_inside_shard_map():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.PartitionSpec("i")
    many = jax.tree.map(lambda *x: jnp.stack(x), *[population(4, seed) for seed in range(2)])
    batches = held_out(2)

    def one(m):
        greedy = merge.greedy(m, smooth).params
        return greedy, merge.learned(m, cross_entropy, batches).params

    local = lambda block: jax.tree.map(lambda x: x[None], one(pick(block, 0)))
    sharded = jit(jax.shard_map(local, mesh=mesh, in_specs=(spread,), out_specs=spread))(many)
    for i in range(2):
        close(pick(sharded, i), one(pick(many, i)))


# ------------------------------------------------------------------------------ refusals


def test_refusals_name_the_argument():
    members = population()
    with pytest.raises(ValueError, match=r"uniform: every leaf of `members` needs the same"):
        merge.uniform(members | {"b": jnp.zeros((5, 2))})
    with pytest.raises(TypeError, match=r"uniform: .*`members` must be a real floating-point"):
        merge.uniform(members | {"b": jnp.zeros((6, 2), int)})
    with pytest.raises(ValueError, match=r"uniform: `mask` must be bool\[6\]"):
        merge.uniform(members, jnp.ones(6))
    with pytest.raises(ValueError, match=r"greedy: `ties` must be one of 'add', 'discard'"):
        merge.greedy(members, smooth, ties="keep")
    with pytest.raises(TypeError, match=r"greedy: `score` must return a real scalar"):
        merge.greedy(members, lambda params: params["b"])
    with pytest.raises(ValueError, match=r"greedy: `scores` must be one number per member"):
        merge.greedy(members, smooth, scores=jnp.zeros(5))
    with pytest.raises(ValueError, match=r"learned: `per` must be one of"):
        merge.learned(members, cross_entropy, held_out(2), per="layer")
    with pytest.raises(ValueError, match=r"mix: `mixing` must be one array \[6\]"):
        merge.mix(members, jnp.zeros(5))
