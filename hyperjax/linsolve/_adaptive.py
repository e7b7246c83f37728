"""A tolerance that follows the accuracy of what the solve is for."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from .. import _checks
from .._types import LinearSolve, Scalar


@dataclass(frozen=True)
class AdaptiveSolve:
    """See `adaptive`."""

    solve: Callable[[Scalar], LinearSolve]
    ratio: float
    floor: float
    ceiling: float

    def at(self, stationarity: Scalar) -> LinearSolve:
        """The solve with the tolerance for a distance `stationarity` from a solution."""
        return self.solve(jnp.clip(self.ratio * stationarity, self.floor, self.ceiling))


def adaptive(
    solve: Callable[[Scalar], LinearSolve],
    *,
    ratio: float = 1.0,
    floor: float = 1e-6,
    ceiling: float = 0.1,
) -> AdaptiveSolve:
    """A linear solve with tolerance clip(ratio * stationarity, floor, ceiling).

    For `implicit(solve=...)`: an inner solution that is off by some amount makes the hypergradient
    off by about as much, so that a more exact adjoint would be wasted.

    Args:
      solve: from a tolerance to a solve, for example `lambda tol: cg(tol=tol)`. The tolerance is
        traced.
      ratio: > 0; tolerance per |optimality(params)|, in units of one over those of `optimality`.
      floor, ceiling: bounds of the tolerance, 0 < floor <= ceiling.

    Raises ValueError for arguments out of range.

    Reference: Pedregosa 2016 (arXiv 1602.02355), Algorithm 1, which prescribes one sequence of
    tolerances to both; here that of the adjoint follows from what training has reached.
    """
    _checks.is_callable("adaptive", "solve", solve)
    _checks.number("adaptive", "ratio", ratio, positive=True)
    _checks.number("adaptive", "floor", floor, positive=True)
    _checks.number("adaptive", "ceiling", ceiling, positive=True)
    if floor > ceiling:
        raise ValueError(
            f"adaptive: `floor` must be at most `ceiling`; got {floor!r} and {ceiling!r}."
        )
    return AdaptiveSolve(solve, ratio, floor, ceiling)
