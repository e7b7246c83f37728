"""Forecasts of learning curves: residuals against explicit refits, and stops with known answers."""

import functools
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import jit

from hyperjax import search

COUNT, LENGTH, TRAITS = 14, 6, 2
PENALTIES = (0.01, 0.1, 1.0)


def data(seed=0, count=COUNT):
    """Curves that go down at rates the traits tell something about."""
    rng = np.random.default_rng(seed)
    traits = rng.normal(size=(count, TRAITS))
    steps = np.arange(1, LENGTH + 1)
    floor = 0.3 * traits[:, :1] + rng.normal(size=(count, 1))
    curves = floor + np.exp(-steps[None] * np.exp(0.3 * traits[:, 1:])) * 2
    return curves + 0.05 * rng.normal(size=curves.shape), traits


def features(curves, traits, known):
    part = curves[:, :known]
    return np.concatenate([part, np.diff(part), np.diff(part, n=2), traits], 1)


def refit(x, y, penalty):
    """Ridge with a free intercept by the normal equations: (weights, intercept)."""
    design = np.concatenate([x, np.ones((len(x), 1))], 1)
    cost = np.diag([penalty] * x.shape[1] + [0.0])
    solution = np.linalg.solve(design.T @ design + cost, design.T @ y)
    return solution[:-1], solution[-1]


@functools.cache
def fitted(dtype=np.float64):
    curves, traits = data()
    fit = jit(functools.partial(search.fit_curves, penalties=PENALTIES))
    return fit(jnp.asarray(curves, dtype), jnp.asarray(traits, dtype))


def test_curves_alone_are_enough():
    curves, _ = data()
    none = jnp.zeros((COUNT, 0))
    models = jit(search.fit_curves)(jnp.asarray(curves), none)
    found = search.predict_curve(models, jnp.asarray(curves), none, 4)
    # Traits that tell nothing, and whose mean may be a rounding away from them.
    constant = jnp.tile(jnp.asarray([[1.0, 0.1, 0.3, 0.7]]), (COUNT, 1))
    same = jit(search.fit_curves)(jnp.asarray(curves), constant)
    expected = search.predict_curve(same, jnp.asarray(curves), constant, 4)
    # 1e-9: solves of a well-conditioned ridge, in float64
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9)
    np.testing.assert_allclose(found.deviation, expected.deviation, rtol=1e-9)


@pytest.mark.parametrize("known", [1, 2, 4])
def test_leave_one_out_is_that_of_explicit_refits(known):
    curves, traits = data()
    x, y = features(curves, traits, known), curves[:, -1]
    x = (x - x.mean(0)) / x.std(0)
    expected = {}
    for penalty in PENALTIES:
        rows = []
        for i in range(COUNT):
            others = np.arange(COUNT) != i
            w, b = refit(x[others], y[others], penalty * COUNT)
            rows.append(y[i] - x[i] @ w - b)
        expected[penalty * COUNT] = np.array(rows)
    best = min(expected, key=lambda p: np.sum(expected[p] ** 2))
    models = fitted()
    # Condition numbers here are below 1e4, so float64 leaves more than nine digits.
    np.testing.assert_allclose(models.penalty[known - 1], best, rtol=1e-12)
    np.testing.assert_allclose(models.residuals[known - 1], expected[best], rtol=1e-8, atol=1e-10)
    error = np.sqrt(np.mean(expected[best] ** 2))
    np.testing.assert_allclose(models.deviation[known - 1], error, rtol=1e-8)
    # And they are not the residuals of the fit itself, which flatter it.
    w, b = refit(x, y, best)
    assert np.mean((y - x @ w - b) ** 2) < 0.9 * error**2


@pytest.mark.parametrize("known", [1, 3, LENGTH])
def test_forecasts_are_those_of_an_explicit_fit(known):
    curves, traits = data()
    fresh, more = data(1, 5)
    x, y = features(curves, traits, known), curves[:, -1]
    centre, scale = x.mean(0), x.std(0)
    w, b = refit((x - centre) / scale, y, float(fitted().penalty[known - 1]))
    expected = (features(fresh, more, known) - centre) / scale @ w + b
    hidden = jnp.asarray(fresh).at[:, known:].set(jnp.nan)  # what is to come is not looked at
    found = jit(search.predict_curve)(fitted(), hidden, jnp.asarray(more), jnp.asarray(known))
    np.testing.assert_allclose(found.mean, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.deviation, np.full(5, fitted().deviation[known - 1]))


