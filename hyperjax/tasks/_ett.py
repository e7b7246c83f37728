"""Hourly loads and the oil temperature of an electricity transformer, as lagged windows."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import _checks
from ._data import ETT_H1, read


class Series(NamedTuple):
    """A time series of several channels."""

    values: np.ndarray  # float64 [hours, channels], in the units of the file
    names: tuple[str, ...]  # of the channels


def ett(data_dir: str | Path | None = None) -> Series:
    """ETTh1: six loads and the oil temperature "OT" of one transformer, 17,420 hours.

    They begin in July 2016. The customary split is by time: 12 months of 30 days to train, 4 to
    validate, 4 to test.

    Source: H. Zhou et al. 2021 (arXiv 2012.07436), CC BY-ND 4.0, read from `data_dir` or the folder
    that the environment variable HYPERJAX_DATA names. Raises DataError if the file is missing or
    damaged.
    """
    lines = io.StringIO(read(ETT_H1, data_dir).decode())
    names = tuple(next(lines).strip().split(",")[1:])
    values = np.loadtxt(lines, delimiter=",", usecols=range(1, len(names) + 1))
    return Series(values, names)


def lagged(values: np.ndarray, times: np.ndarray, *, lags: int) -> np.ndarray:
    """What was known at each of `times`: [len(times), lags, channels], the latest hour first.

    Row i holds values[t], values[t - 1], ..., values[t - lags + 1] for t = times[i]. Raises
    ValueError for a time that has not that much before it, or lies beyond the end.
    """
    _checks.positive_int("lagged", "lags", lags)
    values, times = np.asarray(values), np.asarray(times)
    if times.size and not lags - 1 <= times.min() <= times.max() < len(values):
        raise ValueError(
            f"lagged: `times` must lie in [{lags - 1}, {len(values)}) for {lags} lags of "
            f"{len(values)} hours; got {times.min()} to {times.max()}."
        )
    return values[times[:, None] - np.arange(lags)]
