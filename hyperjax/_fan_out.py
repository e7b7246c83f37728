"""Replicas around a common centre: symmetric offsets, and means without the diverged."""

import jax
import jax.numpy as jnp

from ._types import HParams, Key, PyTree


def offsets(key: Key, size: int, like: HParams) -> HParams:
    """Leaves [size, *shape] for leaves [*shape]: each scalar has `size` values over [-1, 1].

    The values are those of HDET (arXiv 2604.24708), symmetric around 0, in an order of its own for
    every scalar, so that over many draws no two vary together. A single one stays in the centre.
    """
    return _tables(key, size, like, _shuffled)


def mirrored(key: Key, size: int, like: HParams) -> HParams:
    """The values of `offsets`, in replicas that come in pairs of opposite offsets.

    Half of them are ordered and signed at random, the rest mirrors them: all odd moments of the
    design vanish, so that curvature cannot pass for slope. They span size // 2 directions.
    """

    def one(key, table):
        order, sign = jax.random.split(key)
        upper = table[size - size // 2 :]
        signs = jax.random.rademacher(sign, upper.shape, upper.dtype)
        half = signs * _shuffled(order, upper)
        return jnp.concatenate([half, table[size // 2 : size - size // 2], -half])

    return _tables(key, size, like, one)


def _shuffled(key, table):
    return jax.random.permutation(key, table, axis=0, independent=True)


def _tables(key, size, like, order):
    """`order(key, table)` of the places [size, scalars], for every leaf."""
    places = jnp.arange(size) - (size - 1) / 2
    places = places / max((size - 1) / 2, 0.5)
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))

    def one(key, x):
        table = order(key, jnp.broadcast_to(places[:, None], (size, jnp.size(x))))
        return table.reshape(size, *jnp.shape(x)).astype(jnp.result_type(x))

    return tree.unflatten([one(k, x) for k, x in zip(keys, leaves, strict=True)])


def average(tree: PyTree, keep: jax.Array) -> PyTree:
    """Every row [P, ...] becomes the mean of those to keep; the tree itself if there are none.

    The mean of equal rows is that row, bit for bit: it is one of them plus what others differ by.
    """
    first = jnp.argmax(keep)

    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        near = wide[first]
        mean = near + masked_mean(keep, wide - near[None])
        return jnp.where(keep.any(), jnp.broadcast_to(mean, x.shape), wide).astype(x.dtype)

    return jax.tree.map(one, tree)


def masked_mean(keep, x):
    """Mean over the leading axis of the rows kept; 0 without any."""
    keep = keep.reshape(keep.shape + (1,) * (x.ndim - 1))
    return jnp.where(keep, x, 0).sum(0) / jnp.maximum(keep.sum(), 1)
