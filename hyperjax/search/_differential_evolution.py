"""Differential evolution (Storn and Price 1997), with every choice of it as a number that can be
traced: the parameterized form of MetaDE (arXiv 2502.10470), derived from its description."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._types import Key, Scalar
from ._types import Search

BASES = ("rand", "best", "pbest", "current")
CROSSOVERS = ("binomial", "exponential", "arithmetic")
MOST = 4  # difference vectors


class Genes(NamedTuple):
    """What a differential evolution does; scalars, which may be traced."""

    scale: Scalar  # F, of the difference vectors and of the step from left to right
    rate: Scalar  # CR: how much of the mutant a trial takes
    left: Scalar  # index in BASES
    right: Scalar  # index in BASES; the same as `left` for the plain rand/k, best/k, ...
    differences: Scalar  # how many difference vectors, 1 to 4
    crossover: Scalar  # index in CROSSOVERS


class EvolutionState(NamedTuple):
    """State of `differential_evolution`."""

    key: Key
    points: jax.Array  # [N, D], the population
    scores: jax.Array  # [N]; infinite before the first evaluation that did not fail
    started: jax.Array  # bool: whether the population has been evaluated


def genes(
    scale: Scalar | float = 0.5,
    rate: Scalar | float = 0.9,
    left: str = "rand",
    right: str | None = None,
    differences: int = 1,
    crossover: str = "binomial",
) -> Genes:
    """Genes by name: DE/rand/1/bin, unless asked otherwise. `right` defaults to `left`.

    Raises ValueError for an unknown name, a negative scale, a rate outside [0, 1] or a number of
    differences outside 1 to 4.
    """
    right = left if right is None else right
    _checks.number("genes", "scale", scale)
    known = _checks.number("genes", "rate", rate)
    if known is not None and known > 1:
        raise ValueError(f"genes: `rate` must be in [0, 1]; got {rate!r}.")
    _checks.one_of("genes", "left", left, BASES)
    _checks.one_of("genes", "right", right, BASES)
    _checks.one_of("genes", "crossover", crossover, CROSSOVERS)
    _checks.one_of("genes", "differences", differences, tuple(range(1, MOST + 1)))
    whole = lambda n: jnp.asarray(n, jnp.int32)
    return Genes(
        jnp.asarray(scale, float),
        jnp.asarray(rate, float),
        whole(BASES.index(left)),
        whole(BASES.index(right)),
        whole(differences),
        whole(CROSSOVERS.index(crossover)),
    )


def genes_from_unit(point: jax.Array) -> Genes:
    """Genes at a point [6] of the unit cube, in the order of the fields; choices equally likely.

    Raises ValueError for a point of another shape.
    """
    if jnp.shape(point)[-1:] != (6,):
        raise ValueError(
            f"genes_from_unit: expected `point` [6], one entry per gene; got "
            f"{_checks.describe(point)}."
        )
    u = jnp.clip(point, 0, 1)
    pick = lambda k, count: jnp.minimum(jnp.floor(u[..., k] * count), count - 1).astype(jnp.int32)
    left, right = pick(2, len(BASES)), pick(3, len(BASES))
    return Genes(u[..., 0], u[..., 1], left, right, 1 + pick(4, MOST), pick(5, len(CROSSOVERS)))


def differential_evolution(
    dim: int, batch: int, genes: Genes, *, most: int = MOST, elite: float = 0.05
) -> Search:
    """A population of `batch` points; each point's rival takes its place if it is not worse.

        mutant = left + F (right - left) + F (sum of difference vectors)

    clipped to the cube, crossed with the point. One random member serves for both bases "rand", and
    one of the best `elite` for both "pbest"; difference vectors are between other members, all
    distinct (the same for genes in which the bases agree: DE/rand/1 is left = right = "rand").
    Exponential crossover always copies at least one coordinate, as Storn and Price have it; in
    MetaDE's code it may copy none.

    The first points asked are uniform; a failed evaluation never takes a place.

    Args:
      most: the largest number of difference vectors that `genes` may hold, 1 to 4; a gene above it
        counts as `most`. `batch` must be 2 most + 2 or more.
      elite: fraction of the population from which "pbest" is drawn, in (0, 1]; at least one.

    Genes may be traced: vmap over them, or tune them (`meta`). Raises ValueError for a batch that
    is too small, and for `most` or `elite` out of range.
    """
    _checks.positive_int("differential_evolution", "dim", dim)
    _checks.positive_int("differential_evolution", "batch", batch)
    _checks.one_of("differential_evolution", "most", most, tuple(range(1, MOST + 1)))
    if not 0 < elite <= 1:
        raise ValueError(f"differential_evolution: `elite` must be in (0, 1]; got {elite!r}.")
    if batch < 2 * most + 2:
        raise ValueError(
            f"differential_evolution: {most} difference vectors need a `batch` of at least "
            f"{2 * most + 2}; got {batch}. Take more points, or a smaller `most`."
        )

    def init(key: Key) -> EvolutionState:
        key, now = jax.random.split(key)
        points = jax.random.uniform(now, (batch, dim), float)
        return EvolutionState(key, points, jnp.full(batch, jnp.inf, float), jnp.asarray(False))

    def ask(state: EvolutionState):
        key, mutate, cross = jax.random.split(state.key, 3)
        mutants = _mutants(mutate, state, genes, most, math.ceil(elite * batch - 1e-6))
        rivals = jnp.clip(_cross(cross, state.points, mutants, genes), 0, 1)
        return jnp.where(state.started, rivals, state.points), state._replace(key=key)

    def tell(state: EvolutionState, points, scores) -> EvolutionState:
        scores = jnp.asarray(scores, state.scores.dtype)
        taken = jnp.isfinite(scores) & (scores <= state.scores)
        return EvolutionState(
            state.key,
            jnp.where(taken[:, None], points, state.points).astype(state.points.dtype),
            jnp.where(taken, scores, state.scores),
            state.started | True,  # as varied as it was, inside shard_map
        )

    return Search(init, ask, tell)


def _mutants(key: Key, state: EvolutionState, genes: Genes, most: int, top: int) -> jax.Array:
    points, scale = state.points, jnp.asarray(genes.scale, state.points.dtype)
    size = points.shape[0]
    draw, elect = jax.random.split(key)
    base, *others = others_than_self(draw, size, 2 * most + 1)
    order = jnp.argsort(state.scores)
    chosen = order[jax.random.randint(elect, (size,), 0, top)]
    best = jnp.full(size, order[0], base.dtype)
    bases = jnp.stack([base, best, chosen.astype(base.dtype), jnp.arange(size, dtype=base.dtype)])
    left, right = points[bases[genes.left]], points[bases[genes.right]]
    total = jnp.zeros_like(points)
    for k in range(most):
        used = (k < genes.differences) | (k == 0)
        total += jnp.where(used, points[others[2 * k]] - points[others[2 * k + 1]], 0)
    return left + scale * (right - left) + scale * total


def others_than_self(key: Key, size: int, count: int) -> list[jax.Array]:
    """`count` indices [size] that differ from one another and from the position, all as likely."""
    taken = [jnp.arange(size, dtype=jnp.int32)]  # ascending
    picked = []
    left = size - 1 - np.arange(count)[:, None]  # how many there are to choose from
    draws = jnp.floor(jax.random.uniform(key, (count, size)) * left).astype(jnp.int32)
    for draw in draws:
        for index in taken:  # count over those taken
            draw = draw + (draw >= index)
        picked.append(draw)
        above, ordered = draw, []
        for index in taken:
            ordered.append(jnp.minimum(index, above))
            above = jnp.maximum(index, above)
        taken = [*ordered, above]
    return picked


def _cross(key: Key, points: jax.Array, mutants: jax.Array, genes: Genes) -> jax.Array:
    size, dim = points.shape
    rate = jnp.asarray(genes.rate, points.dtype)
    toss, begin = jax.random.split(key)
    heads = jax.random.uniform(toss, (size, dim), points.dtype) < rate
    first = jax.random.randint(begin, (size, 1), 0, dim)
    place = (jnp.arange(dim)[None] - first) % dim  # 0 at the coordinate that is always copied
    # A run goes on while heads come up.
    length = 1 + jnp.cumprod(heads[:, 1:], axis=1, dtype=jnp.int32).sum(1, keepdims=True)
    copied = jnp.where(genes.crossover == 1, place < length, heads | (place == 0))
    blended = points + rate * (mutants - points)
    return jnp.where(genes.crossover == 2, blended, jnp.where(copied, mutants, points))
