"""How certain a comparison is: intervals, paired tests, ranks. For the host, after the runs.

Tests are SciPy's where it has them; rank correlations are `scipy.stats.kendalltau` (tau-b) and
`spearmanr`, used directly.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks


class Interval(NamedTuple):
    """A mean and where it lies with the confidence that was asked for."""

    mean: float
    low: float
    high: float
    size: int  # how many values it rests on


class Comparison(NamedTuple):
    """Two methods on the same seeds; differences are first minus second."""

    difference: Interval
    sign_flip: float  # two-sided p of the mean difference if signs were random
    wilcoxon: float  # two-sided p of Wilcoxon's signed ranks
    below: int  # seeds on which the first is smaller
    equal: int
    above: int


class Ranks(NamedTuple):
    """Methods over problems: Demsar 2006, "Statistical comparisons of classifiers" (JMLR 7)."""

    average: np.ndarray  # [methods], 1 for the best
    friedman: float  # p if all methods were alike
    critical: float  # Nemenyi: average ranks that differ by less may be alike


def interval(
    values: ArrayLike,
    *,
    level: float = 0.95,
    method: str = "t",
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """A two-sided confidence interval of the mean of `values` [n], n >= 2.

    Args:
      level: in (0, 1).
      method: "t", Student's, right for normal values; "percentile", of bootstrapped means, too
        narrow for few values; "bootstrap-t", of bootstrapped t statistics, which follows skewness
        (Efron and Tibshirani 1993, chapters 12 and 13). Resamples without any spread, which have
        no t, are left out.
      resamples: bootstrap draws, from NumPy's generator with `seed`.

    Raises ValueError for values that are not finite: a failed run has no place in a mean. Count and
    report it.
    """
    from scipy import stats  # here, since it takes a second to import

    x = _finite("interval", "values", values)
    _checks.one_of("interval", "method", method, ("t", "percentile", "bootstrap-t"))
    _checks.positive_int("interval", "resamples", resamples)
    if not 0 < level < 1:
        raise ValueError(f"interval: `level` must be in (0, 1); got {level!r}.")
    n, mean, error = len(x), x.mean(), stats.sem(x)
    tails = (1 - level) / 2, (1 + level) / 2
    if method == "t":
        low, high = mean + error * stats.t.ppf(tails, n - 1)
    else:
        drawn = x[np.random.default_rng(seed).integers(n, size=(resamples, n))]
        means = drawn.mean(axis=1)
        if method == "percentile":
            low, high = np.quantile(means, tails)
        else:
            low, high = _studentized(means - mean, stats.sem(drawn, axis=1), mean, error, tails)
    return Interval(float(mean), float(low), float(high), n)


def _studentized(shifts, errors, mean, error, tails) -> tuple[float, float]:
    spread = errors > 1e-12 * np.abs(mean)  # of equal values only rounding is left
    if not spread.any():
        return mean, mean
    left, right = np.quantile(shifts[spread] / errors[spread], tails)
    return mean - right * error, mean - left * error


def compare(
    first: ArrayLike,
    second: ArrayLike,
    *,
    level: float = 0.95,
    method: str = "t",
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Scores of two methods on the same n >= 2 seeds, [n] each, compared pair by pair.

    The interval is that of `interval`. The sign-flip test is exact as long as `resamples` covers
    all 2^n flips, and sampled beyond; Wilcoxon's test is exact for small n without ties. Both are 1
    where no pair differs. Raises ValueError for lengths that differ, and for scores that are not
    finite.
    """
    from scipy import stats  # here, since it takes a second to import

    a, b = _finite("compare", "first", first), _finite("compare", "second", second)
    if len(a) != len(b):
        raise ValueError(
            f"compare: `first` and `second` must be scores on the same seeds; got {len(a)} and "
            f"{len(b)}."
        )
    d = a - b
    flip = ranks = 1.0
    if d.any():
        rng = np.random.default_rng(seed)
        flip = _sign_flip(d, resamples, rng)
        outcome: Any = stats.wilcoxon(d)
        ranks = float(outcome.pvalue)
    gap = interval(d, level=level, method=method, resamples=resamples, seed=seed)
    return Comparison(gap, flip, ranks, int((d < 0).sum()), int((d == 0).sum()), int((d > 0).sum()))


def _sign_flip(d: np.ndarray, resamples: int, rng: np.random.Generator) -> float:
    n = len(d)
    exact = n < 63 and 2**n <= resamples
    if exact:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n)[None] & 1)
    else:
        signs = rng.choice([-1, 1], size=(resamples, n))
    # Flips that give the same sum in another order of rounding are as extreme as what was seen.
    extreme = np.sum(np.abs(signs @ d) >= np.abs(d.sum()) - 1e-12 * np.abs(d).sum())
    return float(extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1))


def average_ranks(scores: ArrayLike, *, level: float = 0.95) -> Ranks:
    """Ranks of three methods or more over two problems or more, scores [methods, problems].

    Smaller scores are better; equal ones share a rank, and what is not finite comes last together.
    Raises ValueError for other shapes (compare two methods with `compare`).
    """
    from scipy import stats  # here, since it takes a second to import

    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or table.shape[0] < 3 or table.shape[1] < 2:
        raise ValueError(
            "average_ranks: `scores` must be [methods, problems], three methods and two problems "
            f"at least; got {list(table.shape)}. Two methods are for `compare`."
        )
    table = np.where(np.isfinite(table), table, np.inf)
    methods, problems = table.shape
    ranks = stats.rankdata(table, axis=0)
    alike = np.all(ranks == ranks[:1])
    p = 1.0 if alike else float(stats.friedmanchisquare(*ranks).pvalue)
    q = stats.studentized_range.ppf(level, methods, np.inf) / np.sqrt(2)
    critical = q * np.sqrt(methods * (methods + 1) / (6 * problems))
    return Ranks(ranks.mean(axis=1), p, float(critical))


def _finite(where: str, name: str, values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"{where}: `{name}` must be [n], n >= 2; got shape {list(x.shape)}.")
    if not np.isfinite(x).all():
        raise ValueError(
            f"{where}: `{name}` must be finite; not so at {np.flatnonzero(~np.isfinite(x))}. Count "
            "failed runs and report them; a mean cannot hold them."
        )
    return x
