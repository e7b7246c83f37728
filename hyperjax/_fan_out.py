"""Offsets of replicas around a common centre: symmetric, evenly spaced, permuted."""

import jax
import jax.numpy as jnp

from ._types import HParams, Key


def offsets(key: Key, size: int, like: HParams) -> HParams:
    """Leaves [size, *shape] for leaves [*shape]: each scalar has `size` values over [-1, 1].

    The values are those of HDET (arXiv 2604.24708), symmetric around 0, in an order of its own for
    every scalar, so that no two of them vary together. A single replica stays
    at the centre.
    """
    places = jnp.arange(size) - (size - 1) / 2
    places = places / max((size - 1) / 2, 0.5)
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))

    def one(key, x):
        table = jnp.broadcast_to(places[:, None], (size, jnp.size(x)))
        table = jax.random.permutation(key, table, axis=0, independent=True)
        return table.reshape(size, *jnp.shape(x)).astype(jnp.result_type(x))

    return tree.unflatten([one(k, x) for k, x in zip(keys, leaves, strict=True)])
