"""Where a final member comes from."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .. import _checks


def lineage(parents: ArrayLike, member: ArrayLike) -> jax.Array:
    """The slots in which the ancestors of a final member trained, one per outer step.

    Walks back from the end. After the last exchange the member sits in slot `member`; the state
    that a slot holds after the exchange of step t trained during step t in the slot
    `parents[t, slot]`, where it had arrived by the exchange of step t - 1. Hence
    `jax.tree.map(lambda v: v[jnp.arange(T), lineage(parents, member)], metrics.members.hparams)`
    is the schedule that shaped the final member, which `replay` trains along. Where params are
    means over members (`hdet`), no single schedule did.

    Args:
      parents: [T, P] integers, `metrics.events.parents` of a run.
      member: one final slot, or an array of them to follow at once.

    Returns [T] slots, or [T, *member.shape]. Raises ValueError unless `parents` has two axes.
    """
    if jnp.ndim(parents) != 2:
        raise ValueError(
            f"lineage: expected `parents` [outer steps, members]; got {_checks.describe(parents)}. "
            "Of several populations take one, or use `jax.vmap`."
        )
    parents = jnp.asarray(parents)

    def back(slot, row):
        slot = row[slot]
        return slot, slot

    last = jnp.asarray(member, parents.dtype)
    return lax.scan(back, last, parents, reverse=True)[1]
