"""What every search is: three functions, over points of the unit cube."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from .._types import Key, State

Array: TypeAlias = Any  # of JAX; around an object on the host, of NumPy


class Search(NamedTuple):
    """A way to choose points of the unit cube by the scores of earlier ones.

    `init(key) -> state`; `ask(state) -> (points, state)` with points [N, D] in [0, 1], N and D
    fixed by the factory; `tell(state, points, scores) -> state` with scores [N] in the order of the
    points. A smaller score is better, and one that is not finite marks a failed evaluation, which
    is never the best. `Space.from_unit` turns points into hyperparameters.

    Searches of ours are pure, for jit, vmap and `lax.scan`; `from_optuna` and `from_cmaes` give
    the same three functions around an object on the host, which changes as it is asked and told.
    """

    init: Callable[[Key], State]
    ask: Callable[[State], tuple[Array, State]]
    tell: Callable[[State, Array, Array], State]
