"""Small regression problems of the UCI repository, with the splits that papers compare on."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from .. import _checks
from . import _data

_FILES = {
    "autompg": (_data.AUTO_MPG, _data.AUTO_MPG_SPLITS),
    "concrete": (_data.CONCRETE, _data.CONCRETE_SPLITS),
    "energy": (_data.ENERGY, _data.ENERGY_SPLITS),
    "yacht": (_data.YACHT, _data.YACHT_SPLITS),
}


class Regression(NamedTuple):
    """Rows to train on and to test on, in standard units of the former; float64."""

    x: np.ndarray  # [n, features]
    y: np.ndarray  # [n]
    test_x: np.ndarray  # [m, features]
    test_y: np.ndarray  # [m]
    deviation: float  # of the training targets in their own units: what 1 stands for in y


def uci(
    name: Literal["autompg", "concrete", "energy", "yacht"],
    split: int = 0,
    data_dir: str | Path | None = None,
) -> Regression:
    """A regression problem, and one of its ten customary splits into nine tenths and one.

    Rows and features: autompg 392 and 7, concrete 1,030 and 8, energy 768 and 8 (the heating load),
    yacht 308 and 6. Every column has mean 0 and deviation 1 over the training rows.

    Source: UCI Machine Learning Repository, CC BY 4.0, with splits, by T. Evans
    (treforevans/uci_datasets), read from `data_dir` or the folder that the environment variable
    HYPERJAX_DATA names. Raises DataError if a file is missing or damaged, ValueError for an unknown
    name or a split that is not from 0 to 9.
    """
    _checks.one_of("uci", "name", name, tuple(_FILES))
    if isinstance(split, bool) or split not in range(10):
        raise ValueError(f"uci: `split` must be an integer from 0 to 9; got {split!r}.")
    rows, splits = (
        np.loadtxt(_data.read(file, data_dir).decode().splitlines(), delimiter=",", ndmin=2)
        for file in _FILES[name]
    )
    tested = splits[:, split] == 1
    mean, deviation = rows[~tested].mean(0), rows[~tested].std(0)
    train, test = ((rows[chosen] - mean) / deviation for chosen in (~tested, tested))
    return Regression(train[:, :-1], train[:, -1], test[:, :-1], test[:, -1], float(deviation[-1]))
