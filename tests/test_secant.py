"""The population hypergradient: exact on quadratics, whatever the bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import error, jit

import hyperjax as hj
from hyperjax import _fan_out

SIZE, DIM = 8, 3


@functools.cache
def quadratic():
    """(score, gradient at `h`, its true gradient, offsets [SIZE, DIM] of mean zero)."""
    rng = np.random.default_rng(0)
    slope, root = rng.normal(size=DIM), rng.normal(size=(DIM, DIM))
    hessian = root + root.T
    score = lambda h: 2.0 + h @ slope + ((h @ hessian) * h).sum(-1) / 2
    gradient = lambda h: slope[None] + h @ hessian
    offsets = rng.normal(size=(SIZE, DIM))
    return score, gradient, offsets - offsets.mean(0)


def tree(x):
    """[P, DIM] as leaves of two shapes."""
    x = jnp.asarray(x)
    return {"a": x[:, 0], "b": x[:, 1:]}


def vector(t) -> np.ndarray:
    return np.concatenate([np.ravel(t["a"]), np.ravel(t["b"])])


def at(bias: float | np.ndarray = 0.0, noise=0.0, seed=1, size=1.0):
    """Replicas around `centre`: (scores, hparams, grads, true gradient)."""
    score, gradient, offsets = quadratic()
    rng = np.random.default_rng(seed)
    centre = np.asarray([[0.3, -0.2, 0.5]])
    h = centre + size * offsets
    scores = score(h) + noise * rng.normal(size=SIZE)
    return jnp.asarray(scores), tree(h), tree(gradient(h) + bias), gradient(centre)[0]


BIAS = np.asarray([[0.7, -1.5, 0.4]])


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_exact_for_a_quadratic_whatever_bias_and_spread(size):
    scores, h, g, truth = at(BIAS, size=size)
    grad, info = hj.secant_gradient(scores, h, g)
    # Differences of scores near 2 have 16 digits, and are divided by the spread.
    tolerance = 1e-12 * max(size, 1 / size)
    np.testing.assert_allclose(vector(grad), truth, atol=tolerance)
    np.testing.assert_allclose(vector(info.correction), -BIAS[0], atol=tolerance)
    assert info.share > 0.999999
    # Neither part alone is: the one by the bias, the other by curvature.
    np.testing.assert_allclose(vector(info.first_order), truth + BIAS[0], atol=1e-11 * size + 1e-12)
    if size >= 1:
        assert np.abs(vector(info.secant) - truth).max() > 0.1


def test_the_secant_is_least_squares():
    scores, h, g, _ = at(BIAS, noise=0.3)
    _, info = hj.secant_gradient(scores, h, g)
    rows = np.column_stack([np.asarray(h["a"]), np.asarray(h["b"]), np.ones(SIZE)])
    expected = np.linalg.lstsq(rows, np.asarray(scores), rcond=None)[0][:DIM]
    np.testing.assert_allclose(vector(info.secant), expected, rtol=1e-10)


def test_the_share_is_that_of_the_f_statistic():
    # By hand: regress what the trapezoidal rule leaves, in numpy with an intercept.
    scores, h, g, _ = at(BIAS, noise=1.0)
    grad, info = hj.secant_gradient(scores, h, g)
    x, own = (np.column_stack([np.asarray(t["a"]), np.asarray(t["b"])]) for t in (h, g))
    d = x - x.mean(0)
    left = np.asarray(scores) - (d * (own + own.mean(0)) / 2).sum(1)
    rows = np.column_stack([d, np.ones(SIZE)])
    slope, residual, *_ = np.linalg.lstsq(rows, left, rcond=None)
    variance = residual[0] / (SIZE - 1 - DIM)
    f = ((d @ slope[:DIM]) ** 2).sum() / DIM / variance
    np.testing.assert_allclose(info.noise, np.sqrt(variance), rtol=1e-10)
    np.testing.assert_allclose(info.share, max(0, 1 - 1 / f), rtol=1e-9)
    assert 0 < info.share < 1
    # Known noise at which F is 2 / 3: nothing, and never less than nothing.
    known = np.sqrt(((d @ slope[:DIM]) ** 2).sum() / 2)
    assert hj.secant_gradient(scores, h, g, noise=known)[1].share == 0
    expected = own.mean(0) + info.share * slope[:DIM]
    np.testing.assert_allclose(vector(grad), expected, rtol=1e-9)


def test_without_information_it_is_first_order():
    # Known noise that swamps the scores; and equal hyperparameters, which span nothing.
    scores, h, g, _ = at(BIAS)
    grad, info = hj.secant_gradient(scores, h, g, noise=1e6)
    assert info.share == 0
    np.testing.assert_array_equal(vector(grad), vector(info.first_order))
    assert info.rank == DIM
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), h)
    grad, info = hj.secant_gradient(scores, same, g)
    assert info.share == 0 and info.rank == 0
    grad, info = hj.secant_gradient(scores, same, g, noise=0.0)  # what would be applied is nothing
    np.testing.assert_allclose(vector(grad), vector(jax.tree.map(lambda x: x.mean(0), g)))


@functools.cache
def errors(bias: float, noise: float) -> dict:
    """Root mean squares over 2,000 draws of the noise of scores."""
    truth = at()[3]

    def one(key):
        scores, h, g, _ = at(bias * BIAS)
        grad, info = hj.secant_gradient(scores + noise * jax.random.normal(key, (SIZE,)), h, g)
        parts = {"both": grad, "secant": info.secant, "first": info.first_order}
        flat = lambda t: jnp.concatenate([jnp.ravel(t["a"]), jnp.ravel(t["b"])])
        return {name: jnp.sum((flat(t) - truth) ** 2) for name, t in parts.items()}

    keys = jax.random.split(jax.random.key(0), 2000)
    return {name: float(jnp.sqrt(x.mean())) for name, x in jit(jax.vmap(one))(keys).items()}


def test_where_it_beats_both_and_where_not():
    # Bias well above the noise of a slope: both parts are far worse.
    assert errors(1.0, 0.1)["both"] < 0.2 * min(errors(1.0, 0.1)[k] for k in ("secant", "first"))
    # No bias: nothing beats first order, which is exact; shrinking halves the price, or better.
    assert errors(0.0, 1.0)["first"] < 1e-12
    assert 0 < errors(0.0, 1.0)["both"] < 0.8 * errors(0.0, 1.0)["secant"]
    # Noise that drowns the bias: at most the price of looking.
    assert errors(0.1, 3.0)["both"] < errors(0.1, 3.0)["secant"]
    # More noise, more error: it is not exact by accident.
    assert errors(1.0, 0.1)["both"] < errors(1.0, 0.3)["both"] < errors(1.0, 1.0)["both"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_diverged_replicas_are_left_out(bad):
    scores, h, g, _ = at(BIAS)
    scores = scores.at[2].set(bad)
    g = {"a": g["a"].at[5].set(bad), "b": g["b"]}
    grad, info = hj.secant_gradient(scores, h, g)
    np.testing.assert_array_equal(info.diverged, np.isin(np.arange(SIZE), [2, 5]))
    keep = [i for i in range(SIZE) if i not in (2, 5)]
    rest = lambda t: jax.tree.map(lambda x: x[jnp.asarray(keep)], t)
    expected, _ = hj.secant_gradient(scores[jnp.asarray(keep)], rest(h), rest(g))
    np.testing.assert_allclose(vector(grad), vector(expected), atol=1e-12)
    # Fewer than D + 2 left: no noise can be told, and the correction is dropped.
    few = scores.at[jnp.asarray([0, 1])].set(bad)
    grad, info = hj.secant_gradient(few, h, g)
    assert info.share == 0 and np.isfinite(vector(grad)).all()
    grad, _ = hj.secant_gradient(jnp.full(SIZE, bad), h, g)
    assert np.isnan(vector(grad)).all()


def test_what_offsets_do_not_span_is_first_order():
    # The second and third vary together, by the same: only their sum is seen, and shared out.
    _, gradient, offsets = quadratic()
    offsets = offsets[:, [0, 1, 1]]
    g = gradient(offsets) + BIAS
    mean = g.mean(0)
    scores = 2.0 + (offsets * (g + mean) / 2).sum(1) - offsets @ BIAS[0]
    grad, info = hj.secant_gradient(*map(jnp.asarray, (scores, offsets, g)))
    assert info.rank == 2
    both = BIAS[0, 1:].mean()
    np.testing.assert_allclose(grad, mean - [BIAS[0, 0], both, both], atol=1e-12)


def test_two_replicas_of_known_noise_are_a_difference_quotient():
    # L = h^2 at 1 -+ 0.5 with gradients wrong by 3; a third replica is lost.
    h = jnp.asarray([0.5, 1.5, 7.0])
    grad, info = hj.secant_gradient((h**2).at[2].set(jnp.nan), h, 2 * h + 3, noise=0.0)
    found = [grad, info.secant, info.first_order, info.share]
    np.testing.assert_allclose(found, [2.0, 2.0, 5.0, 1.0], rtol=1e-14)
    # Noise as large as what there is to explain, (1.5^2 + 1.5^2): nothing is applied.
    grad, info = hj.secant_gradient(h[:2] ** 2, h[:2], 2 * h[:2] + 3, noise=4.5**0.5)
    assert (grad, info.share) == (5.0, 0.0)


def test_half_precision_stays():
    scores, h, g, truth = at(BIAS)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (h, g))
    grad, _ = hj.secant_gradient(scores.astype(jnp.float32), *half)
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype(jnp.bfloat16)}
    assert np.linalg.norm(vector(grad) - truth) < 0.1 * np.linalg.norm(BIAS)  # of 8 bits


def test_float32_vmap_and_jit():
    scores, h, g, _ = at(BIAS, noise=0.1)
    small = jax.tree.map(lambda x: x.astype(jnp.float32), (scores, h, g))
    grad, _ = hj.secant_gradient(*small)
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype(jnp.float32)}
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (scores, h, g))
    rows, _ = jit(jax.vmap(hj.secant_gradient))(*many)
    for i in range(2):
        one, _ = hj.secant_gradient(*jax.tree.map(lambda x, i=i: x[i], many))
        assert error(jax.tree.map(lambda x, i=i: x[i], rows), one) < 1e-12


def test_refusals():
    scores, h, g, _ = at()
    few = jax.tree.map(lambda x: x[:4], (scores, h, g))
    with pytest.raises(ValueError, match=r"4 replicas are too few .* 3 slopes; take 5"):
        hj.secant_gradient(*few)
    hj.secant_gradient(*few, noise=0.1)
    with pytest.raises(ValueError, match=r"`scores` must be \[P\]"):
        hj.secant_gradient(scores[:5], h, g)
    with pytest.raises(ValueError, match="`grads` must have the structure"):
        hj.secant_gradient(scores, h, {"a": g["a"]})
    with pytest.raises(ValueError, match="`size` must be an integer >= 2"):
        hj.secant(estimator(problems.ridge()), jax.random.key(0), size=1, width=0.1)
    around = lambda width: hj.secant(pulled(), jax.random.key(0), size=8, width=width)
    with pytest.raises(ValueError, match="`width` must be a finite number, >= 0; got -1"):
        around(-1.0).init(jnp.zeros(()), jnp.zeros(2))
    with pytest.raises(ValueError, match="`width` must be a number, or one per leaf"):
        around({"a": 0.1}).init(jnp.zeros(()), jnp.zeros(2))


# ---------------------------------------------------------------------------- an estimator


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_mirrored_offsets_have_no_odd_moments(size):
    like = {"a": jnp.zeros(()), "b": jnp.zeros((2, 2), jnp.float32)}
    drawn = _fan_out.mirrored(jax.random.key(0), size, like)
    assert drawn["b"].shape == (size, 2, 2) and drawn["b"].dtype == jnp.float32
    d = np.column_stack([np.asarray(x).reshape(size, -1) for x in jax.tree.leaves(drawn)])
    places = np.linspace(-1, 1, size) if size > 1 else np.zeros(1)
    np.testing.assert_allclose(np.sort(d, axis=0), np.tile(places[:, None], 5), atol=1e-7)
    third = np.einsum("pi,pj,pk->ijk", d, d, d)
    np.testing.assert_allclose(third, 0, atol=1e-12)  # opposite numbers, added in some order
    if size == 16:  # an order and signs of its own for every scalar
        assert len({tuple(np.argsort(abs(column[:8]))) for column in d.T}) == 5
        assert len({tuple(np.sign(column[:8])) for column in d.T}) == 5


def estimator(p: problems.Problem) -> hj.Estimator:
    return hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)


def test_truncation_is_corrected_on_ridge():
    """One step of sixty differentiated, with the derivative of the whole found by the secants."""
    p = problems.ridge()
    truth = problems.ridge_answers(p.hparams, p.split).gradient
    build = lambda response: hj.hypergradient(response, p.score, p.inner.init)
    short = build(hj.unroll(p.inner.step, truncate=1))
    gaps = {}
    for width in (0.1, 0.05):
        around = hj.secant(short, jax.random.key(0), size=16, width=width)
        got, _ = jit(around.estimate)(p.hparams, around.init(p.params, p.hparams), p.split)
        gaps[width] = np.linalg.norm(got.grad - truth)
        first = np.linalg.norm(got.info.first_order - truth)
        assert gaps[width] < 0.1 * first
        # (Without noise, secants alone are as good: their error is of the same order.)
        assert np.linalg.norm(got.info.secant - truth) < 0.1 * first
    # What is left is of second order in the spread: a quarter at half of it.
    np.testing.assert_allclose(gaps[0.1] / gaps[0.05], 4, rtol=0.2)


@pytest.mark.parametrize("every", [None, 2])
def test_in_a_tuner_types_stay_and_seeds_vmap(every):
    p = problems.ridge(steps=3)
    inside = hj.hypergradient(hj.unroll(p.inner.step), p.score, p.inner.init)
    around = hj.secant(inside, jax.random.key(0), size=8, width=0.1, every=every)
    tuner = hj.tune(around, optax.sgd(0.1))
    splits = problems.repeat(p.split, 4)
    go = jit(lambda h: hj.run(tuner, tuner.init(p.params, h), splits))
    starts = jnp.stack([p.hparams, p.hparams + 0.1])
    many, metrics = jit(jax.vmap(lambda h: hj.run(tuner, tuner.init(p.params, h), splits)))(starts)
    for i in range(2):
        one, expected = go(starts[i])
        assert error(jax.tree.map(lambda x, i=i: x[i], many.hparams), one.hparams) < 1e-10
        assert error(metrics.value[i], expected.value) < 1e-12
    after, first = go(starts[1])[0].carry, tuner.init(p.params, p.hparams).carry
    assert list(map(jax.typeof, jax.tree.leaves(after))) == list(
        map(jax.typeof, jax.tree.leaves(first))
    )
    same = np.array_equal(after.offsets, tuner.init(p.params, starts[1]).carry.offsets)
    assert same == (every is None)
    spread = np.ptp(np.asarray(after.members.params), axis=0).max()
    assert spread < 1e-12 if every == 2 else spread > 1e-6  # the fourth estimate converged


def pulled() -> hj.Estimator:
    """Towards the split, with a carry that counts."""
    return hj.Estimator(
        lambda params, h: params,
        lambda h, c, split: (hj.Estimate(((h - split) ** 2).sum(), 2 * (h - split) + 1, ()), c + 1),
    )


def test_in_a_shard_map():
    # Hyperparameters of every device, and a carry that is the same on all to begin with.
    around = hj.secant(pulled(), jax.random.key(0), size=6, width=0.1, every=1)

    def go(h):
        def step(carry, goal):
            got, carry = around.estimate(h[0], carry, goal)
            return carry, got.grad

        return jax.lax.scan(step, around.init(jnp.zeros(()), h[0]), jnp.arange(3.0))[1][None]

    starts = jnp.arange(16.0).reshape(8, 2)
    lane = jax.sharding.PartitionSpec("lane")
    spread = jax.shard_map(go, mesh=problems.mesh("lane"), in_specs=lane, out_specs=lane)
    expected = 2 * (starts[:, None] - jnp.arange(3.0)[None, :, None])
    np.testing.assert_allclose(jit(spread)(starts), expected, atol=1e-9)


def test_replicas_that_diverge_go_on_from_others():
    value = lambda h, c: jnp.where(h[0] > 0.05, jnp.nan, (h**2).sum())
    inside = hj.Estimator(
        lambda params, h: params,
        lambda h, c, split: (
            hj.Estimate(value(h, c), 2 * h, ()),
            c + jnp.where(h[0] > 0.05, jnp.nan, 1),
        ),
    )
    around = hj.secant(inside, jax.random.key(0), size=8, width=0.1)
    h = jnp.zeros(2)
    got, carry = around.estimate(h, around.init(jnp.zeros(()), h), hj.Split((), ()))
    assert got.info.diverged.sum() == 2  # offsets of 0.1 (1, 5/7, 3/7, ...) above 0.05
    assert np.isfinite(got.grad).all() and np.isfinite(got.value)
    np.testing.assert_array_equal(carry.members, np.ones(8))
