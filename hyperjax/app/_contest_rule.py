"""From estimates over draws to numbers, and from numbers to a recommendation."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_TIE = 1.25  # prices this close are no reason to accept a bias: timings vary as much
_NO_BIAS = 0.01  # of the tolerance: below is none, and among exact estimators mostly rounding


class Accuracy(NamedTuple):
    """Estimates over K draws against the reference on the same draws.

    All are in units of the norm of the mean reference, except cosine and count.
    """

    bias: float  # |mean of (estimate - reference)|: its expectation is not below the true bias
    bias_error: float  # standard error of that mean; inf with one draw
    cosine: float  # between the two means
    deviation: float  # of one estimate: root of the summed variances over draws; inf with one
    finite: int  # draws on which every entry is finite; if not all, the others are NaN
    leaves: dict[str, float]  # bias leaf by leaf, each in units of its own reference
    blind: tuple[str, ...]  # leaves whose estimate is always exactly 0 and whose reference is not
    seen: float  # bias over the other leaves, in units of their reference


class Cost(NamedTuple):
    """What one estimate takes."""

    seconds: float | None  # median; None where it was compiled and not run
    compile_seconds: float
    bytes: int | None  # temporary memory as the compiler plans it; None where it does not say


class Row(NamedTuple):
    """One estimator. Either it was measured, or `refused` says why not."""

    name: str
    call: str  # how one writes it
    note: str
    refused: str = ""
    accuracy: Accuracy | None = None
    cost: Cost | None = None
    info: dict[str, float | str] | None = None  # what the estimator reports, means over draws


class Recommendation(NamedTuple):
    name: str | None
    reason: str
    rule: str


def accuracy(
    estimates: np.ndarray, reference: np.ndarray, leaves: Mapping[str, slice], eps: float
) -> Accuracy:
    """[K, D] estimates and references, one row a draw; `leaves` says which entries are whose.

    `eps` is the rounding of one operation: a leaf whose reference is below a hundred times that,
    in units of the whole, has no gradient to be blind to.
    """
    draws = len(reference)
    finite = int(np.isfinite(estimates).all(1).sum())
    nan = float("nan")
    if finite < draws:
        return Accuracy(nan, nan, nan, nan, finite, dict.fromkeys(leaves, nan), (), nan)
    gaps = estimates - reference
    bias, mean, size = gaps.mean(0), reference.mean(0), np.linalg.norm(reference.mean(0))
    ratio = lambda a, b: float(a / b) if b > 0 else nan
    distance = lambda part: ratio(np.linalg.norm(bias[part]), np.linalg.norm(mean[part]))
    cosine = ratio(estimates.mean(0) @ mean, size * np.linalg.norm(estimates.mean(0)))
    moves = lambda part: np.abs(reference[:, part]).max() > 100 * eps * size
    blind = tuple(n for n, p in leaves.items() if moves(p) and not estimates[:, p].any())
    seen = [i for n, part in leaves.items() if n not in blind for i in range(part.start, part.stop)]
    return Accuracy(
        bias=ratio(np.linalg.norm(bias), size),
        bias_error=ratio(_spread(gaps) / math.sqrt(draws), size),
        cosine=cosine,
        deviation=ratio(_spread(estimates), size),
        finite=finite,
        leaves={name: distance(part) for name, part in leaves.items()},
        blind=blind,
        seen=distance(seen),
    )


def _spread(values: np.ndarray) -> float:
    """The root of the summed sample variances of the columns."""
    return float(np.sqrt(values.var(0, ddof=1).sum())) if len(values) > 1 else math.inf


def draws_needed(row: Row, tolerance: float) -> int | None:
    """Estimates whose mean has an expected error of at most `tolerance`; None: no number will do.

    The error of a mean of n is sqrt(bias^2 + deviation^2 / n).
    """
    if row.accuracy is None or not row.accuracy.bias < tolerance:
        return None
    room = tolerance**2 - row.accuracy.bias**2
    needed = row.accuracy.deviation**2 / room
    return max(1, math.ceil(needed)) if math.isfinite(needed) else None


def price(row: Row, tolerance: float) -> float | None:
    """Seconds until the error is down to `tolerance`."""
    needed = draws_needed(row, tolerance)
    if needed is None or row.cost is None or row.cost.seconds is None:
        return None
    return needed * row.cost.seconds


def recommend(rows: Sequence[Row], tolerance: float) -> Recommendation:
    """The estimator to take, by the rule that comes with it.

    Rows that were not measured do not take part; that includes those above a memory budget.
    """
    rule = (
        "take part: estimators that fit the memory, are finite on every draw, are blind to no "
        f"hyperparameter and have a bias below {tolerance:g}. Their price is the time until the "
        f"error of a mean of n estimates, sqrt(bias^2 + deviation^2 / n), is {tolerance:g}. "
        f"Among those within {_TIE - 1:.0%} of the least price, the least biased, where a bias "
        f"below {_NO_BIAS * tolerance:g} counts as none; of these the cheapest, then the smallest. "
        "If none takes part, the least biased of all that fit and are finite"
    )
    sound = [r for r in rows if r.accuracy is not None and math.isfinite(r.accuracy.bias)]
    if not sound:
        return Recommendation(None, "no estimator gave a bias that is a number", rule)
    able = [r for r in sound if _accuracy(r).blind == () and price(r, tolerance) is not None]
    if able:
        least = min(price(r, tolerance) or 0 for r in able)
        close = [r for r in able if (price(r, tolerance) or 0) <= _TIE * least]
        best = min(close, key=lambda r: _order(r, tolerance))
        found, needed = _accuracy(best), draws_needed(best, tolerance) or 1
        each = (price(best, tolerance) or 0) / needed
        reason = (
            f"{'one estimate' if needed == 1 else f'{needed} estimates'} of {duration(each)} "
            f"will do: bias {found.bias:.2g}, deviation {found.deviation:.2g}"
        )
        return Recommendation(best.name, reason, rule)
    least = min(sound, key=lambda r: _accuracy(r).bias)
    found = _accuracy(least)
    why = "none was seen to reach the tolerance for every hyperparameter"
    reason = f"{why}; its bias of {found.bias:.2g} ± {found.bias_error:.1g} is the least"
    if found.blind:
        reason += f", though it is blind to {', '.join(found.blind)}"
    return Recommendation(least.name, reason, rule)


def _order(row: Row, tolerance: float) -> tuple[float, float, float]:
    """Of rows whose price is about the same: bias if there is any, price, memory."""
    memory = row.cost.bytes if row.cost is not None else None
    return (
        max(_accuracy(row).bias, _NO_BIAS * tolerance),
        price(row, tolerance) or 0,
        math.inf if memory is None else memory,
    )


def _accuracy(row: Row) -> Accuracy:
    assert row.accuracy is not None
    return row.accuracy


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
