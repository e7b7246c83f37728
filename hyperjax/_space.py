"""A space of hyperparameters: where each may lie, and an unconstrained coordinate for it.

Optimizers move *raw* values, which may be any real number; losses see *constrained* values. A
`Range` is the bijector between the two, with the distribution from which `sample` draws. Every
map is elementwise and smooth, so a batch of settings is one more leading axis and a hypergradient
passes through.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks
from ._types import HParams, Key, Loss, PyTree


@dataclass(frozen=True)
class Range:
    """One leaf of a space. Make it with `loguniform`, `uniform`, `positive` or `real`."""

    forward: Callable[[jax.Array], jax.Array]  # raw -> constrained
    inverse: Callable[[jax.Array], jax.Array]
    quantile: Callable[[jax.Array], jax.Array]  # (0, 1) -> raw, the inverse distribution function
    low: float  # bounds of the constrained value; infinite where there is none
    high: float
    init: float | np.ndarray  # constrained
    shape: tuple[int, ...]
    scale: str  # "log" or "linear": how to plot it


def loguniform(low: float, high: float, *, init=None, shape: tuple[int, ...] = ()) -> Range:
    """A positive value in (low, high), uniform in its logarithm.

    Bijector: log value = log low + log(high / low) sigmoid(raw). `init` defaults to the geometric
    mean of the bounds. Raises ValueError unless 0 < low < init < high.
    """
    _check_bounds("loguniform", low, high, least=0.0)
    start, width = math.log(low), math.log(high / low)
    init = math.exp(start + width / 2) if init is None else init
    return _make(
        "loguniform",
        lambda raw: jnp.exp(start + width * jax.nn.sigmoid(raw)),
        lambda value: _logit((jnp.log(value) - start) / width),
        _logit, low, high, init, shape, "log",
    )  # fmt: skip


def uniform(low: float, high: float, *, init=None, shape: tuple[int, ...] = ()) -> Range:
    """A value in (low, high), uniform.

    Bijector: value = low + (high - low) sigmoid(raw). `init` defaults to the middle. Raises
    ValueError unless low < init < high.
    """
    _check_bounds("uniform", low, high, least=-math.inf)
    init = (low + high) / 2 if init is None else init
    return _make(
        "uniform",
        lambda raw: low + (high - low) * jax.nn.sigmoid(raw),
        lambda value: _logit((value - low) / (high - low)),
        _logit, low, high, init, shape, "linear",
    )  # fmt: skip


def positive(
    *, scale: float = 1.0, low: float = 0.0, init=None, shape: tuple[int, ...] = ()
) -> Range:
    """A value above `low` without an upper bound.

    Bijector: value = low + scale softplus(raw), raw standard normal when sampled. `init` defaults
    to raw = 0. Raises ValueError unless scale > 0 and init > low.
    """
    _check_scale("positive", scale)
    init = low + scale * math.log(2) if init is None else init
    return _make(
        "positive",
        lambda raw: low + scale * jax.nn.softplus(raw),
        # softplus^-1(y) = y + log(1 - exp(-y)), which does not overflow for a large y
        lambda value: (value - low) / scale + jnp.log(-jnp.expm1(-(value - low) / scale)),
        jax.scipy.special.ndtri, low, math.inf, init, shape, "linear",
    )  # fmt: skip


def real(*, loc: float = 0.0, scale: float = 1.0, init=None, shape: tuple[int, ...] = ()) -> Range:
    """Any real value.

    Bijector: value = loc + scale raw, raw standard normal when sampled. `init` defaults to `loc`.
    Raises ValueError unless scale > 0.
    """
    _check_scale("real", scale)
    init = loc if init is None else init
    return _make(
        "real",
        lambda raw: loc + scale * raw,
        lambda value: (value - loc) / scale,
        jax.scipy.special.ndtri, -math.inf, math.inf, init, shape, "linear",
    )  # fmt: skip


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

    def lift(self, function: Loss) -> Loss:
        """A function of (params, constrained values, batch) as one of (params, raw, batch)."""
        return lambda params, raw, batch: function(params, self.constrain(raw), batch)

    def unconstrain(self, values: HParams) -> HParams:
        """Constrained to raw values, the inverse of `constrain`.

        Raises ValueError for a NaN or for a value outside its range, where values are concrete.
        """
        self.check("unconstrain", values)
        faults = []
        named = jax.tree_util.tree_leaves_with_path(self.ranges)
        for (keys, r), x in zip(named, jax.tree.leaves(values), strict=True):
            faults += _out_of_range(_name(keys), x, r.low, r.high)
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
        # Half a spacing away from 0 and 1, where the quantile is infinite.
        draw = lambda k, r: jax.random.uniform(k, r.shape, float, minval=1e-6, maxval=1 - 1e-6)
        return tree.unflatten([r.quantile(draw(k, r)) for k, r in zip(keys, leaves, strict=True)])

    def grid(self, points: int) -> HParams:
        """Raw values of the full factorial grid: leaves [points ** D, ...] for D scalars.

        Levels are the midpoints of `points` equally likely intervals.
        """
        _checks.positive_int("grid", "points", points)
        levels = (np.arange(points) + 0.5) / points
        table = np.array(list(itertools.product(levels, repeat=len(self.names))))  # [N, D]
        return self._split(table, lambda r, block: r.quantile(jnp.asarray(block, float)))

    def fan_out(self, key: Key, raw: HParams, size: int, width: float) -> HParams:
        """`size` settings spread symmetrically around `raw`: leaves [size, ...].

        Offsets are evenly spaced over [-width, width] in raw units and permuted independently for
        every scalar, so that no two hyperparameters vary together (HDET, arXiv 2604.24708).
        """
        self.check("fan_out", raw)
        _checks.positive_int("fan_out", "size", size)
        offsets = jnp.linspace(-width, width, size) if size > 1 else jnp.zeros(1)
        keys = jax.random.split(key, len(self.names))
        table = jax.vmap(lambda k: jax.random.permutation(k, offsets), out_axes=1)(keys)
        spread = self._split(table, lambda r, block: block)
        shift = lambda x, d: (jnp.asarray(x)[None] + d).astype(jnp.result_type(x))
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
            f"space: every leaf must be made by loguniform, uniform, positive or real; "
            f"{', '.join(faults)}."
        )
    return Space(ranges)


def _make(where, forward, inverse, quantile, low, high, init, shape, scale) -> Range:
    if np.shape(init) not in ((), tuple(shape)):
        raise ValueError(
            f"{where}: `init` must be a number or have shape {tuple(shape)}; got {np.shape(init)}."
        )
    faults = _out_of_range("init", init, low, high)
    if faults:
        raise ValueError(f"{where}: {'; '.join(faults)}.")
    return Range(forward, inverse, quantile, low, high, init, tuple(shape), scale)


def _logit(p):
    return jnp.log(p) - jnp.log1p(-p)


def _name(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".") or "value"


def _out_of_range(name, x, low, high) -> list[str]:
    try:
        x = np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return []  # a traced value has no number yet; the map itself stays well defined
    if np.isnan(x).any():
        return [f"{name} is NaN; pass a number in ({low:g}, {high:g})"]
    if not ((x > low) & (x < high)).all():
        return [f"{name} is {np.array2string(x)}, outside ({low:g}, {high:g})"]
    return []


def _check_bounds(where, low, high, *, least) -> None:
    if not (least < low < high < math.inf):
        rule = "0 < low < high" if least == 0 else "finite low < high"
        raise ValueError(f"{where}: expected {rule}; got low={low!r}, high={high!r}.")


def _check_scale(where, scale) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"{where}: `scale` must be positive and finite; got {scale!r}.")
