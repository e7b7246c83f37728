"""The numbers behind the plots; needs no matplotlib."""

from typing import NamedTuple

import numpy as np

from ..exchange import lineage
from ._record import Record

_RESAMPLES = 200


class Importance(NamedTuple):
    """Rank correlation of one hyperparameter with the loss, and its standard error."""

    name: str
    correlation: float
    error: float


def last_logged(record: Record) -> np.ndarray:
    """[S] position of the last outer step that every member of a seed logged (else any; else -1).

    A run may be killed between the lines of one step.
    """
    rows = np.zeros((len(record.steps), len(record.seeds)), int)
    at_step = np.searchsorted(record.steps, record.metrics["step"])
    np.add.at(rows, (at_step, np.searchsorted(record.seeds, record.metrics["seed"])), 1)
    full = rows == record.members
    usable = np.where(full.any(0), full, rows > 0)
    order = np.arange(1, len(record.steps) + 1)[:, None]
    return (usable * order).max(0, initial=0) - 1


def final_losses(record: Record) -> np.ndarray:
    """[S, M] validation loss in the last logged step, by the slot that trained during it."""
    return record.valid[last_logged(record), np.arange(len(record.seeds))]


def final_hparams(record: Record) -> dict[str, np.ndarray]:
    """name -> [S, M] hyperparameters in force in the last logged step, by slot."""
    last, seeds = last_logged(record), np.arange(len(record.seeds))
    return {name: grid[last, seeds] for name, grid in record.hparams.items()}


def ancestry(record: Record, seed: int, member: int | np.ndarray) -> np.ndarray:
    """`lineage` of final members up to the last logged step of that seed."""
    return np.asarray(lineage(record.parents[: last_logged(record)[seed] + 1, seed], member))


def best_members(record: Record) -> dict[int, int]:
    """Position of each seed -> its best final member: from ``best.json``, else by the last loss."""
    chosen = {s["seed"]: s["member"] for s in (record.best or {}).get("seeds", [])}
    last, best = last_logged(record), {}
    for s, seed in enumerate(record.seeds.tolist()):
        # A loss belongs to the slot that trained; a member is named by the slot it ended in.
        ended = record.valid[last[s], s, record.parents[last[s], s]]
        if seed in chosen and int(chosen[seed]) in range(record.members):
            best[s] = int(chosen[seed])
        elif np.isfinite(ended).any():
            best[s] = int(np.nanargmin(ended))
    return best


def best_so_far(valid: np.ndarray) -> np.ndarray:
    """[T, S] smallest finite loss of any member up to each step, NaN before the first."""
    smallest = np.fmin.reduce(valid, axis=2)
    return np.fmin.accumulate(smallest, axis=0)


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the last axis and its standard error; one column has an error of zero."""
    count = values.shape[-1]
    error = values.std(-1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(values.shape[:-1])
    return values.mean(-1), error


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the average of the ranks they take up."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, side="left")
    through = np.searchsorted(ordered, values, side="right")
    return (below + 1 + through) / 2


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation with ties averaged; NaN if either side is constant.

    Args:
        x: [N] finite values.
        y: [N] finite values.
    """
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def ranking(record: Record) -> dict[str, float]:
    """Hyperparameters by the size of their rank correlation with the final validation loss.

    The correlation is taken between the members of one seed and averaged over seeds, so that a
    lucky seed does not count as a good hyperparameter. It is NaN, and last, for one that is the
    same in all members.
    """
    losses, kept = _judged(record)
    found = {n: _correlation(grid, losses, kept) for n, grid in final_hparams(record).items()}
    # Names break ties, so that the order is reproducible.
    order = sorted(found, key=lambda n: (np.isnan(found[n]), -abs(np.nan_to_num(found[n])), n))
    return {name: found[name] for name in order}


def importances(record: Record, most: int) -> list[Importance]:
    """The first of the `ranking`, with bootstrap standard errors over members, within seeds.

    Copies of one ancestor are resampled as if they were independent: after many exchanges the
    error is too small.
    """
    losses, kept = _judged(record)
    hparams = final_hparams(record)
    found = [(n, c) for n, c in ranking(record).items() if np.isfinite(c)][:most]
    errors = _bootstrap([hparams[name] for name, _ in found], losses, kept)
    return [Importance(n, c, e) for (n, c), e in zip(found, errors, strict=True)]


def _judged(record: Record) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Final losses [S, M] and, for each seed with enough of them, the finite members."""
    losses = final_losses(record)
    finite = [np.flatnonzero(np.isfinite(row)) for row in losses]
    return losses, [(s, rows) for s, rows in enumerate(finite) if len(rows) > 2]


def _correlation(grid: np.ndarray, losses: np.ndarray, kept: list) -> float:
    each = [spearman(grid[s, rows], losses[s, rows]) for s, rows in kept]
    each = [c for c in each if np.isfinite(c)]
    return float(np.mean(each)) if each else float("nan")


def _bootstrap(grids: list[np.ndarray], losses: np.ndarray, kept: list) -> list[float]:
    rng = np.random.default_rng(0)
    drawn = np.full((_RESAMPLES, len(grids)), np.nan)
    for b in range(_RESAMPLES):
        again = [(s, rng.choice(rows, len(rows))) for s, rows in kept]
        drawn[b] = [_correlation(grid, losses, again) for grid in grids]
    # A resample may leave nothing that varies; it says nothing about the spread.
    usable = [column[np.isfinite(column)] for column in drawn.T]
    return [float(u.std(ddof=1)) if len(u) > 1 else float("nan") for u in usable]
