"""How features become weights: at once, leaf by leaf, in chunks, or per output unit.

Each choice cuts the weights into tables [slots, size]. The body gives features [slots, width] for
all slots in order, and every table has a head that turns its features into its rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks
from .._types import Key

Shapes = Sequence[tuple[int, ...]]


class Head(NamedTuple):
    """rows = gain * (features weight) + offset."""

    weight: jax.Array  # [width, size]
    offset: jax.Array  # [1, size], or [slots, 1] for `chunks`
    gain: jax.Array | None  # [slots, 1] for `chunks`, None otherwise


class Start(NamedTuple):
    """How a head begins: with products (features weight) of deviation `scale`."""

    scale: jax.Array  # [size]
    offset: jax.Array
    gain: jax.Array | None


class Outputs(NamedTuple):
    """`split(leaves) -> tables`, `join(tables, shapes) -> leaves`, and how heads begin.

    `start(deviation, level) -> Start` for two tables [slots, size]: what each weight is to vary by
    and to lie around. `code` is the size of the learnt vector that tells the body which slot it is
    about.
    """

    split: Callable[[list[jax.Array]], list[jax.Array]]
    join: Callable[[list[jax.Array], Shapes], list[jax.Array]]
    start: Callable[[jax.Array, jax.Array], Start]
    code: int


def whole() -> Outputs:
    """All weights at once: one slot, one head [width, weights]."""

    def join(tables: list[jax.Array], shapes: Shapes) -> list[jax.Array]:
        ends, flat = 0, tables[0][0]
        leaves = []
        for shape in shapes:
            leaves.append(flat[ends : ends + math.prod(shape)].reshape(shape))
            ends += math.prod(shape)
        return leaves

    flat = lambda leaves: [jnp.concatenate([x.reshape(-1) for x in leaves])[None]]
    return Outputs(flat, join, _own, 0)


def per_leaf(*, code: int = 8) -> Outputs:
    """One slot and one head per leaf, in the order of the leaves: layers in sequence.

    With `code=0` a body without memory gives all heads the same features, and this is `whole`.

    Raises ValueError unless `code` is an integer >= 0.
    """
    _checks.positive_int("per_leaf", "code", code, least=0)
    return Outputs(
        lambda leaves: [x.reshape(1, -1) for x in leaves],
        lambda tables, shapes: [t.reshape(s) for t, s in zip(tables, shapes, strict=True)],
        _own,
        code,
    )


def per_unit(*, code: int = 8) -> Outputs:
    """One slot per output unit, the last axis of a leaf; one head per leaf for all its units.

    Raises ValueError unless `code` is a positive integer.
    """
    _checks.positive_int("per_unit", "code", code)

    def rows(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(-1, (leaf.shape or (1,))[-1]).T

    return Outputs(
        lambda leaves: [rows(x) for x in leaves],
        lambda tables, shapes: [t.T.reshape(s) for t, s in zip(tables, shapes, strict=True)],
        _own,
        code,
    )


def chunks(size: int, *, code: int = 8) -> Outputs:
    """Every leaf in pieces of `size` weights, a slot each, and one head for all of them.

    The fewest parameters: von Oswald et al. 2020 (arXiv 1906.00695). No chunk lies across two
    leaves, the last of a leaf is cut to fit, and each has a learnt gain and offset, so that leaves
    begin at their own scale though the head is shared.

    Raises ValueError unless `size` and `code` are positive integers.
    """
    _checks.positive_int("chunks", "size", size)
    _checks.positive_int("chunks", "code", code)

    def rows(leaf: jax.Array) -> jax.Array:
        padded = jnp.pad(leaf.reshape(-1), (0, -leaf.size % size), mode="edge")
        return padded.reshape(-1, size)

    def join(tables: list[jax.Array], shapes: Shapes) -> list[jax.Array]:
        start, leaves = 0, []
        for shape in shapes:
            count = math.prod(shape)
            end = start + -(-count // size)
            leaves.append(tables[0][start:end].reshape(-1)[:count].reshape(shape))
            start = end
        return leaves

    return Outputs(lambda x: [jnp.concatenate([rows(y) for y in x])], join, _shared, code)


def _own(deviation: jax.Array, level: jax.Array) -> Start:
    """A head whose slots are all of one leaf, or a single slot."""
    return Start(deviation[0], level[:1], None)


def _shared(deviation: jax.Array, level: jax.Array) -> Start:
    typical = jnp.sqrt(jnp.mean(deviation**2))
    unit = jnp.where(typical > 0, typical, 1)
    column = jnp.broadcast_to(unit, deviation.shape[1:])
    return Start(column, level[:, :1], deviation[:, :1] / unit)


def draw(key: Key, start: Start, features: jax.Array) -> Head:
    """A head of normal noise, for features [draws, slots, width] as it is to get."""
    energy = jnp.mean(jnp.sum(features**2, axis=-1))
    unit = jnp.sqrt(jnp.where(energy > 0, energy, 1))
    noise = jax.random.normal(key, (features.shape[-1], *start.scale.shape), start.scale.dtype)
    return Head(noise * (start.scale / unit)[None], start.offset, start.gain)


def emit(head: Head, features: jax.Array) -> jax.Array:
    """The rows [slots, size] of a table."""
    rows = features @ head.weight
    return (rows if head.gain is None else head.gain * rows) + head.offset
