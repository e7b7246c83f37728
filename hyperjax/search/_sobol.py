"""Sobol points with random scrambling (Owen 1998, Matousek 1998): random search, spread evenly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._types import Key
from ._types import Search

# Of a point's index, and of a coordinate: float32 has 24 bits below 1.
INDEX, DIGITS = 20, 24


class SobolState(NamedTuple):
    """State of `sobol`."""

    following: jax.Array  # int32: the number of the next point
    columns: jax.Array  # bool [INDEX, D, DIGITS]: what each bit of the index adds, modulo 2
    shift: jax.Array  # bool [D, DIGITS]


def sobol(dim: int, batch: int, *, scramble: bool = True) -> Search:
    """`batch` points of a Sobol sequence at a time; scores teach nothing.

    Scrambled by a random lower triangular matrix over the bits and a random shift, new for every
    key, each point is uniform, and any 2**k points that start at a multiple of 2**k fill every
    half, quarter, ... of each axis equally: so a power of two suits `batch`. Without scrambling the
    sequence is that of scipy, whose direction numbers (Joe and Kuo 2008) are read once, on the
    host, when the search is made; all else is traced. It repeats after 2**20 points.

    Raises ValueError for more than 21201 dimensions.
    """
    _checks.positive_int("sobol", "dim", dim)
    _checks.positive_int("sobol", "batch", batch)
    columns = _directions(dim)

    def init(key: Key) -> SobolState:
        lower, shift = jax.random.split(key)
        start = jnp.zeros((), jnp.int32)
        if not scramble:
            return SobolState(start, jnp.asarray(columns), jnp.zeros((dim, DIGITS), bool))
        matrix = jnp.tril(jax.random.bernoulli(lower, shape=(dim, DIGITS, DIGITS)), -1)
        matrix = matrix | jnp.eye(DIGITS, dtype=bool)[None]
        mixed = jnp.einsum("dij,ndj->ndi", matrix.astype(jnp.int32), columns.astype(np.int32)) % 2
        return SobolState(start, mixed == 1, jax.random.bernoulli(shift, shape=(dim, DIGITS)))

    def ask(state: SobolState):
        index = (state.following + jnp.arange(batch, dtype=jnp.int32)) % 2**INDEX
        gray = index ^ (index >> 1)
        bits = gray[:, None] >> jnp.arange(INDEX)[None] & 1
        sums = jnp.einsum("bn,ndi->bdi", bits, state.columns.astype(jnp.int32))
        digits = (sums + state.shift[None]) % 2
        values = 0.5 ** jnp.arange(1, DIGITS + 1, dtype=float)
        return digits @ values, state._replace(following=(state.following + batch) % 2**INDEX)

    return Search(init, ask, lambda state, points, scores: state)


def _directions(dim: int) -> np.ndarray:
    """The binary digits of what bit n of the Gray code of an index adds to a point."""
    from scipy.stats import qmc  # here, since it takes a second to import

    if dim > qmc.Sobol.MAXDIM:
        raise ValueError(f"sobol: `dim` must be <= {qmc.Sobol.MAXDIM}; got {dim}.")
    engine = qmc.Sobol(dim, scramble=False, bits=DIGITS)
    rows = []
    for n in range(INDEX):
        # The Gray code of 2**(n + 1) - 1 is 2**n: that bit alone.
        engine.fast_forward(2 ** (n + 1) - 1 - engine.num_generated)
        rows.append(engine.random(1)[0])
    whole = np.round(np.stack(rows) * 2**DIGITS).astype(np.int64)  # [INDEX, D]
    return (whole[..., None] >> np.arange(DIGITS - 1, -1, -1) & 1).astype(bool)
