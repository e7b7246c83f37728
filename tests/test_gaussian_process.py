"""Gaussian processes against dense NumPy, finite differences, integrals and known moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from problems import jit
from scipy import integrate, special, stats

from hyperjax import _gaussian_process as gp

LENGTH = np.asarray([0.3, 0.7])


@pytest.fixture
def rows(rng):
    """Twelve rows of which nine count, their targets, and five new points."""
    mask = np.asarray([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1], bool)
    return rng.uniform(size=(12, 2)), rng.normal(size=12), mask, rng.uniform(size=(5, 2))


def dense_matern(a, b, length):
    """By Bessel functions, the definition of the family."""
    r = np.sqrt((((a[:, None] - b[None]) / length) ** 2).sum(-1))
    z = np.sqrt(5) * np.where(r == 0, 1.0, r)
    bessel = 2 ** (1 - 2.5) / special.gamma(2.5) * z**2.5 * special.kv(2.5, z)
    return np.where(r == 0, 1.0, bessel)


def kernel(a, b, length: np.ndarray | jax.Array = LENGTH):
    return gp.matern52(gp.squared_distance(jnp.asarray(a), jnp.asarray(b), jnp.asarray(length)))


def test_matern_is_the_bessel_form_of_the_euclidean_distance(rows):
    x, *_ = rows
    # 1e-12: what SciPy's Bessel function is good for
    np.testing.assert_allclose(kernel(x, x), dense_matern(x, x, LENGTH), rtol=1e-12)
    # At (1, 1), the distance is sqrt(2); the sum of distances per dimension would be 2.
    one = kernel(np.zeros((1, 2)), np.ones((1, 2)), np.ones(2))[0, 0]
    r = np.sqrt(10)
    np.testing.assert_allclose(one, (1 + r + r**2 / 3) * np.exp(-r), rtol=1e-14)


def test_matern_has_its_derivatives_where_points_coincide():
    gram = lambda x: kernel(x, x).sum()
    grad = jax.grad(gram)(jnp.ones((2, 2)))
    np.testing.assert_array_equal(grad, np.zeros((2, 2)))


def test_posterior_is_that_of_the_dense_formula(rows):
    x, y, mask, new = rows
    noise = 0.05
    fitted = gp.fit(kernel(x, x), noise, jnp.asarray(y), jnp.asarray(mask))
    mean, variance = gp.predict(fitted, kernel(new, x), jnp.ones(5), jnp.asarray(mask))
    kept, targets = x[mask], y[mask]
    covariance = dense_matern(kept, kept, LENGTH) + noise * np.eye(9)
    cross = dense_matern(new, kept, LENGTH)
    solved = np.linalg.solve(covariance, np.column_stack([targets, cross.T]))
    # 1e-9: Cholesky at a condition number of at most 9 / 0.05, and the floor of 10 N eps
    np.testing.assert_allclose(mean, cross @ solved[:, 0], rtol=1e-9)
    np.testing.assert_allclose(variance, 1 - (cross * solved[:, 1:].T).sum(1), rtol=1e-9)
    density = stats.multivariate_normal.logpdf(targets, cov=covariance)  # pyright: ignore
    np.testing.assert_allclose(fitted.likelihood, density, rtol=1e-9)


def test_rows_that_do_not_count_have_no_say(rows):
    x, y, mask, new = rows
    spoilt_x, spoilt_y = np.where(mask[:, None], x, np.nan), np.where(mask, y, np.nan)
    gram = lambda x: jnp.where(jnp.isnan(kernel(x, x)), jnp.nan, kernel(x, x))
    plain = gp.fit(gram(x), 0.05, jnp.asarray(y), jnp.asarray(mask))
    spoilt = gp.fit(gram(x), 0.05, jnp.asarray(spoilt_y), jnp.asarray(mask))
    for a, b in zip(plain, spoilt, strict=True):
        np.testing.assert_array_equal(a, b)
    one = gp.predict(plain, kernel(new, x), jnp.ones(5), jnp.asarray(mask))
    two = gp.predict(plain, kernel(new, spoilt_x), jnp.ones(5), jnp.asarray(mask))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_many_targets_at_once_are_as_one_by_one(rows, rng):
    x, _, mask, new = rows
    y, mask = jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray(mask)
    many = gp.fit(kernel(x, x), 0.1, y, mask)
    means, variance = gp.predict(many, kernel(new, x), jnp.ones(5), mask)
    for f in range(3):
        one = gp.fit(kernel(x, x), 0.1, y[:, f], mask)
        mean, same = gp.predict(one, kernel(new, x), jnp.ones(5), mask)
        np.testing.assert_allclose(means[:, f], mean, rtol=1e-12)
        np.testing.assert_allclose(many.likelihood[f], one.likelihood, rtol=1e-12)
        np.testing.assert_array_equal(variance, same)


def test_gradient_of_the_likelihood(rows):
    x, y, mask, _ = rows

    def likelihood(theta):
        gram = jnp.exp(theta[0]) * kernel(x, x, jnp.exp(theta[2:]))
        return gp.fit(gram, jnp.exp(theta[1]), jnp.asarray(y), jnp.asarray(mask)).likelihood

    theta, h = jnp.asarray([0.2, -2.0, -1.0, -0.3]), 1e-5
    value = jit(likelihood)
    grad = jit(jax.grad(likelihood))(theta)
    ends = [(value(theta + h * e), value(theta - h * e)) for e in jnp.eye(4)]
    # central differences: 1e-10 from the step, 1e-10 from rounding
    np.testing.assert_allclose(grad, [(a - b) / (2 * h) for a, b in ends], rtol=1e-7)


def test_single_precision_stays_and_coinciding_rows_do_not_break_it(rows):
    x, y, mask, new = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), rows)
    x = x.at[1].set(x[0]).at[3].set(x[0])
    length = jnp.asarray(LENGTH, jnp.float32)
    gram = gp.matern52(gp.squared_distance(x, x, length))
    fitted = gp.fit(gram, 0.0, y, mask > 0)
    cross = gp.matern52(gp.squared_distance(new, x, length))
    out = (*fitted, *gp.predict(fitted, cross, jnp.ones(5, jnp.float32), mask > 0))
    assert all(v.dtype == jnp.float32 and jnp.all(jnp.isfinite(v)) for v in out)


@pytest.mark.parametrize(("best", "mean", "deviation"), [(0.3, 0.5, 0.7), (-1, 2, 0.8), (2, 1, 3)])
def test_expected_improvement_is_its_integral(best, mean, deviation):
    low = min(best, mean) - 12 * deviation
    area, _ = integrate.quad(
        lambda y: (best - y) * stats.norm.pdf(y, mean, deviation), low, best, epsabs=1e-13
    )
    value = gp.expected_improvement(*map(jnp.asarray, (best, mean, deviation)))
    np.testing.assert_allclose(value, area, rtol=1e-8)


def test_expected_improvement_without_doubt():
    improvement = lambda mean: gp.expected_improvement(jnp.asarray(1.0), mean, jnp.zeros(()))
    assert improvement(jnp.asarray(0.25)) == 0.75
    assert improvement(jnp.asarray(3.0)) == 0.0
    assert jax.grad(improvement)(jnp.asarray(0.25)) == -1.0


# ------------------------------------------------------------------------ slice sampling


def test_slice_sampler_has_the_moments_of_a_normal_and_a_gamma():
    # Independent chains, so that errors of means are known: 500 chains, last of 30 sweeps. The
    # width is far from the scales, so that stepping out and shrinking both have work.
    correlation, shape = 0.8, 3.0

    def density(v):
        x, y, z = v
        quadratic = (x**2 - 2 * correlation * x * y + y**2) / (1 - correlation**2)
        positive = z > 0
        z = jnp.where(positive, z, 1.0)
        return jnp.where(positive, -quadratic / 2 + (shape - 1) * jnp.log(z) - z, jnp.nan)

    count = 500
    chain = lambda key, start: gp.slice_sample(key, density, start, width=0.5, sweeps=30)[-1]
    starts = jnp.broadcast_to(jnp.asarray([2.0, -2.0, 0.5]), (count, 3))
    draws = np.asarray(jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), count), starts))
    error = 5 / np.sqrt(count)  # five standard errors for unit variance
    assert np.all(draws[:, 2] > 0)
    assert np.all(np.abs(draws[:, :2].mean(0)) < error)
    # variances of a sample of squares: 2 for a normal, 1 + rho^2 for a product of two
    assert np.all(np.abs((draws[:, :2] ** 2).mean(0) - 1) < error * np.sqrt(2))
    product = (draws[:, 0] * draws[:, 1]).mean()
    assert abs(product - correlation) < error * np.sqrt(1 + correlation**2)
    assert abs(draws[:, 2].mean() - shape) < error * np.sqrt(shape)
    assert stats.kstest(draws[:, 2], stats.gamma(shape).cdf).pvalue > 1e-4


def test_slice_sampler_stays_where_there_is_no_density():
    nowhere = lambda v: jnp.nan * v.sum()
    chain = gp.slice_sample(jax.random.key(0), nowhere, jnp.ones(2), width=1.0, sweeps=3)
    np.testing.assert_array_equal(chain, np.ones((3, 2)))
    # and leaves when it sees some: here within 0.5 of the origin, all equal
    for void in (-jnp.inf, jnp.nan):
        island = lambda v, void=void: jnp.where(jnp.abs(v[0]) < 0.5, 0.0, void)
        chain = gp.slice_sample(jax.random.key(0), island, jnp.ones(1), width=1.0, sweeps=9)
        assert np.all(np.abs(chain[-3:]) < 0.5) and np.unique(chain[-3:]).size == 3


# ---------------------------------------------------------------------------- maximizing


def test_maximize_finds_the_better_of_two_hills_inside_the_box():
    # Gradient steps of 0.02 end within a step of the top.
    def hills(v):
        far = lambda c: jnp.sum((v - c) ** 2)
        return jnp.exp(-far(0.2) / 0.02) + 1.5 * jnp.exp(-far(0.8) / 0.02)

    starts = jnp.asarray([[0.1, 0.3], [0.75, 0.7]])
    box = {"low": 0.0, "high": 1.0}
    point, value = gp.maximize(hills, starts, steps=100, rate=0.02, **box)
    np.testing.assert_allclose(point, [0.8, 0.8], atol=0.02)
    np.testing.assert_allclose(value, hills(point), rtol=1e-12)
    edge, _ = gp.maximize(lambda v: v.sum(), starts, steps=100, rate=0.02, **box)
    np.testing.assert_array_equal(edge, [1.0, 1.0])


def test_maximize_keeps_the_best_point_it_met_and_ignores_what_is_not_finite():
    starts = jnp.asarray([[0.5], [0.9]])
    # Steps of 0.4 jump over a hill of width 0.01, at whose top one start is.
    hill = lambda v: jnp.where(v[0] > 0.6, jnp.nan, jnp.exp(-(((v[0] - 0.5) / 0.01) ** 2)))
    point, value = gp.maximize(hill, starts, low=0.0, high=1.0, steps=5, rate=0.4)
    assert (point[0], value) == (0.5, 1.0)
    nothing = lambda v: jnp.nan * v[0]
    point, value = gp.maximize(nothing, starts, low=0.0, high=1.0, steps=5, rate=0.4)
    assert (point[0], value) == (0.5, -jnp.inf)


def test_sampling_and_maximizing_inside_shard_map():
    # Data that differ between the devices; the starts do not.
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("x",))

    def both(center):
        density = lambda v: -jnp.sum((v - center[0]) ** 2)
        start = jnp.zeros(2)
        chain = gp.slice_sample(jax.random.key(0), density, start, width=1.0, sweeps=2)
        top, _ = gp.maximize(density, start[None], low=-9.0, high=9.0, steps=3, rate=0.1)
        return chain[-1:], top[None]

    spec = PartitionSpec("x")
    centers = jnp.asarray([0.5, -2.0])
    spread = jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec))(centers)
    for i in range(2):
        one = jit(both)(centers[i : i + 1])
        for a, b in zip(spread, one, strict=True):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-12)
