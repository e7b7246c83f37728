"""Minima with kinks and constraints: a smooth loss plus a penalty with a proximal operator."""

from collections.abc import Callable

import jax

from . import _checks
from ._fixed_point import FixedPoint, Map, iterate
from ._inner import Inner
from ._types import Batch, HParams, Loss, Params
from .prox import Prox


def proximal(loss: Loss, prox: Prox, rate: float) -> FixedPoint:
    """The optimality of minimizing loss + penalty, for `implicit`.

    A minimum is a fixed point of w -> prox(w - rate grad loss(w), hparams, rate), whatever the
    rate > 0; take one below 2 / (largest curvature of the loss), for the linear solve to be well
    conditioned. `prox` is one of `hyperjax.prox` or any proximal operator that can be
    differentiated.

    The solution has a derivative where no entry sits exactly on a kink: entries that the penalty
    holds fixed have derivative zero, and the others move as if the fixed ones were constants
    (Bertrand et al. 2020, arXiv 2002.08943, for the lasso).

    Raises ValueError unless `rate` is positive.
    """
    return FixedPoint(_descent("proximal", loss, prox, rate), smooth=False)


def proximal_descent(loss: Loss, prox: Prox, rate: float) -> Inner:
    """Training by proximal gradient steps, one per batch (ISTA: Beck and Teboulle 2009, eq. 3.1).

    It converges for a convex loss and rates below 2 / (largest curvature).
    """
    return iterate(_descent("proximal_descent", loss, prox, rate))


def _descent(where: str, loss: Loss, prox: Prox, rate: float) -> Map:
    gradient: Callable = jax.grad(_checks.scalar_loss(where, "loss", loss))
    _checks.is_callable(where, "prox", prox)
    _checks.number(where, "rate", rate, positive=True)

    def step(params: Params, hparams: HParams, batch: Batch) -> Params:
        slope = gradient(params, hparams, batch)
        moved = jax.tree.map(lambda w, g: w - rate * g, params, slope)
        return prox(moved, hparams, rate)

    return step
