"""CMA-ES of the package cmaes (Hansen, arXiv 1604.00772), on the host, by ask and tell."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import _checks
from .._types import Key
from ._types import Search


class CmaState(NamedTuple):
    """State of `from_cmaes`."""

    optimizer: Any  # changes as it is asked and told
    pending: tuple[tuple[np.ndarray, float], ...]  # told, but not yet a whole population


class Distribution(NamedTuple):
    """The normal distribution from which points are drawn: N(mean, sigma^2 covariance)."""

    mean: np.ndarray  # [D]
    sigma: float
    covariance: np.ndarray  # [D, D]


def from_cmaes(make: Callable[[int], Any], batch: int) -> Search:
    """The search of a `cmaes.CMA`, `batch` points at a time, whatever its population size.

        from_cmaes(lambda seed: cmaes.CMA(np.full(6, 0.5), 0.25, seed=seed), batch=8)

    Args:
      make: seed to an optimizer whose coordinates are those of the unit cube. Its bounds are set
        to the cube: it draws again what falls outside.
      batch: points per `ask`. Scores are collected until they make a population.

    Failed evaluations rank last; a population of failures alone teaches nothing and is left out.
    `tell` takes any number of rows, also of points that were not asked for. For the host: the state
    holds the optimizer, which changes in place; `init` makes a new one, seeded by its key.

    Raises TypeError if `make` returns something without `ask`, `tell` and `set_bounds`.
    """
    _checks.is_callable("from_cmaes", "make", make)
    _checks.positive_int("from_cmaes", "batch", batch)

    def init(key: Key) -> CmaState:
        optimizer = make(seed_of(key))
        _checks.has_functions("from_cmaes", "make(seed)", optimizer, ("ask", "tell", "set_bounds"))
        optimizer.set_bounds(np.tile([0.0, 1.0], (optimizer.dim, 1)))
        return CmaState(optimizer, ())

    def ask(state: CmaState) -> tuple[Any, CmaState]:
        return np.stack([state.optimizer.ask() for _ in range(batch)]), state

    def tell(state: CmaState, points, scores) -> CmaState:
        size = state.optimizer.population_size
        rows = zip(np.asarray(points, np.float64), np.asarray(scores, np.float64), strict=True)
        told = [*state.pending, *((x, float(y) if np.isfinite(y) else np.inf) for x, y in rows)]
        while len(told) >= size:
            block, told = told[:size], told[size:]
            if any(np.isfinite(y) for _, y in block):
                state.optimizer.tell(block)
        return CmaState(state.optimizer, tuple(told))

    return Search(init, ask, tell)


def cmaes_distribution(state: CmaState) -> Distribution:
    """What `advised` shows of a `from_cmaes` search.

    The package names only the mean in public; the others are attributes of `cmaes.CMA` 0.13.
    """
    it = state.optimizer
    return Distribution(np.array(it.mean), float(it._sigma), np.array(it._C))


def seed_of(key: Key) -> int:
    """A seed in [0, 2**31) for what lives on the host."""
    return int(jax.random.randint(key, (), 0, 2**31 - 1))