def test_more_points_tell_more():
    deviation = np.asarray(fitted().deviation)
    assert deviation[-1] < 0.5 * deviation[2] < 0.5 * deviation[0]


def test_curves_that_failed_are_left_out():
    curves, traits = data()
    broken = np.concatenate([curves, curves[:2]])
    broken[COUNT, 3], broken[COUNT + 1, 5] = np.nan, np.inf
    fit = jit(functools.partial(search.fit_curves, penalties=PENALTIES))
    found = fit(jnp.asarray(broken), jnp.asarray(np.concatenate([traits, traits[:2]])))
    expected = fitted()
    for name in ("weights", "centre", "scale", "offset", "penalty", "deviation"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-7, atol=1e-9, err_msg=name
        )
    assert np.isnan(found.residuals[:, COUNT:]).all()
    # One that has failed already is outclassed for certain, whatever the best.
    curve = jnp.asarray(curves[0]).at[1].set(jnp.nan)
    forecast = search.predict_curve(expected, curve, jnp.asarray(traits[0]), 2)
    assert float(forecast.mean) == np.inf
    assert float(search.outclassed(forecast, -1e9)) == 1
    assert np.isfinite(search.predict_curve(expected, curve, jnp.asarray(traits[0]), 1).mean)


def test_known_answers_of_the_rule():
    at = lambda mean, deviation, best: float(
        search.outclassed(search.Forecast(jnp.asarray(mean), jnp.asarray(deviation)), best)
    )
    # The 95 % point of a normal distribution, from the standard library.
    far = 0.5 + 0.1 * NormalDist().inv_cdf(0.95)
    assert at(far, 0.1, 0.5) == pytest.approx(0.95, abs=1e-12)
    assert at(0.5, 0.1, 0.5) == pytest.approx(0.5, abs=1e-12)
    assert at(0.5 - (far - 0.5), 0.1, 0.5) == pytest.approx(0.05, abs=1e-12)
    assert (at(0.6, 0.0, 0.5), at(0.4, 0.0, 0.5)) == (1, 0)  # no doubt left
    assert np.isnan(at(0.6, np.nan, 0.5))  # nothing known, nothing claimed


def test_float32_and_vmap():
    models = fitted(np.float32)
    assert {x.dtype for x in jax.tree.leaves(models)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(models.deviation, fitted().deviation, rtol=1e-3)
    # Half precision is taken as float32: LAPACK has nothing smaller.
    half = search.fit_curves(jnp.ones((3, 2), jnp.bfloat16), jnp.ones((3, 0), jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(np.float32)}
    curves, traits = (jnp.asarray(x) for x in data(1, 5))
    whole = search.predict_curve(fitted(), curves, traits, 3)
    one = jax.vmap(lambda c, h: search.predict_curve(fitted(), c, h, 3))(curves, traits)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), one, whole)


def test_bad_input_is_refused():
    curves, traits = (jnp.asarray(x) for x in data())
    for wrong in ((curves[:2], traits[:2]), (curves[0], traits[0]), (curves, traits[:-1])):
        with pytest.raises(ValueError, match=r"`curves` must be floats \[n, T\]"):
            search.fit_curves(*wrong)
    with pytest.raises(ValueError, match="`penalties` must be a finite number, positive; got 0"):
        search.fit_curves(curves, traits, penalties=(0,))
    with pytest.raises(ValueError, match=r"`curve` must be \[..., 6\] and `traits` \[..., 2\]"):
        search.predict_curve(fitted(), curves[:, :3], traits, 3)
    wrongs: Any = (7, 0, np.int64(7), jnp.int32(0), 2.5)
    for wrong in wrongs:
        with pytest.raises(
            ValueError, match=f"`known` must be an integer from 1 to 6; got {wrong}"
        ):
            search.predict_curve(fitted(), curves, traits, wrong)
