"""Batches as row numbers: examples stay in one table, batches only say which rows to read."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._types import Batch, Batches, Key


class Rows(NamedTuple):
    """Row numbers of the three parts of a data set, int32 and disjoint."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def minibatches(rows: np.ndarray, size: int) -> Callable[[Key, int], Batches]:
    """A function `(key, steps) -> {"index": int32 [steps, size], "key": keys [steps]}`.

    Rows are drawn with replacement. Every step then has the same law however a run is cut into
    calls, which epochs do not survive: estimators that look at twenty steps at a time would never
    finish one. Step i depends on the key and on i alone, so a longer request extends a shorter.
    """
    table = jnp.asarray(rows, jnp.int32)

    def batches(key: Key, steps: int) -> Batches:
        def one(step):
            draw, noise = jax.random.split(jax.random.fold_in(key, step))
            choice = jax.random.randint(draw, (size,), 0, table.shape[0], jnp.int32)
            return {"index": table[choice], "key": noise}

        return jax.vmap(one)(jnp.arange(steps))

    return batches


def everything(rows: np.ndarray) -> Callable[[Key], Batch]:
    """A function `key -> {"index": int32 [n], "key": key}`: all rows in one batch."""
    table = jnp.asarray(rows, jnp.int32)
    return lambda key: {"index": table, "key": key}


def fixed(rows: np.ndarray) -> Batch:
    """`{"index": int32 [n]}`, for scoring, which needs no randomness."""
    return {"index": jnp.asarray(rows, jnp.int32)}


def in_type_of(params, tree):
    """Leaves of `tree` as arrays of the floating type of `params`.

    So that float32 training stays float32 where hyperparameters are float64.
    """
    dtype = jnp.result_type(*jax.tree.leaves(params))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
