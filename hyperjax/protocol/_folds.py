"""Nested cross-validation: what chooses a configuration never sees what judges it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._types import Key


class NestedFolds(NamedTuple):
    """Row numbers, int32; every array is full, so that folds can be vmapped over."""

    train: jax.Array  # [outer, n - n // outer]: to train what is judged
    test: jax.Array  # [outer, n // outer]: to judge, once
    inner_train: jax.Array  # [outer, inner, ...]: parts of `train`, to tune on
    inner_valid: jax.Array  # [outer, inner, ...]: the other part of `train`, to choose by


def nested_folds(key: Key, n: int, *, outer: int, inner: int) -> NestedFolds:
    """`outer` folds of n shuffled rows, the training part of each in `inner` folds.

    Rows that do not fill a fold (n mod outer, at most) are in every training part and in no test
    part. Raises ValueError unless there are two folds at least and a row for each.
    """
    _checks.positive_int("nested_folds", "outer", outer, least=2)
    _checks.positive_int("nested_folds", "inner", inner, least=2)
    _checks.positive_int("nested_folds", "n", n, least=outer)
    rest = n - n // outer
    _checks.positive_int("nested_folds", "n - n // outer", rest, least=inner)
    train, test = _folds(n, outer)
    inside, aside = _folds(rest, inner)
    order = jax.random.permutation(key, n).astype(jnp.int32)
    rows = order[train]
    return NestedFolds(rows, order[test], rows[:, inside], rows[:, aside])


def _folds(n: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions [count, n - n // count] and [count, n // count]."""
    size = n // count
    every = np.arange(n)
    held = [every[i * size : (i + 1) * size] for i in range(count)]
    kept = [np.delete(every, part) for part in held]
    return np.stack(kept), np.stack(held)
