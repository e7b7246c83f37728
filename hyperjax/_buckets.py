"""Members of different architectures: one population for every set of equal shapes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import _checks
from ._types import HParams, Params, PyTree


class Bucket(NamedTuple):
    """Members whose arrays have the same shapes and types: what one population takes."""

    order: tuple[int, ...]  # which of the members that were passed
    params: Params  # leaves [P, ...]
    hparams: HParams  # leaves [P, ...]


def buckets(members: Sequence[tuple[Params, HParams]]) -> tuple[Bucket, ...]:
    """`members`, single (params, hparams), stacked with those of equal tree, shapes and types.

    One program per bucket, by the same functions, if those look at shapes alone:

        parts = hj.buckets(members)
        states = [pop.init(key, b.params, b.hparams) for b, key in zip(parts, keys)]
        done = [hj.run(pop, state, splits) for state in states]
        metrics = hj.unbucket(parts, [m.members.value.T for _, m in done])  # in order, one each

    An exchange rule meets the members of one bucket only. Buckets come in the order of their first
    members. Raises ValueError if there is no member.
    """
    groups: dict[tuple, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(_kind(member), []).append(i)
    if not groups:
        raise ValueError("buckets: `members` is empty; pass pairs of params and hparams.")

    def stack(index: list[int]) -> Bucket:
        rows = [tuple(members[i]) for i in index]
        params, hparams = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return Bucket(tuple(index), params, hparams)

    return tuple(stack(index) for index in groups.values())


def unbucket(parts: Sequence[Bucket], results: Sequence[PyTree]) -> list[PyTree]:
    """Row by row what came of every member, in the order in which `buckets` was given them.

    `results` has a tree per bucket, leaves [P of that bucket, ...]. Raises ValueError unless there
    is one for each bucket, with a row for each of its members.
    """
    if len(parts) != len(results):
        raise ValueError(
            f"unbucket: `results` needs one entry per bucket, {len(parts)}; got {len(results)}."
        )
    rows = {}
    for part, result in zip(parts, results, strict=True):
        size = len(part.order)
        faults = [
            f"{_checks.path(k)}: {_checks.describe(x)}"
            for k, x in jax.tree_util.tree_leaves_with_path(result)
            if jnp.shape(x)[:1] != (size,)
        ]
        if faults:
            raise ValueError(
                f"unbucket: leaves of `results` need the leading axis of their bucket, {size} "
                f"members; got {', '.join(faults)}."
            )
        for row, i in enumerate(part.order):
            rows[i] = jax.tree.map(lambda x, row=row: x[row], result)
    return [rows[i] for i in sorted(rows)]


def _kind(member: tuple[Params, HParams]) -> tuple:
    leaves, structure = jax.tree.flatten(tuple(member))
    return structure, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
