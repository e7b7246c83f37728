"""Resample or scale: how copies explore in population based training (Jaderberg et al. 2017,
arXiv 1711.09846, appendix A)."""

import jax
import jax.numpy as jnp

from .._ranges import Range
from .._space import Space
from .._types import HParams, Key
from ._replace import Explore

# Raw values next to a finite bound, where a sigmoid is 1e-6 from its end: as `Space.sample` draws.
EDGE = 13.8


def resample(
    space: Space, *, probability: float = 0.25, factors: tuple[float, float] = (0.8, 1.2)
) -> Explore:
    """`explore(key, hparams)` that draws a value anew, or multiplies it by one of `factors`.

    Every scalar for itself: with `probability` a new draw from its range, otherwise the
    constrained value times one of the two factors, with equal chance, clipped to the bounds of
    its range (to 1e-6 of the range from them, since raw values at the bounds are infinite). A
    `choice` is drawn anew as a whole, or stays. `integers` are rounded, so small ones move by
    draws alone.

    The 0.25 and the factors are those of the authors' experiments as repeated by common
    implementations; from memory of the paper.

    Raises ValueError for a probability outside [0, 1] or factors that are not positive.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"resample: `probability` must be in [0, 1]; got {probability!r}.")
    if len(factors) != 2 or not min(factors) > 0:
        raise ValueError(f"resample: `factors` must be two positive numbers; got {factors!r}.")

    def one(key: Key, prior: Range, raw: jax.Array, drawn: jax.Array) -> jax.Array:
        anew, which = jax.random.split(key)
        whole = prior.levels(2).ndim > 1  # its levels are those of the leaf: a `choice`
        shape = () if whole else jnp.shape(raw)
        factor = jnp.where(jax.random.bernoulli(which, 0.5, shape), *factors)
        kept = raw if whole else _scaled(prior, raw, factor.astype(jnp.result_type(raw)))
        return jnp.where(jax.random.bernoulli(anew, probability, shape), drawn, kept)

    def explore(key: Key, hparams: HParams) -> HParams:
        space.check("resample", hparams)
        draw, rest = jax.random.split(key)
        ranges, tree = jax.tree.flatten(space.ranges)
        raws = jax.tree.leaves(hparams)
        keys = jax.random.split(rest, len(ranges))
        drawn = jax.tree.leaves(space.sample(draw))
        rows = zip(keys, ranges, raws, drawn, strict=True)
        return tree.unflatten([one(k, r, x, d.astype(jnp.result_type(x))) for k, r, x, d in rows])

    return explore


def _scaled(prior: Range, raw: jax.Array, factor: jax.Array) -> jax.Array:
    value = prior.forward(raw) * factor
    above, below = value >= prior.high, value <= prior.low
    inside = ~(above | below)
    moved = prior.inverse(jnp.where(inside, value, prior.forward(jnp.zeros_like(raw))))
    moved = jnp.where(above, EDGE, jnp.where(below, -EDGE, moved))
    most = EDGE if prior.high < jnp.inf else jnp.inf
    least = -EDGE if prior.low > -jnp.inf else -jnp.inf
    return jnp.clip(moved, least, most).astype(raw.dtype)
