"""Grid search: the middles of equal cells of the unit cube."""

import jax.numpy as jnp

from .. import _checks
from ._types import Search


def grid(dim: int, batch: int, *, levels: int) -> Search:
    """The `levels ** dim` middles of cells, `batch` at a time, the last coordinate fastest.

    The settings of `Space.grid(levels)`, in its order, where no range is `integers` or `choice`,
    of which that method leaves out what would come twice. After the last point it starts again at
    the first. Raises ValueError for 2**31 points or more.
    """
    for name, value in (("dim", dim), ("batch", batch), ("levels", levels)):
        _checks.positive_int("grid", name, value)
    count = levels**dim
    if count >= 2**31:
        raise ValueError(
            f"grid: {levels} levels of {dim} coordinates are {count} points, too many to number in "
            "32 bits; take fewer levels, or `sobol`."
        )
    places = jnp.asarray([levels**k for k in reversed(range(dim))], jnp.int32)

    def ask(state):
        index = (state + jnp.arange(min(batch, count), dtype=jnp.int32)) % count
        index = jnp.resize(index, (batch,))
        digits = index[:, None] // places[None] % levels
        return (digits + 0.5) / levels, (state + batch) % count

    return Search(lambda key: jnp.zeros((), jnp.int32), ask, lambda state, points, scores: state)
