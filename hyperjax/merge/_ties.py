"""TIES merging (Yadav et al. 2023, arXiv 2306.01708): trim, elect signs, average who agrees."""

import jax
import jax.numpy as jnp

from .._types import Params, Scalar
from ._breadcrumbs import Merged, add, check_share, count_of, sound
from ._common import common_type, wide


def ties(
    base: Params,
    vectors: Params,
    *,
    scale: Scalar | float = 1.0,
    keep: Scalar | float = 0.2,
) -> Merged:
    """`base + scale * v`, v the mean over tasks of the entries that survive and agree.

    Args:
      base: the common start.
      vectors: leaves [T, ...], see `task_vectors`.
      scale: factor of the merged vector.
      keep: share of the entries of each vector, over all its tensors, that is kept: the largest
        by magnitude. Exactly int(keep n) of n stay (a share that is traced is as exact as its
        type); the authors' code keeps one more.

    The sign of an entry is that of the sum over tasks of what was kept; its value is the mean of
    the kept entries of that sign. Where the sum is zero exactly, so is the entry. Scale and keep
    may be traced. Raises ValueError for a share outside [0, 1].
    """
    check_share("ties", "keep", keep)
    vectors, excluded = sound("ties", base, vectors)
    leaves, structure = jax.tree.flatten(vectors)
    tasks = leaves[0].shape[0]
    common = common_type(vectors)
    flat = jnp.concatenate([x.reshape(tasks, -1).astype(common) for x in leaves], axis=1)
    n = flat.shape[1]
    place = n - 1 - jnp.argsort(jnp.argsort(jnp.abs(flat), axis=1, stable=True), axis=1)
    kept = jnp.where(place < count_of(keep, n), flat, 0)
    sign = jnp.sign(jnp.sum(kept, axis=0))
    agree = (jnp.sign(kept) == sign[None]) & (sign[None] != 0)
    total = jnp.sum(jnp.where(agree, kept, 0), axis=0) / jnp.maximum(agree.sum(axis=0), 1).astype(
        common
    )
    parts, offset = [], 0
    for x in leaves:
        size = x[0].size
        parts.append(total[offset : offset + size].reshape(x.shape[1:]).astype(wide(x.dtype)))
        offset += size
    return add(base, structure.unflatten(parts), scale, excluded)
