"""Short texts with an intent each: what they say, and how they become rows of numbers."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import _checks
from ._cleaning import Classes
from ._data import BANKING_TEST, BANKING_TRAIN, CLINC, read

PADDING, UNKNOWN = 0, 1  # tokens; words count from 2


class Corpus(NamedTuple):
    """Texts with labels: the training rows first, then the validation rows, then the test rows."""

    texts: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    names: tuple[str, ...]  # of the labels
    sizes: tuple[int, int, int]  # rows of the three parts


def banking77_texts(
    data_dir: str | Path | None = None, seed: int = 0, *, intents: int | None = None
) -> Corpus:
    """Questions to a bank with 77 intents: 8,003 to train, 2,000 to validate, 3,080 to test.

    `seed` chooses which of the official training questions validate, and the `intents` that are
    kept, all if None. Source: I. Casanueva et al. 2020, CC BY 4.0, read from `data_dir` or the
    folder that the environment variable HYPERJAX_DATA names. Raises DataError if a file is missing
    or damaged, ValueError for a number of intents out of 2 .. 77.
    """
    parts = [_rows_of_csv(read(f, data_dir)) for f in (BANKING_TRAIN, BANKING_TEST)]
    order = np.random.default_rng(seed).permutation(len(parts[0]))
    train = [parts[0][i] for i in order]
    return _corpus("banking77_texts", (train[2_000:], train[:2_000], parts[1]), intents, seed)


def clinc150_texts(
    data_dir: str | Path | None = None, seed: int = 0, *, intents: int | None = None
) -> Corpus:
    """Requests to an assistant with 150 intents: the official 7,500, 3,000 and 4,500 texts.

    The small variant, with 50 training texts an intent, without the requests out of scope. `seed`
    chooses the `intents` that are kept, all if None, and nothing else. Source: S. Larson et al.
    2019, CC BY 3.0. Raises like `banking77_texts`.
    """
    content = json.loads(read(CLINC, data_dir))
    parts = [[tuple(row) for row in content[name]] for name in ("train", "val", "test")]
    return _corpus("clinc150_texts", parts, intents, seed)


def words(text: str) -> list[str]:
    """Runs of letters and apostrophes, single digits and signs, in lower case."""
    return re.findall(r"[^\W\d_](?:[^\W\d_]|')*|\d|[^\w\s]", text.lower())


def vocabulary(texts: Iterable[str], least: int = 2) -> dict[str, int]:
    """Token of each word that occurs `least` times in `texts`, the most frequent first, from 2.

    Give it the training texts alone: a word that they do not have is UNKNOWN in the others.

    Raises ValueError unless `least` is a positive integer.
    """
    _checks.positive_int("vocabulary", "least", least)
    counts = Counter(word for text in texts for word in words(text))
    kept = sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))
    return {word: 2 + i for i, word in enumerate(kept)}


def encode(texts: Sequence[str], tokens: Mapping[str, int], length: int) -> np.ndarray:
    """int32 [texts, length]: the first `length` words of each, PADDING behind the last.

    Raises ValueError unless `length` is a positive integer.
    """
    _checks.positive_int("encode", "length", length)
    table = np.full((len(texts), length), PADDING, np.int32)
    for row, text in zip(table, texts, strict=True):
        found = [tokens.get(word, UNKNOWN) for word in words(text)[:length]]
        row[: len(found)] = found
    return table


def tokenized(corpus: Corpus, *, length: int = 16, least: int = 2) -> tuple[Classes, int]:
    """The texts as `encode` has them, by the vocabulary of the training part, and its size.

    The size counts padding and unknown words too: tokens are below it.
    """
    tokens = vocabulary(corpus.texts[: corpus.sizes[0]], least)
    table = encode(corpus.texts, tokens, length)
    return Classes(table, corpus.labels, len(corpus.names), corpus.sizes), len(tokens) + 2


def _rows_of_csv(content: bytes) -> list[tuple[str, str]]:
    table = csv.DictReader(io.StringIO(content.decode()))
    return [(row["text"], row["category"]) for row in table]


def _corpus(where: str, parts: Sequence[list], intents: int | None, seed: int) -> Corpus:
    names = sorted({name for _, name in parts[0]})
    if intents is not None:
        _checks.positive_int(where, "intents", intents, least=2)
        if intents > len(names):
            raise ValueError(f"{where}: `intents` must be at most {len(names)}; got {intents}.")
        chosen = np.random.default_rng(seed).permutation(len(names))[:intents]
        names = [names[i] for i in sorted(chosen)]
    number = {name: i for i, name in enumerate(names)}
    kept = [[(text, number[name]) for text, name in part if name in number] for part in parts]
    texts, labels = zip(*(row for part in kept for row in part), strict=True)
    train, valid, test = map(len, kept)
    return Corpus(texts, np.array(labels, np.int32), tuple(names), (train, valid, test))
