"""A search whose own parameters are searched for (MetaDE, arXiv 2502.10470), in one program."""

from collections.abc import Callable

import jax

from .. import _checks
from .._types import Key
from ._drive import Evaluate, drive
from ._types import Search


def meta(
    make: Callable[[jax.Array], Search],
    evaluate: Evaluate,
    rounds: int,
    *,
    key: Key | None = None,
) -> Evaluate:
    """An `evaluate` for an outer search: the best score that each point's inner search reaches.

    MetaDE is an outer differential evolution over the genes of an inner one, then a longer run of
    the best:

        make = lambda point: differential_evolution(dim, 100, genes_from_unit(point))
        outer = differential_evolution(6, 100, genes(0.5, 0.9))
        _, found = drive(key, outer, meta(make, evaluate, rounds), 50)
        _, trials = drive(another_key, make(found.point), evaluate, 5 * rounds)

    Args:
      make: a point of the outer search to an inner one, whose parameters are traced.
      evaluate: what the inner searches minimize.
      rounds: of each inner search.
      key: where every inner search starts, in every outer round, as in the paper: part of the gain
        is then a fit to that seed. None (our default) is the outer round's own key: the same for
        all points of a round, new in the next, where a score of before that was luck can stay.

    A point whose inner search never met a finite score has NaN.
    """
    _checks.is_callable("meta", "make", make)
    _checks.is_callable("meta", "evaluate", evaluate)
    _checks.positive_int("meta", "rounds", rounds)

    def scored(now: Key, points: jax.Array) -> jax.Array:
        start = now if key is None else key
        return jax.vmap(lambda point: drive(start, make(point), evaluate, rounds)[1].score)(points)

    return scored
