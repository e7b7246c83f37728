"""Tasks in a row that share images but not the order of their pixels."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._types import Key
from . import _digits, _mnist

_TEST, _VALID = 599, 300  # of the 1,797 digits
_MNIST_VALID = 10_000  # of the official 60,000 to train


class Permuted(NamedTuple):
    """Images, and an order of the pixels for each task. The first task has them as they are."""

    train_x: jax.Array  # [n, pixels], float32, 0 to 1
    train_y: jax.Array  # [n], int32
    valid_x: jax.Array
    valid_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array
    order: jax.Array  # [tasks, pixels], int32


class Draws(NamedTuple):
    """Which examples of which task; a leading axis of steps, or of tasks and steps, or none."""

    task: jax.Array  # int32 []
    rows: jax.Array  # int32 [batch]


def permuted_digits(seed: int = 0, *, tasks: int = 10) -> Permuted:
    """The 8 x 8 digits with pixels in another order for each task.

    898 images to train, 300 to validate, 599 to test, the same ones in all tasks. `seed` chooses
    the split and the orders. Source: see `digits`.
    """
    _checks.positive_int("permuted_digits", "tasks", tasks)
    rng = np.random.default_rng(seed)
    pixels, labels = _digits.digit_images()
    rows = rng.permutation(len(pixels))
    test, valid, train = np.split(rows, (_TEST, _TEST + _VALID))
    return _permuted(pixels / 16, labels, (train, valid, test), tasks, rng)


def permuted_mnist(
    data_dir: str | Path | None = None, seed: int = 0, *, tasks: int = 10
) -> Permuted:
    """MNIST with pixels in another order for each task.

    50,000 images to train, 10,000 to validate, the official 10,000 to test, the same ones in all
    tasks. `seed` chooses which of the official 60,000 validate, and the orders. Source: see
    `mnist`, and its errors. Von Oswald et al. 2020 (arXiv 1906.00695) pad to 32 x 32 before they
    permute; here there are 784 pixels.

    Raises ValueError unless `tasks` is a positive integer.
    """
    _checks.positive_int("permuted_mnist", "tasks", tasks)
    pixels, labels, count = _mnist.images(data_dir)
    rng = np.random.default_rng(seed)
    valid, train = np.split(rng.permutation(count), (_MNIST_VALID,))
    parts = train, valid, np.arange(count, len(labels))
    return _permuted(pixels / np.float32(255), labels, parts, tasks, rng)


def permuted_draws(key: Key, data: Permuted, *, steps: int, batch: int) -> Draws:
    """Minibatches of every task, rows drawn with replacement: leaves [tasks, steps, ...]."""
    tasks = len(data.order)
    rows = jax.random.randint(key, (tasks, steps, batch), 0, len(data.train_y), jnp.int32)
    return Draws(jnp.repeat(jnp.arange(tasks, dtype=jnp.int32)[:, None], steps, 1), rows)


def permuted_batch(data: Permuted, draws: Draws) -> tuple[jax.Array, jax.Array]:
    """The images [batch, pixels] and labels [batch] of one draw."""
    x = data.train_x[draws.rows][:, data.order[draws.task]]
    return x, data.train_y[draws.rows]


def permuted_valid(data: Permuted, task: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The images of a task that settings are chosen on, and their labels."""
    return data.valid_x[:, data.order[task]], data.valid_y


def permuted_test(data: Permuted, task: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The test images of a task and their labels."""
    return data.test_x[:, data.order[task]], data.test_y


def _permuted(pixels, labels, parts, tasks: int, rng: np.random.Generator) -> Permuted:
    width = pixels.shape[1]
    orders = [np.arange(width), *(rng.permutation(width) for _ in range(tasks - 1))]
    x, y = np.asarray(pixels, np.float32), np.asarray(labels, np.int32)
    images = [half for rows in parts for half in (x[rows], y[rows])]
    return Permuted(*map(jnp.asarray, (*images, np.stack(orders).astype(np.int32))))
