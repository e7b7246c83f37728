"""A million characters of Shakespeare, as one token a character."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._data import SHAKESPEARE, read

_TRAIN, _VALID = 0.90, 0.95  # where the parts end


class Characters(NamedTuple):
    """A text in three parts, in the order of the text."""

    train: np.ndarray  # int32 [1,003,854]
    valid: np.ndarray  # int32 [55,770]
    test: np.ndarray  # int32 [55,770]
    names: str  # the character of each token, in the order of ASCII


def shakespeare(data_dir: str | Path | None = None) -> Characters:
    """Tiny Shakespeare, 1,115,394 characters, 65 of them distinct: 90, 5 and 5 percent in order.

    `windows` cuts a part into strips for training.

    Source: A. Karpathy's char-rnn; the text is in the public domain. Read from `data_dir` or the
    folder that the environment variable HYPERJAX_DATA names. Raises DataError if the file is
    missing or damaged.
    """
    text = np.frombuffer(read(SHAKESPEARE, data_dir), np.uint8)
    known, tokens = np.unique(text, return_inverse=True)
    ends = [int(len(tokens) * share) for share in (_TRAIN, _VALID)]
    train, valid, test = np.split(tokens.astype(np.int32), ends)
    return Characters(train, valid, test, bytes(known).decode("ascii"))
