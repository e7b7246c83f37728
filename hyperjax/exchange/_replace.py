"""What exchange rules share: ranking that knows divergence, and copying with a record of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _tree
from .._types import HParams, Key, PyTree

Explore = Callable[[Key, HParams], HParams]


class Events(NamedTuple):
    """What an exchange did to each slot, [P]."""

    parents: jax.Array  # int32: the slot whose state this one holds now; its own if untouched
    diverged: jax.Array  # bool: its score was not finite


class Clock(NamedTuple):
    """State of the rules here: how often they were asked."""

    calls: jax.Array  # int32 scalar


def clock(members: PyTree) -> Clock:
    del members
    return Clock(jnp.zeros((), jnp.int32))


def rank(score: jax.Array) -> jax.Array:
    """0 for the best (smallest) score, P - 1 for the worst; diverged members rank last."""
    order = jnp.argsort(jnp.where(jnp.isfinite(score), score, jnp.inf), stable=True)
    return jnp.argsort(order)


def random_finite(key: Key, score: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Slots drawn uniformly from the members that have not diverged; any, if all have."""
    finite = jnp.isfinite(score)
    weight = jnp.where(finite | ~finite.any(), 0.0, -jnp.inf)
    return jax.random.categorical(key, weight, shape=shape).astype(jnp.int32)


def replace(key: Key, members: PyTree, parents: jax.Array, explore: Explore, every: int) -> PyTree:
    """Members copied from their parents; a copy explores hyperparameters of its own.

    Between two exchanges, if nobody has diverged, nothing is moved in memory or between devices.
    """
    moved = parents != jnp.arange(parents.shape[0])

    def copies(members: PyTree) -> PyTree:
        copied = _tree.take(members, parents)
        explored = jax.vmap(explore)(jax.random.split(key, len(moved)), copied.hparams)
        explored = _tree.cast_like(explored, copied.hparams)
        return copied._replace(hparams=_tree.where(moved, explored, copied.hparams))

    # Inside shard_map all varies as the copies do, in either branch.
    return if_anybody(moved, copies, _tree.vary_like(members, (key, parents)), every)


def if_anybody(
    moved: jax.Array, copies: Callable[[PyTree], PyTree], members: PyTree, every: int
) -> PyTree:
    """`copies(members)` if anybody is replaced; otherwise the members, where they are."""
    if every == 1:  # somebody is always replaced, and a branch would cost one more copy
        return copies(members)
    return lax.cond(_anybody(moved), copies, lambda members: members, members)


@jax.custom_batching.custom_vmap
def _anybody(moved: jax.Array) -> jax.Array:
    """Whether anybody is replaced, in any population of a vmap: so a branch remains a branch."""
    return moved.any()


@_anybody.def_vmap
def _in_any_population(axis_size, in_batched, moved):
    del axis_size, in_batched
    return _anybody(moved.any(0)), False


def when_due(state: Clock, every: int, score: jax.Array, parents: jax.Array) -> jax.Array:
    """The parents every `every`-th time, and otherwise none but those of diverged members.

    A diverged member is reseeded at once, and only ever from one that has not diverged.
    """
    finite = jnp.isfinite(score)
    due = (state.calls + 1) % every == 0
    own = jnp.arange(score.shape[0], dtype=jnp.int32)
    wanted = (due | ~finite) & finite[parents]
    return jnp.where(wanted, parents.astype(jnp.int32), own)
