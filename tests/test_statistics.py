"""Intervals and tests: against SciPy's own, by enumeration, by coverage, by published tables."""

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hyperjax import protocol


def test_student_interval_is_scipys(rng):
    x = rng.normal(3, 2, 12)
    got = protocol.interval(x, level=0.9)
    low, high = stats.t.interval(0.9, 11, loc=x.mean(), scale=stats.sem(x))
    np.testing.assert_allclose(got, (x.mean(), low, high, 12), 1e-12)


def test_percentile_interval_is_scipys(rng):
    x = rng.exponential(size=30)
    got = protocol.interval(x, method="percentile", resamples=20_000)
    theirs = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=20_000)
    want = theirs.confidence_interval
    # Other draws: quantiles of 20,000 are known to about 1.5 % of the deviation each.
    np.testing.assert_allclose((got.low, got.high), want, atol=0.05 * stats.sem(x))


def test_bootstrap_t_follows_skewness():
    """Coverage of the mean of 12 values with a long tail: 95 % is asked for."""
    true, hits, sides = np.exp(0.5), dict.fromkeys(["t", "percentile", "bootstrap-t"], 0), []
    for seed in range(300):
        x = np.random.default_rng(seed).lognormal(size=12)
        for method in hits:
            got = protocol.interval(x, method=method, resamples=400, seed=seed)
            hits[method] += got.low <= true <= got.high
            if method == "bootstrap-t":
                sides.append((got.high - got.mean) > (got.mean - got.low))
    # Standard errors are near 0.02, and the order is known (Efron and Tibshirani, chapter 14).
    assert hits["percentile"] < hits["t"] < hits["bootstrap-t"]
    assert hits["bootstrap-t"] / 300 > 0.87
    assert np.mean(sides) > 0.95


@pytest.mark.parametrize("method", ["t", "percentile", "bootstrap-t"])
def test_equal_values_have_no_width(method):
    got = protocol.interval(np.full(5, 0.7), method=method, resamples=50)
    np.testing.assert_allclose(got, (0.7, 0.7, 0.7, 5), 1e-12)


def test_sign_flips_by_enumeration(rng):
    a, b = rng.normal(0.6, 1, 9), rng.normal(0, 1, 9)
    got = protocol.compare(a, b)
    sums = [abs(np.dot(s, a - b)) for s in itertools.product([-1, 1], repeat=9)]
    assert got.sign_flip == np.mean(np.array(sums) >= abs((a - b).sum()) - 1e-12)
    want = stats.permutation_test((a - b,), np.mean, permutation_type="samples")
    np.testing.assert_allclose(got.sign_flip, want.pvalue, 1e-12)
    ranks: Any = stats.wilcoxon(a, b, method="exact")
    assert got.wilcoxon == ranks.pvalue
    np.testing.assert_allclose(got.difference, protocol.interval(a - b), 1e-12)


def test_sampled_flips_approach_the_exact(rng):
    a, b = rng.normal(0.5, 1, 13), rng.normal(0, 1, 13)
    exact = protocol.compare(a, b, resamples=2**13).sign_flip
    sampled = protocol.compare(a, b, resamples=2**13 - 1).sign_flip
    assert sampled != exact
    # 8,191 draws: five standard errors
    assert abs(sampled - exact) < 5 * np.sqrt(exact * (1 - exact) / 8191)


def test_a_sampled_p_is_never_zero():
    # No flip of 40 signs is as extreme, but for one in a million millions.
    got = protocol.compare(np.arange(40.0) + 1, np.zeros(40), resamples=99)
    assert got.sign_flip == 1 / 100


def test_false_alarms_are_as_rare_as_said():
    draws = [np.random.default_rng(seed).normal(size=(2, 7)) for seed in range(400)]
    p = np.array([protocol.compare(*x, resamples=128).sign_flip for x in draws])
    # Exact with 128 flips: P(p <= 0.0625) = 0.0625, five standard errors of 400 draws.
    assert abs(np.mean(p <= 0.0625) - 0.0625) < 5 * np.sqrt(0.0625 * 0.9375 / 400)


def test_compare_counts_and_ties():
    got = protocol.compare([1, 2, 3, 4.0], [1, 3, 4, 3.0])
    assert (got.below, got.equal, got.above) == (2, 1, 1)
    same = protocol.compare([1, 2, 3.0], [1, 2, 3.0])
    assert (same.sign_flip, same.wilcoxon, same.difference.mean) == (1.0, 1.0, 0.0)


def test_ranks_are_scipys(rng):
    scores = rng.normal(size=(4, 15)) + np.array([0, 0.5, 1, 1.5])[:, None]
    got = protocol.average_ranks(scores)
    np.testing.assert_allclose(got.average, stats.rankdata(scores, axis=0).mean(axis=1))
    np.testing.assert_allclose(got.friedman, stats.friedmanchisquare(*scores).pvalue)
    failed = scores.copy()
    failed[0, 0], failed[1, 0] = np.nan, np.inf
    np.testing.assert_allclose(
        protocol.average_ranks(failed).average * 15,
        stats.rankdata(scores[:, 1:], axis=0).sum(axis=1)
        + np.array([3.5, 3.5, *stats.rankdata(scores[2:, 0])]),
    )
    assert protocol.average_ranks(np.ones((3, 4))).friedman == 1


# Demsar 2006, table 5 (a): critical values of the two-tailed Nemenyi test.
@pytest.mark.parametrize(
    ("methods", "level", "q"),
    [(3, 0.95, 2.343), (5, 0.95, 2.728), (10, 0.95, 3.164), (5, 0.9, 2.459)],
)
def test_nemenyi_is_the_published_table(methods, level, q):
    scores = np.random.default_rng(0).normal(size=(methods, 20))
    got = protocol.average_ranks(scores, level=level).critical
    # The table has three decimals, some rounded and some cut off.
    np.testing.assert_allclose(got / np.sqrt(methods * (methods + 1) / (6 * 20)), q, atol=1e-3)


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"interval: `values` must be finite; not so at \[1\]"):
        protocol.interval([1.0, np.nan, 2.0])
    with pytest.raises(ValueError, match=r"interval: `values` must be \[n\], n >= 2"):
        protocol.interval([1.0])
    with pytest.raises(ValueError, match=r"interval: `method` must be one of 't'"):
        protocol.interval([1.0, 2.0], method="bca")
    with pytest.raises(ValueError, match=r"interval: `level` must be in \(0, 1\)"):
        protocol.interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match=r"compare: `first` and `second` .* got 2 and 3"):
        protocol.compare([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"average_ranks: `scores` must be \[methods, problems\]"):
        protocol.average_ranks(np.ones((2, 5)))
