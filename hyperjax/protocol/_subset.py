"""A few benchmark tasks that stand for many, after automl's CARP-S, which takes the subset of the
smallest star discrepancy. That abstract does not say in which space; the coordinates are ours."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks

_ROUNDING = 1e-4  # of counts in float32


class Subset(NamedTuple):
    """Chosen tasks, and how unlike the whole they are."""

    tasks: np.ndarray  # int [size], ascending
    discrepancy: float  # largest difference of shares over all boxes
    restarts: np.ndarray  # [restarts], where each local search ended


def rank_coordinates(regrets: ArrayLike) -> np.ndarray:
    """Ranks of tasks in each column, in (0, 1): regrets [tasks, optimizers] to that shape.

    Ranks are (r - 1/2) / tasks, equal regrets share one, so logarithms change nothing. Raises
    ValueError for regrets that are not finite or not a table.
    """
    from scipy import stats  # here, since it takes a second to import

    table = _table("rank_coordinates", "regrets", regrets)
    return (stats.rankdata(table, axis=0) - 0.5) / len(table)


def discrepancies(points: ArrayLike, subsets: ArrayLike) -> np.ndarray:
    """Star discrepancies [B] of subsets, bool [B, n], against all of `points` [n, d].

    The largest difference, over boxes with one corner at the origin, between the share of the
    subset and the share of all points that lie in the box.

    Raises ValueError for subsets of another shape, and for an empty one.
    """
    inside = _boxes(_table("discrepancies", "points", points))
    chosen = np.atleast_2d(np.asarray(subsets, bool)).astype(np.float32)
    if chosen.shape[1] != len(inside) or not chosen.any(axis=1).all():
        raise ValueError(
            f"discrepancies: `subsets` must be bool [B, {len(inside)}], none of them empty; got "
            f"shape {list(chosen.shape)}."
        )
    shares = chosen @ inside / chosen.sum(axis=1, keepdims=True)
    return np.abs(shares - inside.mean(axis=0)[None]).max(axis=1).astype(np.float64)


def representative(points: ArrayLike, size: int, *, restarts: int = 100, seed: int = 0) -> Subset:
    """The subset of `size` points of the smallest star discrepancy that a local search finds.

    From `restarts` random subsets, the swap of one task for another that lowers the largest
    differences most is made until none does. Boxes end at coordinates of points, up to n^d of
    them, so d must be small: three columns and 60 tasks take seconds. For the host.

    Raises ValueError unless 1 <= size < n.
    """
    table = _table("representative", "points", points)
    _checks.positive_int("representative", "restarts", restarts)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < len(table):
        raise ValueError(
            f"representative: `size` must be an integer in [1, {len(table) - 1}]; got {size!r}."
        )
    inside = _boxes(table)
    rng = np.random.default_rng(seed)
    ends = []
    for _ in range(restarts):
        start = rng.permutation(len(table)) < size
        ends.append(_descend(inside, start))
    values = np.array([value for value, _ in ends])
    chosen = ends[int(np.argmin(values))][1]
    return Subset(np.flatnonzero(chosen), float(values.min()), values)


def _descend(inside: np.ndarray, chosen: np.ndarray) -> tuple[float, np.ndarray]:
    """Best swaps until none is better: (discrepancy, bool [n])."""
    size = chosen.sum()
    goal = inside.mean(axis=0) * size
    value = np.abs(inside[chosen].sum(axis=0) - goal).max()
    while True:
        ins, outs = np.flatnonzero(~chosen), np.flatnonzero(chosen)
        gap = inside[chosen].sum(axis=0) - goal
        # A swap moves a count by one at most: boxes that are nearer than that decide nothing.
        near = np.flatnonzero(np.abs(gap) > value - 1 - _ROUNDING)
        rows, gap, best, swap = inside[:, near], gap[near], value - _ROUNDING, None
        for out in outs:
            after = np.abs(gap - rows[out] + rows[ins]).max(axis=1)
            place = int(np.argmin(after))
            if after[place] < best:
                best, swap = after[place], (out, ins[place])
        if swap is None:
            return float(value / size), chosen
        chosen = chosen.copy()
        chosen[swap[0]], chosen[swap[1]] = False, True
        value = np.abs(inside[chosen].sum(axis=0) - goal).max()


def _boxes(points: np.ndarray) -> np.ndarray:
    """float32 [n, boxes]: 1 where the point lies in the box, every distinct box once.

    A box that matters has a point at each of its upper faces, or else it can be shrunk without
    losing any; so corners are joins of points.
    """
    n, d = points.shape
    inside = np.ones((n, 1), bool)
    for axis in range(d):
        below = points[:, axis, None] <= np.unique(points[:, axis])[None]  # [n, levels]
        inside = (inside[:, :, None] & below[:, None, :]).reshape(n, -1)
        inside = np.unpackbits(np.unique(np.packbits(inside, axis=0), axis=1), axis=0, count=n)
        inside = inside.astype(bool)
    return inside.astype(np.float32)


def _table(where: str, name: str, values: ArrayLike) -> np.ndarray:
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 1 or not np.isfinite(table).all():
        raise ValueError(
            f"{where}: `{name}` must be a finite table [tasks, columns] of two tasks at least; got "
            f"shape {list(table.shape)}{'' if np.isfinite(table).all() else ' with NaN or inf'}."
        )
    return table
