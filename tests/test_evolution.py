"""Evolution strategies: unbiased for what they say, with the variance they say."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import error, jit

import hyperjax as hj

# Statistical tests have fixed seeds. Where they allow 4.5 standard errors, a right estimator would
# fail with one seed in 150,000 per number compared.
SIGMAS = 4.5

KEY = jax.random.key(0)
PERSISTENT = {"persistent": hj.evolution.persistent, "noise_reuse": hj.evolution.noise_reuse}
NOTHING = hj.Split(jnp.zeros(1), None)


def direct(value: Callable, make: Callable = hj.evolution.antithetic, **options) -> hj.Estimator:
    """An estimator of a score that depends on hparams alone."""
    respond = lambda h, carry, batches: (carry, carry)
    score = lambda params, h, batch: value(h)
    return make(respond, score, lambda params, h: params, **({"key": KEY, "pairs": 4} | options))


def first(estimator: hj.Estimator, h):
    return estimator.estimate(h, estimator.init(jnp.zeros(()), h), NOTHING)[0]


def once(estimator: hj.Estimator, h):
    return jit(lambda h: first(estimator, h))(h)


def many(make: Callable, h, count: int, seed: int = 1):
    """One estimate for each of `count` keys, of the estimators that `make` makes of them."""
    keys = jax.random.split(jax.random.key(seed), count)
    return jit(jax.vmap(lambda key: first(make(key), h)))(keys)


def curved(h) -> jax.Array:
    return jnp.sum(jnp.sin(h["a"]) + h["a"] ** 4) + h["b"] ** 3 * h["a"][0]


CURVED = {"a": jnp.asarray([0.3, -0.7]), "b": jnp.asarray(0.5)}
SCALE = {"a": np.asarray([0.1, 0.2]), "b": 0.4}


# ---------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", ["antithetic", "spsa", "spsa, one side"])
def test_estimate_is_its_formula_at_the_points_it_looked_at(name, chunk):
    seen = []

    def looked(h):
        note = lambda x: seen.extend(np.reshape(x, (-1, 3))) or np.zeros(np.shape(x)[:-1])
        row = jnp.concatenate([h["a"], h["b"][None]])
        kind = jax.ShapeDtypeStruct((), row.dtype)
        return curved(h) + jax.pure_callback(note, kind, row, vmap_method="expand_dims")

    options = {
        "antithetic": {"sigma": SCALE},
        "spsa": {"make": hj.evolution.spsa, "radius": SCALE},
        "spsa, one side": {"make": hj.evolution.spsa, "radius": SCALE, "sides": 1},
    }[name]
    result = jax.block_until_ready(once(direct(looked, chunk=chunk, **options), CURVED))

    points = np.asarray(seen)
    center = np.asarray([0.3, -0.7, 0.5])
    away = np.any(points != center[None], axis=1)
    assert np.sum(~away) == 1  # the run that gives the value and the carry
    scale = np.asarray([0.1, 0.2, 0.4])
    z = (points[away] - center[None]) / scale[None]
    value = lambda p: np.sum(np.sin(p[:2]) + p[:2] ** 4) + p[2] ** 3 * p[0]
    scores = np.asarray([value(p) for p in points[away]])
    if name == "spsa, one side":
        terms = (scores - value(center))[:, None] * z / scale[None]
    else:
        np.testing.assert_allclose(z[:4], -z[4:], rtol=1e-12)
        terms = (scores[:4] - scores[4:])[:, None] / 2 * z[:4] / scale[None]
    if name != "antithetic":
        np.testing.assert_allclose(np.abs(z), 1, rtol=1e-12)
    tree = lambda x: {"a": x[:2], "b": x[2]}
    # Rounding: eight scores of order one, divided by a scale of 0.1.
    assert error(result.value, value(center)) < 1e-14
    assert error(result.grad, tree(terms.mean(0))) < 1e-13
    spread = terms.std(0, ddof=1) / np.sqrt(len(terms))
    assert error(result.info.standard_error, tree(spread)) < 1e-13
    assert error(result.info.smoothed, scores.mean()) < 1e-14
    assert result.info.diverged == 0


def quadratic(h) -> jax.Array:
    curvature = jnp.asarray([[2.0, 0.5, 0.0], [0.5, -1.0, 0.3], [0.0, 0.3, 0.5]])
    return 0.5 * h @ curvature @ h + h @ jnp.asarray([1.0, -2.0, 0.5])


SLOPE = jax.grad(quadratic)(jnp.asarray([0.4, -0.3, 0.8]))


@pytest.mark.parametrize("name", ["antithetic", "spsa", "spsa, one side"])
def test_quadratic_is_unbiased_and_the_standard_error_is_its_spread(name):
    h, count = jnp.asarray([0.4, -0.3, 0.8]), 3000
    make = {
        "antithetic": lambda key: direct(quadratic, sigma=0.7, key=key),
        "spsa": lambda key: direct(quadratic, hj.evolution.spsa, radius=0.7, key=key),
        "spsa, one side": lambda key: direct(
            quadratic, hj.evolution.spsa, radius=0.7, sides=1, key=key
        ),
    }[name]
    result = many(make, h, count)
    grads = np.asarray(result.grad)
    spread = grads.std(0, ddof=1)
    assert np.all(np.abs(grads.mean(0) - SLOPE) < SIGMAS * spread / np.sqrt(count))
    # Both sides are variances from 3000 draws. A mean of four terms like z^2 has kurtosis 6, so
    # that each is known to sqrt(5 / 3000) = 4 %, and their ratio to 6 %.
    predicted = np.mean(np.square(result.info.standard_error), axis=0)
    np.testing.assert_allclose(predicted, spread**2, rtol=0.25)
    if name != "spsa, one side":  # both sides see a quadratic as they see its slope
        d, dimensions = {"antithetic": (1, 3), "spsa": (-1, 3)}[name]
        expected = (dimensions + d) * np.sum(SLOPE**2) / 4
        total = np.mean(np.sum((grads - np.asarray(SLOPE)[None]) ** 2, axis=1))
        assert abs(total / expected - 1) < 0.2


@pytest.mark.parametrize("sides", [1, 2])
def test_mean_of_spsa_over_all_signs_is_the_central_difference(sides):
    h, radius = jnp.asarray([0.4, -0.3, 0.8]), 0.7
    estimate = lambda key: direct(
        quadratic, hj.evolution.spsa, radius=radius, sides=sides, key=key, pairs=1
    )
    grads = np.asarray(many(estimate, h, 128).grad)
    # With one pair the signs of the entries are those of the draw, up to one common sign; both
    # sides give the same to z and -z.
    outcomes = np.unique(np.round(grads, 12), axis=0)
    assert len(outcomes) == {1: 8, 2: 4}[sides]  # one of 8 missing in 128 draws: 3e-7
    shift = radius * np.eye(3)
    central = [(quadratic(h + e) - quadratic(h - e)) / (2 * radius) for e in shift]
    assert error(outcomes.mean(0), np.asarray(central)) < 1e-11  # rounded to 1e-12 above


def test_one_hyperparameter_has_its_central_difference_from_one_pair():
    f = lambda h: jnp.sum(jnp.exp(h))
    result = once(direct(f, hj.evolution.spsa, radius=0.1, pairs=1), jnp.asarray(0.3))
    assert error(result.grad, (np.exp(0.4) - np.exp(0.2)) / 0.2) < 1e-13
    assert np.isinf(result.info.standard_error)  # nothing is known of it


def test_bias_falls_with_the_square_of_sigma():
    # E (h + s z)^4 = h^4 + 6 s^2 h^2 + 3 s^4, so that the bias is 12 s^2 h. Differences to a small
    # sigma with the same noise are 4 h s^2 times the mean of z^4, which is 3 with a standard error
    # of sqrt(96 / pairs).
    h, pairs = jnp.asarray(0.8), 20_000
    estimate = jit(lambda sigma: first(direct(lambda h: h**4, sigma=sigma, pairs=pairs), h).grad)
    sigmas = np.asarray([0.1, 0.2, 0.4])
    bias = np.asarray([estimate(s) for s in sigmas]) - estimate(1e-4)
    slope = np.polyfit(np.log(sigmas), np.log(bias), 1)[0]
    assert abs(slope - 2) < 1e-5  # sigma = 1e-4 itself is off by 1e-6 of the bias at 0.1
    assert abs(bias[-1] / (12 * 0.4**2 * 0.8) - 1) < SIGMAS * np.sqrt(96 / pairs) / 3
    assert abs(estimate(0.4) / (4 * 0.8**3) - 1) > 0.5  # a real bias


def test_ridge_is_within_the_standard_error_of_its_closed_form():
    p = problems.ridge()
    estimator = hj.evolution.antithetic(
        hj.unroll(p.inner.step), p.score, p.inner.init, key=KEY, pairs=400, sigma=1e-3, chunk=100
    )
    # The bias is of order sigma^2 = 1e-6, a thousandth of the standard error.
    estimate = jit(estimator.estimate)
    result, carry = estimate(p.hparams, estimator.init(p.params, p.hparams), p.split)
    answers = problems.ridge_answers(p.hparams, p.split)
    off = np.abs(result.grad - answers.gradient)
    assert np.all(off < SIGMAS * result.info.standard_error)
    # A linear score has the squared error (d + 1) |g|^2 / pairs. 400 terms know it to 15 %.
    total = np.sum(np.square(result.info.standard_error))
    expected = (problems.FEATURES + 1) * np.sum(answers.gradient**2) / 400
    assert abs(total / expected - 1) < 0.6
    assert error(result.value, answers.value) < 1e-12
    assert error(carry.carry.params, answers.params) < 1e-12


def test_on_a_net_it_is_the_hypergradient_up_to_noise_and_bias():
    p = problems.net(steps=3)
    options = {"key": KEY, "pairs": 100, "sigma": 1e-3}
    e = hj.evolution.antithetic(hj.unroll(p.inner.step), p.score, p.inner.init, **options)
    result, _ = jit(e.estimate)(p.hparams, e.init(p.params, p.hparams), p.split)
    exact = jit(jax.grad(problems.objective(hj.unroll(p.inner.step), p)))(p.hparams)
    for got, truth, wide in zip(
        *map(jax.tree.leaves, (result.grad, exact, result.info.standard_error)), strict=True
    ):
        assert abs(got - truth) < SIGMAS * wide


# ------------------------------------------------------------------ influence balancing
#
# Vicol et al. 2021, section 4.1, after Tallec and Ollivier 2017: s <- A s + theta v from ones, A
# with 1/2 on and above the diagonal, v = +1 (10 entries), then -1 (13), scored by (s_0 - 1)^2 / 2
# after every step. One step sees theta push s_0 up; in the long run it pulls it down: s_0 goes to
# -6 theta. s_0 is affine in theta, so that gradients have closed forms, and a quadratic score has
# the same gradient smoothed.

SIZE, POSITIVE, TIME, THETA = 23, 10, 500, 0.5
PUSH = np.where(np.arange(SIZE) < POSITIVE, 1.0, -1.0)


class Chain(NamedTuple):
    params: jax.Array


def push(state: Chain, theta, batch) -> Chain:
    del batch
    s = state.params
    return Chain((s + jnp.append(s[1:], 0.0)) / 2 + theta * jnp.asarray(PUSH))


def balance(make: Callable, **options) -> hj.Estimator:
    score = lambda s, theta, batch: (s[0] - 1) ** 2 / 2
    return make(hj.unroll(push), score, lambda params, theta: Chain(params), **options)


@functools.cache
def influence() -> tuple[np.ndarray, np.ndarray]:
    """s_0 at THETA after t steps, and what a push t steps before adds to it: [TIME] each."""
    a = (np.eye(SIZE) + np.eye(SIZE, k=1)) / 2
    powers = [np.eye(SIZE)]
    for _ in range(TIME):
        powers.append(powers[-1] @ a)
    pushed = np.asarray([p[0] @ PUSH for p in powers[:-1]])
    at_rest = np.asarray([p[0] @ np.ones(SIZE) for p in powers[1:]])
    return at_rest + THETA * np.cumsum(pushed), pushed


def episodes(estimator: Callable, count: int = 1):
    """Estimates of one whole episode at THETA for each key: [count, TIME]."""

    def one(key):
        e = estimator(key)
        theta = jnp.asarray(THETA)
        body = lambda carry, _: e.estimate(theta, carry, NOTHING)[::-1]
        return jax.lax.scan(body, e.init(jnp.ones(SIZE), theta), None, length=TIME)[1]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), count))


def test_influence_balancing():
    s, pushed = influence()
    truth = (s - 1) * np.cumsum(pushed)  # of each step's score
    assert truth.sum() > 0

    # Truncated: the gradient of one step, exactly, has the wrong sign.
    truncated = episodes(lambda key: balance(hj.hypergradient))
    assert error(truncated.grad[0], (s - 1) * pushed[0]) < 1e-13
    assert np.asarray(truncated.grad).sum() < 0

    # For normal z, z'M z has the variance 2 tr(S^2), S the symmetric part. Of PES summed over the
    # episode, M[i, j] is the sum over t >= i, j of (s_t - 1) pushed[t - i]; for NRES all z are one.
    # At one t it is (effect[t]'z) (sum of the z so far), or (truth[t] z) z.
    lag = np.subtract.outer(np.arange(TIME), np.arange(TIME))
    effect = np.where(lag >= 0, pushed[np.maximum(lag, 0)], 0) * (s - 1)[:, None]  # [t, i]
    m = effect.T @ (lag >= 0)
    assert error(np.trace(m), truth.sum()) < 1e-13  # the mean of z'M z
    grown = np.sum(effect**2, axis=1) * (1 + np.arange(TIME)) + truth**2
    summed = {"persistent": np.sum((m + m.T) ** 2) / 2, "noise_reuse": 2 * truth.sum() ** 2}
    each = {"persistent": grown, "noise_reuse": 2 * truth**2}
    count, pairs = 400, 5
    for name in PERSISTENT:
        options = {"pairs": pairs, "sigma": 0.1, "horizon": TIME}
        estimator = functools.partial(balance, PERSISTENT[name], **options)
        result = episodes(lambda key, e=estimator: e(key=key), count)
        assert error(result.value[0], (s - 1) ** 2 / 2) < 1e-12  # the run without perturbation
        total = np.asarray(result.grad).sum(axis=1)
        wide = SIGMAS * total.std(ddof=1) / np.sqrt(count)
        assert abs(total.mean() - truth.sum()) < wide < truth.sum() / 2  # so the sign is known
        # A mean of five terms like z^2 has kurtosis 3 + 12 / 5: 400 of them know their variance to
        # 10 %.
        np.testing.assert_allclose(total.var(ddof=1), summed[name] / pairs, rtol=0.45)
        at = np.asarray([0, 10, 100, 499])
        steps, told = np.asarray(result.grad)[:, at], result.info.standard_error[:, at]
        variance = each[name][at] / pairs
        assert np.all(np.abs(steps.mean(0) - truth[at]) < SIGMAS * np.sqrt(variance / count))
        np.testing.assert_allclose(steps.var(0, ddof=1), variance, rtol=0.45)
        np.testing.assert_allclose(np.mean(told**2, axis=0), variance, rtol=0.45)
    # Late in an episode one estimate of NRES knows more; over all of it, here, those of PES do.
    assert each["noise_reuse"][-1] < each["persistent"][-1] / 3
    assert summed["noise_reuse"] > summed["persistent"]


def test_truncated_es_has_the_sign_of_truncated_gradients():
    s, pushed = influence()
    options = {"pairs": 20, "sigma": 0.1, "key": KEY}
    result = episodes(lambda _: balance(hj.evolution.antithetic, **options))
    total, expected = np.asarray(result.grad).sum(), ((s - 1) * pushed[0]).sum()
    assert expected < 0
    # z^2 averaged over 20 pairs and 500 steps: 1.4 %.
    assert abs(total / expected - 1) < SIGMAS * np.sqrt(2 / (20 * TIME))


# ------------------------------------------------------------------------- episodes


def scan(estimator: hj.Estimator, steps: int):
    """Estimates of `adding` one after the other, from 0 at h = 2."""
    h = jnp.asarray(2.0)

    def body(carry, _):
        result, carry = estimator.estimate(h, carry, NOTHING)
        return carry, result

    return jax.lax.scan(body, estimator.init(jnp.asarray(0.0), h), None, length=steps)


def adding(make, **options):
    """Training adds h at each step to where `init` starts, at 10 h."""
    step = lambda s, h, batch: Chain(s.params + h)
    score = lambda s, h, batch: s
    init = lambda params, h: Chain(params + 10 * h)
    return make(hj.unroll(step), score, init, **options)


@pytest.mark.parametrize("make", PERSISTENT.values(), ids=PERSISTENT)
def test_episodes_end_at_the_horizon(make):
    e = adding(make, key=KEY, pairs=3, sigma=0.1, horizon=4)
    state, result = jit(lambda: scan(e, 9))()
    # 10 h + t h at h = 2, from the start again after four steps.
    expected = np.asarray([22, 24, 26, 28] * 2 + [22.0])
    assert error(result.value, expected) < 1e-14
    np.testing.assert_array_equal(state.left, [3] * 4)
    # One step into the episode the perturbation is what every particle differs by.
    carries = np.asarray(state.carries.params)
    z = np.asarray(state.noise)
    assert error(carries[1:], 22 + 11 * 0.1 * np.concatenate([z, -z])) < 1e-13


@pytest.mark.parametrize("make", PERSISTENT.values(), ids=PERSISTENT)
def test_what_init_makes_of_hparams_counts(make):
    # After t pieces the score is linear with slope 10 + t.
    count, pairs = 400, 4

    def one(key):
        e = adding(make, key=key, pairs=pairs, sigma=0.1, horizon=3)
        return scan(e, 6)[1].grad

    grads = np.asarray(jit(jax.vmap(one))(jax.random.split(KEY, count)))
    wide = grads.std(0, ddof=1) / np.sqrt(count)
    assert np.all(np.abs(grads.mean(0) - np.asarray([11, 12, 13] * 2)) < SIGMAS * wide)


@pytest.mark.parametrize("make", PERSISTENT.values(), ids=PERSISTENT)
def test_staggered_pairs_see_all_parts_of_training(make):
    # Values of the particles at a small sigma tell the age: 20 + 2 t.
    e = adding(make, key=KEY, pairs=4, sigma=1e-9, horizon=4, stagger=True)
    state, result = jit(lambda: scan(e, 9))()
    ages = np.round((np.asarray(state.carries.params) - 20) / 2).astype(int)
    np.testing.assert_array_equal(ages[1:5], [1, 2, 3, 4])
    np.testing.assert_array_equal(ages[5:], [1, 2, 3, 4])
    assert ages[0] == 1  # the own run has whole episodes
    # Once all have begun anew, each estimate sees each age once.
    assert error(result.info.smoothed[4:], np.full(5, 25.0)) < 1e-7


def test_persistent_without_a_horizon_goes_on():
    e = adding(hj.evolution.persistent, key=KEY, pairs=1, sigma=0.1, horizon=None)
    _, result = jit(lambda: scan(e, 30))()
    assert error(result.value, 22 + 2 * np.arange(30.0)) < 1e-13


def test_noise_is_kept_or_drawn_anew():
    noises = {}
    for name, make in PERSISTENT.items():
        e = adding(make, key=KEY, pairs=2, sigma=0.1, horizon=3)
        state, seen = e.init(jnp.asarray(0.0), jnp.asarray(2.0)), []
        step = jit(lambda state, e=e: e.estimate(jnp.asarray(2.0), state, NOTHING)[1])
        for _ in range(4):
            state = step(state)
            seen.append(np.asarray(state.noise))
        noises[name] = seen
    kept, gathered = noises["noise_reuse"], noises["persistent"]
    assert np.all(kept[0] == kept[1]) and np.all(kept[0] == kept[2]) and np.all(kept[3] != kept[0])
    # The same keys: both start with the same draw, and again in the next episode.
    assert np.all(gathered[0] == kept[0]) and np.all(gathered[3] == kept[3])
    assert np.all(gathered[1] != gathered[0])


# ------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    "members",
    [
        np.stack(np.meshgrid(np.arange(-8.0, 9), np.arange(-8.0, 9)), -1).reshape(-1, 2),
        1.0 * ((np.arange(1024)[:, None] >> np.arange(10)) & 1),
    ],
    ids=["integers", "masks"],
)
def test_members_at_round_numbers_draw_apart(members):
    estimator = direct(curved, sigma=0.1)
    key = lambda h: estimator.init(jnp.zeros(()), h).key
    keys = jax.random.key_data(jit(jax.vmap(key))(members))
    # 32 bits: two of 1024 would meet at one seed in 8,000.
    assert len(np.unique(np.asarray(keys), axis=0)) == len(members)


@pytest.mark.parametrize(
    "params", [jax.random.split(KEY, 300), 2**24 + jnp.arange(300)], ids=["keys", "integers"]
)
def test_members_that_start_from_keys_or_integers_draw_apart(params):
    estimator = direct(curved, sigma=0.1)
    key = lambda w: estimator.init(w, jnp.ones(())).key
    keys = jax.random.key_data(jit(jax.vmap(key))(params))
    assert len(np.unique(np.asarray(keys), axis=0)) == 300


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_diverged_run_takes_its_pair_along_and_no_other(bad):
    h = jnp.asarray([0.4, -0.3, 0.8])
    breaks = lambda h: jnp.where(h[0] > 0.45, bad, quadratic(h))
    broken = once(direct(breaks, sigma=0.05, pairs=40), h)
    # By the same noise, the pairs that stay finite are those with |z_0| < 1.
    e = direct(quadratic, sigma=0.05, pairs=40)
    now, _ = jax.random.split(e.init(jnp.zeros(()), h).key)
    (leaf,) = jax.random.split(now, 1)
    z = np.asarray(jax.random.normal(leaf, (40, 3)))
    kept = z[np.abs(z[:, 0]) < 1]
    assert broken.info.diverged == 40 - len(kept) > 5
    terms = (kept @ np.asarray(SLOPE))[:, None] * kept
    # Differences of scores of order one by 0.05: 1e-14 or so.
    assert error(broken.grad, terms.mean(0)) < 1e-12
    spread = terms.std(0, ddof=1) / np.sqrt(len(kept))
    assert error(broken.info.standard_error, spread) < 1e-12
    assert np.isfinite(broken.info.smoothed)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_when_all_diverge_the_tuner_stays_put(bad):
    h = jnp.asarray([0.4, -0.3, 0.8])
    e = direct(lambda x: jnp.where(jnp.all(x == h), 1.0, bad), sigma=0.1)
    tuner = hj.tune(e, optax.sgd(0.1))
    state, metrics = jit(tuner.step)(tuner.init(jnp.zeros(()), h), NOTHING)
    assert metrics.info.diverged == 8
    assert metrics.value == 1
    assert not metrics.finite
    assert np.all(state.hparams == h)


@pytest.mark.parametrize("make", PERSISTENT.values(), ids=PERSISTENT)
def test_a_diverged_particle_begins_anew(make):
    # Particles are lost at the second step where the score has come above a bound.
    step = lambda s, h, batch: Chain(s.params + h)
    score = lambda s, h, batch: jnp.where(s > 4.05, jnp.nan, s)
    options = {"key": KEY, "pairs": 20, "sigma": 0.1, "horizon": 9}
    e = make(hj.unroll(step), score, lambda params, h: Chain(params), **options)
    h = jnp.asarray(2.0)
    estimate = jit(lambda state: e.estimate(h, state, NOTHING))
    _, state = estimate(e.init(jnp.asarray(0.0), h))
    result, state = estimate(state)
    lost = np.asarray(state.carries.params[1:] > 4.05)
    assert result.info.diverged == lost.sum() > 3
    pair = lost[:20] | lost[20:]
    assert 3 < pair.sum() < 20
    np.testing.assert_array_equal(state.left[1:] == 0, pair)
    assert state.left[0] == 7
    assert np.isfinite(result.grad)
    after, state = estimate(state)
    np.testing.assert_array_equal(np.asarray(state.carries.params[1:21] < 3), pair)
    assert np.all(np.asarray(state.left)[1:][pair] == 8)
    # All the others, the own run too, are at 6 and above the bound.
    assert after.info.diverged == 40 - 2 * pair.sum()
    assert np.isnan(after.value)
    assert np.isfinite(after.grad) == (pair.sum() > 0)


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "`pairs` must be an integer >= 1; got 0"),
        ({"sigma": 0.0}, "`sigma` must be a finite number, positive; got 0.0"),
        ({"sigma": {"a": 0.1, "b": -1.0}}, r"`sigma\['b'\]` must be a finite number"),
        ({"sigma": np.asarray([0.1, -1.0])}, "`sigma` must be finite and positive"),
        ({"chunk": 0}, "`chunk` must be an integer >= 1; got 0"),
        ({"key": 0}, "`key` must be one typed PRNG key; got int"),
        ({"key": jnp.zeros(2, jnp.uint32)}, r"got uint32\[2\]. Pass `jax.random.key\(0\)`"),
        ({"sigma": {"a": 0.1}}, "`sigma` must be one number or have the structure of hparams"),
        ({"sigma": {"a": np.ones(3), "b": 0.1}}, r"`sigma` at \['a'\] is float64\[3\]"),
    ],
)
def test_refusals(options, message):
    with pytest.raises((ValueError, TypeError), match=f"antithetic: {message}|{message}"):
        once(direct(curved, **({"sigma": 0.1} | options)), CURVED)


def test_refusals_of_the_others():
    with pytest.raises(ValueError, match="spsa: `sides` must be one of 1, 2; got 3"):
        direct(curved, hj.evolution.spsa, radius=0.1, sides=3)
    with pytest.raises(ValueError, match="spsa: `radius` must be a finite number, positive"):
        direct(curved, hj.evolution.spsa, radius=-0.1)
    for scale in (np.array([0.1, -0.1]), jnp.asarray([0.1, jnp.inf])):
        with pytest.raises(ValueError, match="spsa: `radius` must be finite and positive"):
            direct(curved, hj.evolution.spsa, radius=scale)
    with pytest.raises(
        ValueError, match="noise_reuse: `horizon` must be an integer >= 1; got None"
    ):
        direct(curved, hj.evolution.noise_reuse, sigma=0.1, horizon=None)
    with pytest.raises(ValueError, match="persistent: `stagger` needs a `horizon`"):
        direct(curved, hj.evolution.persistent, sigma=0.1, horizon=None, stagger=True)
    with pytest.raises(TypeError, match="antithetic: `score` must return a real scalar"):
        once(direct(lambda h: h["a"], sigma=0.1), CURVED)
    with pytest.raises(TypeError, match="persistent: every leaf of `hparams` must be a real"):
        once(
            direct(lambda h: 1.0 * h, hj.evolution.persistent, sigma=0.1, horizon=2), jnp.asarray(3)
        )
