"""An advisor that may overrule a search (Centaur, arXiv 2603.24647): on the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._types import Key, State
from ._cma import Distribution, cmaes_distribution
from ._types import Search

BEST, RECENT = 5, 20
Advisor = Callable[[dict[str, Any]], Any]
Trial = tuple[np.ndarray, float]


class AdvisedState(NamedTuple):
    """State of `advised`."""

    search: State
    best: tuple[Trial, ...]  # the best trials, best first
    recent: tuple[Trial, ...]  # the latest, oldest first
    asked: int
    far: np.ndarray  # bool [N]: of the latest points, overrides too far off to be told
    overridden: int
    withheld: int  # overrides that the search was not told


def advised(
    search: Search,
    advisor: Advisor,
    *,
    every: int = 3,
    warm_up: int = 10,
    reach: float | None = None,
    distribution: Callable[[Any], Distribution] = cmaes_distribution,
) -> Search:
    """`search`, of whose proposals every `every`-th goes past an advisor after `warm_up` trials.

    `advisor(facts) -> point | None`, a point [D] of the unit cube in place of the proposal. The
    facts are a dictionary, for a language model, a person or a rule:

        mean [D], sigma, covariance [D, D]   of the search's distribution
        proposal [D]                         what would be evaluated
        best                                 the five best trials so far, (point, score), best first
        recent                               the latest twenty, oldest first, failures included

    Args:
      search: on the host, and told any number of rows: `from_cmaes`, best with `batch=1`, since
        the facts are those at the time of asking.
      reach: tell the search only overrides within this Mahalanobis distance of its mean,
        sqrt((x - mean)' covariance^-1 (x - mean)) / sigma, about sqrt(D) for its own points. None
        tells all, as in Centaur: far points are then taken for the search's own samples, which
        costs little in short runs and ruins long ones.
      distribution: (state of `search`) -> Distribution.

    Raises ValueError for advice that is not a finite point of the cube.
    """
    _checks.has_functions("advised", "search", search, ("init", "ask", "tell"))
    _checks.is_callable("advised", "advisor", advisor)
    _checks.positive_int("advised", "every", every)
    _checks.positive_int("advised", "warm_up", warm_up, least=0)
    if reach is not None:
        _checks.number("advised", "reach", reach, positive=True)

    def init(key: Key) -> AdvisedState:
        none = np.zeros(0, bool)
        return AdvisedState(search.init(key), (), (), 0, none, 0, 0)

    def ask(state: AdvisedState) -> tuple[Any, AdvisedState]:
        points, inner = search.ask(state.search)
        points = np.array(points, np.float64)
        far, overridden = np.zeros(len(points), bool), state.overridden
        for row in range(len(points)):
            turn = state.asked + row - warm_up
            if turn < 0 or turn % every:
                continue
            shape = distribution(inner)
            advice = advisor(_facts(shape, points[row], state))
            if advice is not None:
                points[row] = _checked(advice, points.shape[1])
                far[row] = reach is not None and _distance(shape, points[row]) > reach
                overridden += 1
        count = state.asked + len(points)
        return points, state._replace(search=inner, asked=count, far=far, overridden=overridden)

    def tell(state: AdvisedState, points, scores) -> AdvisedState:
        points, scores = np.asarray(points, np.float64), np.asarray(scores, np.float64)
        told = list(zip(points.copy(), map(float, scores), strict=True))
        finite = [*state.best, *(row for row in told if np.isfinite(row[1]))]
        near = ~state.far
        inner = search.tell(state.search, points[near], scores[near]) if near.any() else None
        return state._replace(
            search=state.search if inner is None else inner,
            best=tuple(sorted(finite, key=lambda row: row[1])[:BEST]),
            recent=(*state.recent, *told)[-RECENT:],
            withheld=state.withheld + int(state.far.sum()),
        )

    return Search(init, ask, tell)


def _facts(shape: Distribution, proposal: np.ndarray, state: AdvisedState) -> dict[str, Any]:
    copied = lambda rows: [(x.copy(), y) for x, y in rows]
    return {
        **shape._asdict(),
        "proposal": proposal.copy(),
        "best": copied(state.best),
        "recent": copied(state.recent),
    }


def _checked(advice, dim: int) -> np.ndarray:
    point = np.asarray(advice, np.float64)
    if point.shape != (dim,) or not ((point >= 0) & (point <= 1)).all():
        raise ValueError(
            f"advised: the advisor must return None or a point [{dim}] of the unit cube; got "
            f"{np.array2string(point)}. Clip it with `numpy.clip(point, 0, 1)`."
        )
    return point


def _distance(shape: Distribution, point: np.ndarray) -> float:
    step = point - shape.mean
    return float(np.sqrt(step @ np.linalg.solve(shape.covariance, step)) / shape.sigma)
