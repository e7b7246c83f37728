"""A space of hyperparameters: where each may lie, and an unconstrained coordinate for it.

Optimizers move *raw* values, which may be any real number; losses see *constrained* values. A
`Range` is the bijector between the two, with the distribution from which `sample` draws. A batch of
settings is one more leading axis, and a hypergradient passes through, but for `integers` and
`choice`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks, _fan_out
from ._ranges import Range
from ._types import HParams, Key, PyTree

Result = TypeVar("Result")
_INSIDE = 1e-6, 1 - 1e-6  # of (0, 1), at whose ends the quantile is infinite


@dataclass(frozen=True)
class Space:
    """A pytree of ranges. Methods take and return trees of that structure; see `space`."""

    ranges: PyTree

    def init(self) -> HParams:
        """Raw values of the initial setting, in JAX's default floating type."""
        return jax.tree.map(
            lambda r: r.inverse(jnp.broadcast_to(jnp.asarray(r.init, float), r.shape)),
            self.ranges,
        )

    def constrain(self, raw: HParams) -> HParams:
        """Raw to constrained values; leaves may carry leading batch axes."""
        self.check("constrain", raw)
        return jax.tree.map(lambda r, x: r.forward(x), self.ranges, raw)

    def lift(
        self, function: Callable[[Any, HParams, Any], Result]
    ) -> Callable[[Any, HParams, Any], Result]:
        """A function of (params, constrained values, batch) as one of (params, raw, batch).

        So for a loss, a score, or a training step, whose first argument is a state.
        """
        return lambda params, raw, batch: function(params, self.constrain(raw), batch)

    def unconstrain(self, values: HParams) -> HParams:
        """Constrained to raw values, the inverse of `constrain`.

        Raises ValueError for a NaN or for a value outside its range, where values are concrete.
        """
        self.check("unconstrain", values)
        faults = []
        named = jax.tree_util.tree_leaves_with_path(self.ranges)
        for (keys, r), x in zip(named, jax.tree.leaves(values), strict=True):
            faults += r.faults(_name(keys), x)
        if faults:
            raise ValueError(f"unconstrain: {'; '.join(faults)}.")
        return jax.tree.map(
            lambda r, x: r.inverse(jnp.asarray(x, jnp.result_type(x, float))),
            self.ranges,
            values,
        )

    def sample(self, key: Key) -> HParams:
        """Raw values of one random setting; vmap over keys for many."""
        leaves, tree = jax.tree.flatten(self.ranges)
        keys = jax.random.split(key, len(leaves))
        low, high = _INSIDE
        draw = lambda k, r: jax.random.uniform(k, r.shape, float, minval=low, maxval=high)
        return tree.unflatten([r.quantile(draw(k, r)) for k, r in zip(keys, leaves, strict=True)])

    def from_unit(self, points: jax.Array) -> HParams:
        """Raw values at points of the unit cube, [..., D] to leaves [..., *shape].

        A coordinate is the quantile of its scalar, in the order of `names`, so that uniform points
        are draws of `sample`. It is kept 1e-6 away from 0 and 1, where the quantile is infinite;
        NaN stays NaN. Raises ValueError unless the last axis has one entry per scalar.
        """
        if jnp.ndim(points) < 1 or jnp.shape(points)[-1] != len(self.names):
            raise ValueError(
                f"from_unit: expected `points` [..., {len(self.names)}], one column per scalar; "
                f"got {_checks.describe(points)}."
            )
        inside = jnp.clip(jnp.asarray(points, jnp.result_type(points, float)), *_INSIDE)
        return self._split(inside, lambda r, block: r.quantile(block))

    def to_unit(self, raw: HParams) -> jax.Array:
        """Points of the unit cube [..., D] at raw values: the inverse of `from_unit`.

        Only a point nearer than 1e-6 to a side, which that moves, does not come back.
        """
        self.check("to_unit", raw)
        return self.ravel(jax.tree.map(lambda r, x: r.distribution(x), self.ranges, raw))

    def grid(self, points: int) -> HParams:
        """Raw values of the full factorial grid: leaves [N, ...], N = points ** D for D scalars.

        Levels are the midpoints of `points` equally likely intervals. `integers` have no more
        levels than there are numbers; a `choice` as a whole has its possibilities for levels,
        whatever `points`.
        """
        _checks.positive_int("grid", "points", points)
        leaves, tree = jax.tree.flatten(self.ranges)
        levels = [r.levels(points) for r in leaves]
        axes = [math.prod(r.shape[x.ndim - 1 :]) for r, x in zip(leaves, levels, strict=True)]
        sizes = [len(x) for x, n in zip(levels, axes, strict=True) for _ in range(n)]
        index = np.indices(sizes).reshape(len(sizes), -1)  # [columns, N]
        ends = np.cumsum(axes)
        rows = zip(leaves, levels, np.split(index, ends[:-1]), strict=True)
        return tree.unflatten([x[i.T].reshape(-1, *r.shape) for r, x, i in rows])

    def fan_out(self, key: Key, raw: HParams, size: int, width: float) -> HParams:
        """`size` settings spread symmetrically around `raw`: leaves [size, ...].

        Offsets are evenly spaced over [-width, width] in raw units and permuted independently for
        every scalar, so that over many draws no two vary together (HDET, arXiv 2604.24708).
        """
        self.check("fan_out", raw)
        _checks.positive_int("fan_out", "size", size)
        raw = jax.tree.map(jnp.asarray, raw)
        spread = _fan_out.offsets(key, size, raw)
        shift = lambda x, d: (x[None] + width * d).astype(x.dtype)
        return jax.tree.map(shift, raw, spread)

    @property
    def names(self) -> tuple[str, ...]:
        """One name per scalar, in the order of `ravel`: "lr", "l2[0]", "l2[1]", ..."""
        return tuple(name for name, _ in self.scalars())

    def scalars(self) -> tuple[tuple[str, Range], ...]:
        """(name, range) of every scalar, in the order of `ravel`."""
        listing = []
        for keys, r in jax.tree_util.tree_leaves_with_path(self.ranges):
            for index in np.ndindex(r.shape):
                suffix = f"[{','.join(map(str, index))}]" if index else ""
                listing.append((_name(keys) + suffix, r))
        return tuple(listing)

    def ravel(self, tree: HParams) -> jax.Array:
        """All scalars of `tree` in one vector [..., D]; leading batch axes are kept."""
        self.check("ravel", tree)
        parts = []
        for r, x in zip(jax.tree.leaves(self.ranges), jax.tree.leaves(tree), strict=True):
            batch = jnp.shape(x)[: jnp.ndim(x) - len(r.shape)]
            parts.append(jnp.reshape(x, (*batch, math.prod(r.shape))))
        return jnp.concatenate(parts, axis=-1)

    def unravel(self, vector: jax.Array) -> HParams:
        """The inverse of `ravel`: [..., D] to leaves [..., *shape]."""
        if jnp.ndim(vector) < 1 or vector.shape[-1] != len(self.names):
            raise ValueError(
                f"unravel: expected [..., {len(self.names)}], got {_checks.describe(vector)}."
            )
        return self._split(vector, lambda r, block: block)

    def check(self, where: str, tree: HParams) -> None:
        """Raise ValueError unless `tree` has the structure and trailing shapes of the space."""
        expected, got = jax.tree.structure(self.ranges), jax.tree.structure(tree)
        if got != expected:
            raise ValueError(
                f"{where}: hyperparameters must have the structure of the space, {expected}; "
                f"got {got}."
            )
        named = jax.tree_util.tree_leaves_with_path(self.ranges)
        faults = [
            f"{_name(keys)} is {_checks.describe(x)}, expected a shape that ends in {r.shape}"
            for (keys, r), x in zip(named, jax.tree.leaves(tree), strict=True)
            if jnp.shape(x)[jnp.ndim(x) - len(r.shape) :] != r.shape or jnp.ndim(x) < len(r.shape)
        ]
        if faults:
            raise ValueError(f"{where}: {'; '.join(faults)}.")

    def _split(self, table, make) -> HParams:
        leaves, tree = jax.tree.flatten(self.ranges)
        ends = np.cumsum([math.prod(r.shape) for r in leaves])
        blocks = jnp.split(jnp.asarray(table), ends[:-1], axis=-1)
        return tree.unflatten(
            [
                make(r, b.reshape(*b.shape[:-1], *r.shape))
                for r, b in zip(leaves, blocks, strict=True)
            ]
        )


def space(ranges: PyTree) -> Space:
    """A space from any pytree of ranges.

    Ranges are `loguniform`, `uniform`, `positive`, `real`, `integers` and `choice`. Optimizers see
    their raw values, losses what `constrain` makes of them. The raw value of a `uniform` or
    `loguniform` one is a logit: 0 is the middle, of the logarithm for the latter.

    >>> import hyperjax as hj
    >>> s = hj.space({"lr": hj.loguniform(1e-4, 1.0, init=0.1), "momentum": hj.uniform(0.0, 0.99)})
    >>> round(float(s.constrain(s.init())["lr"]), 4)
    0.1

    Raises TypeError if a leaf is not a range, ValueError if there is none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(ranges)
    if not leaves:
        raise ValueError("space: no ranges; pass for example {'lr': loguniform(1e-4, 1.0)}.")
    faults = [f"{_name(k)} is {type(r).__name__}" for k, r in leaves if not isinstance(r, Range)]
    if faults:
        raise TypeError(
            f"space: every leaf must be made by loguniform, uniform, positive, real, integers or "
            f"choice; {', '.join(faults)}."
        )
    return Space(ranges)


def _name(keys) -> str:
    return _checks.dotted(keys) or "value"
