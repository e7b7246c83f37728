"""Score-function gradients against the sum over all outcomes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import error, jit

import hyperjax as hj

KEY = jax.random.key(0)
SPLIT = hj.Split(jnp.zeros(1), None)
LOGITS = {"a": jnp.asarray([0.3, -0.5, 0.2]), "b": jnp.asarray([[0.1, -0.4], [0.6, 0.0]])}


def outcomes(logits):
    """All outcomes of the categorical LOGITS, their probabilities and d log p, in numpy."""
    tables = [logits["a"], *logits["b"]]
    tables = [np.exp(t) / np.sum(np.exp(t)) for t in map(np.asarray, tables)]
    for x in itertools.product(*(range(len(t)) for t in tables)):
        p = np.prod([t[i] for t, i in zip(tables, x, strict=True)])
        slope = [np.eye(len(t))[i] - t for t, i in zip(tables, x, strict=True)]
        yield x, p, {"a": slope[0], "b": np.stack(slope[1:])}


def cost(x) -> jax.Array:
    """Of a choice {"a": [], "b": [2]}: no sum of parts, and far from zero."""
    return 10.0 + (x["a"] - 1.3) ** 2 * (1 + x["b"][0]) - 0.7 * x["b"][1] * x["a"]


def direct(value, distribution, **options) -> hj.Estimator:
    return hj.evolution.score_function(
        lambda x, carry, batches: (carry, carry),
        lambda params, x, batch: value(x),
        lambda params, x: params,
        distribution,
        **({"key": KEY, "samples": 3} | options),
    )


def first(estimator: hj.Estimator, h):
    return estimator.estimate(h, estimator.init(jnp.zeros(()), h), SPLIT)[0]


def many(make, h, count: int, seed: int = 1):
    keys = jax.random.split(jax.random.key(seed), count)
    return jit(jax.vmap(lambda key: first(make(key), h)))(keys)


def test_categorical_is_its_table():
    d = hj.evolution.categorical()
    for x, p, slope in outcomes(LOGITS):
        drawn = {"a": jnp.asarray(x[0]), "b": jnp.asarray(x[1:])}
        value, grad = jax.value_and_grad(d.log_prob)(LOGITS, drawn)
        assert error(value, np.log(p)) < 1e-14
        assert error(grad, slope) < 1e-14
    count = 4000
    draws = jax.vmap(d.sample, in_axes=(0, None))(jax.random.split(KEY, count), LOGITS)
    assert {x.dtype for x in jax.tree.leaves(draws)} == {jnp.dtype("int32")}
    for x, p, _ in outcomes(LOGITS):
        hits = (draws["a"] == x[0]) & np.all(draws["b"] == np.asarray(x[1:])[None], axis=1)
        # Twelve outcomes; one of them wrong by chance: 1e-4.
        assert abs(hits.mean() - p) < 4.5 * np.sqrt(p / count)


def test_bernoulli_is_its_sigmoid():
    d = hj.evolution.bernoulli()
    logits = jnp.asarray([0.7, -1.2])
    on = 1 / (1 + np.exp(-np.asarray(logits)))
    for x in itertools.product((0.0, 1.0), repeat=2):
        p = np.prod(np.where(x, on, 1 - on))
        assert error(d.log_prob(logits, jnp.asarray(x)), np.log(p)) < 1e-14
        assert error(jax.grad(d.log_prob)(logits, jnp.asarray(x)), np.asarray(x) - on) < 1e-14
    draws = jax.vmap(d.sample, in_axes=(0, None))(jax.random.split(KEY, 4000), logits)
    assert draws.dtype == logits.dtype
    assert np.all((draws == 0) | (draws == 1))
    assert np.all(np.abs(draws.mean(0) - on) < 4.5 * 0.5 / np.sqrt(4000))


def test_mean_over_all_outcomes_is_the_gradient_and_the_standard_error_is_true():
    # Two options and three samples: eight joint outcomes, each met among the keys. Weighed by their
    # probabilities they give mean and variance of the estimator, with no error of chance.
    logits, scores = jnp.asarray([0.4, -0.3]), np.asarray([5.0, 7.5])
    value = lambda i: jnp.asarray(scores)[i]
    result = many(lambda key: direct(value, hj.evolution.categorical(), key=key), logits, 400)
    on = np.exp(logits) / np.sum(np.exp(logits))
    joint, index = np.unique(np.asarray(result.info.sampled), axis=0, return_index=True)
    assert len(joint) == 8  # the rarest has 3 %: missing in 400 draws 3e-6
    p = np.prod(on[joint], axis=1)
    assert abs(p.sum() - 1) < 1e-14
    grads = np.asarray(result.grad)[index]
    mean = p @ grads
    exact = sum(on[i] * scores[i] * (np.eye(2)[i] - on) for i in (0, 1))
    assert error(mean, exact) < 1e-13
    variance = p @ (grads - mean[None]) ** 2
    told = np.asarray(result.info.standard_error)[index]
    assert error(p @ told**2, variance) < 1e-13
    assert error(p @ np.asarray(result.value)[index], on @ scores) < 1e-14
    np.testing.assert_array_equal(result.info.scores, scores[np.asarray(result.info.sampled)])


def test_leave_one_out_is_unbiased_and_below_the_variance_without_a_baseline():
    count, samples = 2000, 3
    estimate = lambda key: direct(cost, hj.evolution.categorical(), key=key, samples=samples)
    grads = many(estimate, LOGITS, count).grad
    flat = lambda tree: np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])])
    grads = np.stack([flat(jax.tree.map(lambda g, i=i: g[i], grads)) for i in range(count)])
    terms = [
        (p, float(cost({"a": x[0], "b": np.asarray(x[1:])})), flat(slope))
        for x, p, slope in outcomes(LOGITS)
    ]
    exact = sum(p * c * g for p, c, g in terms)
    spread = grads.std(0, ddof=1)
    # Seven numbers, 4.5 standard errors: a false alarm at one seed in 20,000.
    assert np.all(np.abs(grads.mean(0) - exact) < 4.5 * spread / np.sqrt(count))
    plain = sum(p * (c * g - exact) ** 2 for p, c, g in terms) / samples  # in closed form
    assert np.all(spread**2 < plain / 5)


def test_a_diverged_sample_is_left_out():
    logits, scores = jnp.asarray([0.4, -0.3, 0.1]), np.asarray([5.0, np.nan, 7.5])
    value = lambda i: jnp.asarray(scores)[i]
    make = lambda key: direct(value, hj.evolution.categorical(), key=key, samples=4)
    result = many(make, logits, 200)
    on = np.exp(logits) / np.sum(np.exp(logits))
    left = set()
    for drawn, grad, told, lost, mean in zip(
        np.asarray(result.info.sampled),
        np.asarray(result.grad),
        np.asarray(result.info.standard_error),
        np.asarray(result.info.diverged),
        np.asarray(result.value),
        strict=True,
    ):
        kept = drawn[drawn != 1]
        left.add(len(kept))
        assert lost == 4 - len(kept)
        if len(kept) < 2:
            assert np.all(np.isnan(grad)) and np.all(np.isnan(told))
            continue
        c, n = scores[kept], len(kept)
        baseline = (c.sum() - c) / (n - 1)
        terms = (c - baseline)[:, None] * (np.eye(3)[kept] - on[None])
        np.testing.assert_allclose(grad, terms.mean(0), atol=1e-13)
        np.testing.assert_allclose(mean, c.mean(), rtol=1e-14)
        assert np.all(np.isfinite(told))
    assert {1, 2, 3, 4} <= left


@pytest.mark.parametrize("bad", [[1], [0, 2], [0, 1, 2]])
def test_a_diverged_sample_hands_nothing_on(bad):
    """The carry counts the batches and adds the outcomes; a diverged one adds a NaN."""

    def response(x, carry, batches):
        step = jnp.where(jnp.isin(x, jnp.asarray(bad)), jnp.nan, x)
        params = carry[0] + step
        return params, (params, carry[1] + 1)

    estimator = hj.evolution.score_function(
        response,
        lambda params, x, batch: params,
        lambda params, x: (params, jnp.int32(0)),
        hj.evolution.categorical(),
        key=KEY,
        samples=3,
    )
    logits = jnp.zeros(3)

    def body(state, _):
        estimate, after = estimator.estimate(logits, state, SPLIT)
        return after, (state.carry, after.carry, estimate.info)

    state = estimator.init(jnp.zeros(()), logits)
    _, (before, after, info) = jit(lambda s: jax.lax.scan(body, s, None, length=60))(state)
    sound = np.isfinite(info.scores)
    some = sound.any(axis=1)
    assert some.any() == (len(bad) < 3) and not sound[:, 0].all() and not some.all()
    first = np.take_along_axis(np.asarray(info.scores), sound.argmax(1)[:, None], axis=1)[:, 0]
    np.testing.assert_array_equal(after[0], np.where(some, first, before[0]))
    np.testing.assert_array_equal(after[1], before[1] + some)


def test_all_samples_alike_have_no_gradient():
    result = jit(lambda h: first(direct(lambda i: 3.0 + 0.0 * i, hj.evolution.categorical()), h))
    result = result(jnp.zeros(3))
    assert np.all(result.grad == 0)
    assert np.all(result.info.standard_error == 0)


def test_tuner_finds_the_best_switches():
    # Which of four features to use, one bit each, where a ridge fit decides: the first two matter.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 4)))
    y = x @ jnp.asarray([1.0, -1.0, 0.0, 0.0]) + 0.1 * jnp.asarray(rng.normal(size=40))

    def fit(gates, carry, batches):
        a = x * gates[None]
        return jnp.linalg.solve(a.T @ a + 0.1 * jnp.eye(4), a.T @ y), carry

    score = lambda w, gates, batch: jnp.mean((x * gates[None] @ w - y) ** 2) + 0.1 * gates.sum()
    options = {"key": KEY, "samples": 8}
    e = hj.evolution.score_function(fit, score, lambda w, g: w, hj.evolution.bernoulli(), **options)
    tuner = hj.tune(e, optax.adam(0.1))
    splits = hj.Split(jnp.zeros((150, 1)), jnp.zeros(150))
    state, metrics = jit(lambda h: hj.run(tuner, tuner.init(jnp.zeros(4), h), splits))(jnp.zeros(4))
    gates = np.asarray(list(itertools.product((0.0, 1.0), repeat=4)))
    best = gates[np.argmin([score(fit(jnp.asarray(g), 0, 0)[0], jnp.asarray(g), 0) for g in gates])]
    np.testing.assert_array_equal(best, [1, 1, 0, 0])
    np.testing.assert_array_equal(state.hparams > 0, best > 0)
    assert metrics.value[-10:].mean() < metrics.value[:10].mean()


def test_own_distribution():
    # The mean of a normal: E x^2 has the gradient 2 m. A score that only sees integers.
    normal = hj.evolution.Distribution(
        lambda key, m: m + jax.random.normal(key, (), m.dtype), lambda m, x: -((x - m) ** 2) / 2
    )
    m = jnp.asarray(1.5)
    grads = many(lambda key: direct(jnp.square, normal, key=key, samples=50), m, 500).grad
    assert abs(grads.mean() - 3) < 4.5 * grads.std() / np.sqrt(500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "`samples` must be an integer >= 2; got 1"),
        ({"chunk": 0}, "`chunk` must be an integer >= 1; got 0"),
        ({"key": jax.random.split(KEY)}, "`key` must be one typed PRNG key"),
        ({"distribution": None}, "`distribution` must have functions `sample` and `log_prob`"),
    ],
)
def test_refusals(options, message):
    options = {"distribution": hj.evolution.categorical()} | options
    with pytest.raises((TypeError, ValueError), match=f"score_function: {message}"):
        direct(cost, **options)
