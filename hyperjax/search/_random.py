"""Random search (Bergstra and Bengio 2012): independent uniform points."""

import jax

from .. import _checks
from ._types import Search


def random(dim: int, batch: int) -> Search:
    """`batch` uniform points of the `dim`-dimensional unit cube at a time; scores teach nothing.

    Raises ValueError unless both are positive integers.
    """
    _checks.positive_int("random", "dim", dim)
    _checks.positive_int("random", "batch", batch)

    def ask(state):
        key, now = jax.random.split(state)
        return jax.random.uniform(now, (batch, dim), float), key

    return Search(lambda key: key, ask, lambda state, points, scores: state)
