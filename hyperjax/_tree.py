"""Linear algebra on pytrees, and the little else that JAX leaves out."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import _checks
from ._types import PyTree, Scalar


def dot(a: PyTree, b: PyTree) -> Scalar:
    """The inner product over all leaves, in each leaf's own precision."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return functools.reduce(operator.add, jax.tree.leaves(products))


def norm(a: PyTree) -> Scalar:
    """The 2-norm over all leaves, safe from overflow: leaves are scaled by the largest entry."""
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(a)]
    )
    unit = jnp.where(largest > 0, largest, 1)
    scaled = jax.tree.map(lambda x: x / unit.astype(x.dtype), a)
    return unit * jnp.sqrt(dot(scaled, scaled))


def axpy(scale: Scalar | float, x: PyTree, y: PyTree) -> PyTree:
    """`scale * x + y`, leaf by leaf, in the type of `y`."""
    return jax.tree.map(lambda u, v: (scale * u + v).astype(v.dtype), x, y)


def scale(factor: Scalar | float, x: PyTree) -> PyTree:
    return jax.tree.map(lambda u: (factor * u).astype(u.dtype), x)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` in the types of the leaves of `like`."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def sub(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(operator.sub, a, b)


def zeros_like(a: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, a)


def where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Leaves of `a` where the condition holds, of `b` elsewhere.

    The condition is a scalar, or [P] to choose row by row among leaves [P, ...].
    """
    rank = jnp.ndim(condition)

    def choose(x, y):
        shape = jnp.shape(condition) + (1,) * (jnp.ndim(x) - rank)
        return jnp.where(jnp.reshape(condition, shape), x, y)

    return jax.tree.map(choose, a, b)


def all_finite(a: PyTree) -> jax.Array:
    """Whether every entry of every inexact leaf is finite; True without such leaves."""
    flags = [
        jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(a) if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return functools.reduce(jnp.logical_and, flags, jnp.asarray(True))


def strong(a: PyTree) -> PyTree:
    """Every leaf as an array of a strong type.

    A weakly typed leaf (`jnp.full((), 0.1)`) changes type on its first way through a step, and
    `lax.scan` then refuses the carry; so carries are made strong where they are born.
    """

    def one(x):
        x = jnp.asarray(x)
        # `astype` drops weakness; key arrays have no weak type and stay as they are.
        return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x.astype(x.dtype)

    return jax.tree.map(one, a)


def last(batches: PyTree) -> PyTree:
    """The final entry along the leading axis of every leaf."""
    return jax.tree.map(lambda x: x[-1], batches)


def take(tree: PyTree, index: jax.Array) -> PyTree:
    """Rows `index` of every leaf: [P, ...] and [Q] to [Q, ...]."""
    # NumPy arrays cannot be indexed by what is traced.
    return jax.tree.map(lambda x: jnp.asarray(x)[index], tree)


def copies(tree: PyTree, count: int) -> PyTree:
    """`count` times the same: leaves [count, *shape] for leaves [*shape].

    One batch for all training steps, one first set of params for all members of a population, one
    split for all outer steps. Large data need not be copied: let the loss close over it, and let
    the batches be numbers or row indices.

    Raises ValueError unless `count` is an integer of 1 or more.
    """
    _checks.positive_int("copies", "count", count)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), tree)


def replace_at(where: Callable[[PyTree], PyTree], tree: PyTree, value: PyTree) -> PyTree:
    """`tree` with `value` for the part that `where(tree)` selects, such as `lambda s: s.params`.

    Raises ValueError if `where` does anything but select, or selects a leaf twice, or if `value`
    has another structure than what is selected.
    """
    leaves, structure = jax.tree.flatten(tree)
    # Selected among positions: leaves may be equal, or one and the same array.
    places = [_Place(i) for i in range(len(leaves))]
    chosen, inside = jax.tree.flatten(where(structure.unflatten(places)))
    known = [p.position for p in chosen if isinstance(p, _Place)]
    if len(known) < len(chosen) or len(set(known)) < len(known):
        raise ValueError(
            "replace_at: `where` must select parts of the tree, each once, without computing "
            f"anything; got {', '.join(type(p).__name__ for p in chosen)}."
        )
    if jax.tree.structure(value) != inside:
        raise ValueError(
            f"replace_at: the value must have the structure of what `where` selects; got "
            f"{jax.tree.structure(value)}, expected {inside}."
        )
    for position, x in zip(known, jax.tree.leaves(value), strict=True):
        leaves[position] = x
    return structure.unflatten(leaves)


class _Place:
    """A leaf that knows where it is, and nothing else."""

    def __init__(self, position: int):
        self.position = position


def size(a: PyTree) -> int:
    """The number of entries over all leaves."""
    return sum(x.size for x in jax.tree.leaves(a))


def units(tree: PyTree) -> PyTree:
    """The unit directions of a tree with n entries: leaves [n, *shape]."""
    leaves, structure = jax.tree.flatten(tree)
    count, offset, out = size(tree), 0, []
    for x in leaves:
        eye = jnp.eye(count, x.size, -offset, dtype=x.dtype)
        out.append(vary_like(eye.reshape(count, *x.shape), x))
        offset += x.size
    return structure.unflatten(out)


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree`, typed inside shard_map as varying over every mesh axis that `like` varies over.

    A carry that is replicated at first cannot enter a scan whose step makes it vary. Outside
    shard_map this is the identity.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(like)))

    def one(x):
        missing = tuple(sorted(axes - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def _varying(x) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)
