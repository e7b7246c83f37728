"""Truncation selection (population based training, Jaderberg et al. 2017, arXiv 1711.09846)."""

import math

import jax
import jax.numpy as jnp

from .. import _checks
from .._types import Exchange, Key
from ._replace import (
    Clock,
    Events,
    Explore,
    clock,
    random_finite,
    rank,
    replace,
    when_due,
)


def truncation(fraction: float, explore: Explore, *, every: int = 1) -> Exchange:
    """The worst `fraction` copy everything from a random one of the best `fraction`, and explore.

    Args:
      fraction: in (0, 0.5]; of P members, floor(fraction P) are replaced.
      explore: (key, hparams) -> hparams, applied to copies only.
      every: outer steps between exchanges. Diverged members are reseeded at every step, from any
        member that has not diverged.

    Members are tuner states with a field `hparams`. Raises ValueError for a fraction outside its
    range.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"truncation: `fraction` must be in (0, 0.5]; got {fraction!r}.")
    _checks.is_callable("truncation", "explore", explore)
    _checks.positive_int("truncation", "every", every)

    def apply(key, state, members, score):
        choose, reseed, mutate = jax.random.split(key, 3)
        parents = when_due(state, every, score, select(choose, reseed, score, fraction))
        members = replace(mutate, members, parents, explore, every)
        return members, Clock(state.calls + 1), Events(parents, ~jnp.isfinite(score))

    return Exchange(clock, apply)


def select(choose: Key, reseed: Key, score: jax.Array, fraction: float) -> jax.Array:
    """Parents [P]: for the worst one of the best, for a diverged member one that is not."""
    size = score.shape[0]
    count = math.floor(fraction * size + 1e-6)  # 0.29 * 100 is 28.999999999999996
    ranks = rank(score)
    best = jnp.argsort(ranks)[jax.random.randint(choose, (size,), 0, max(count, 1))]
    parents = jnp.where(ranks >= size - count, best, jnp.arange(size))
    return jnp.where(jnp.isfinite(score), parents, random_finite(reseed, score, (size,)))
